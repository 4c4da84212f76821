"""The tables of the series; every function runs on the caller's connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from detflow.postgres import Connection
from services.metrics.series import Blocks, EpochRow


async def insert_epoch(
    conn: Connection, *, training_id: str, attempt: int, epoch: int, values: Mapping[str, float]
) -> None:
    """Records what an attempt measured in an epoch; the caller holds the training's lock."""
    names = sorted(values)
    await conn.execute(
        "insert into epoch_row (training_id, epoch, attempt, names, values)"
        " values ($1, $2, $3, $4, $5) on conflict do nothing",
        training_id,
        epoch,
        attempt,
        await _insert_names(conn, training_id, names),
        [values[name] for name in names],
    )


async def insert_steps(
    conn: Connection,
    *,
    training_id: str,
    attempt: int,
    epoch: int,
    first_step: int,
    num_steps: int,
    columns: Mapping[str, Sequence[float]],
) -> None:
    """Records what an attempt measured in steps; the caller holds the training's lock.

    Args:
        conn: Connection.
        training_id: Id of the training.
        attempt: The attempt.
        epoch: Epoch, from 1.
        first_step: Step of the first values within the epoch, from 1.
        num_steps: Steps of the epoch.
        columns: By name the values of all steps: as many in each.
    """
    names = sorted(columns)
    matrix = np.array([columns[name] for name in names], "<f8")
    await conn.execute(
        "insert into step_block (training_id, attempt, epoch, first_step, num_steps, num_values,"
        " names, columns) values ($1, $2, $3, $4, $5, $6, $7, $8) on conflict do nothing",
        training_id,
        attempt,
        epoch,
        first_step,
        num_steps,
        matrix.shape[1],
        await _insert_names(conn, training_id, names),
        matrix.tobytes(),
    )


async def _insert_names(conn: Connection, training_id: str, names: Sequence[str]) -> int:
    """Returns the number of a list of names, recorded now if the training has it not yet."""
    number: int = await conn.fetchval(
        """
        with found as (
          select number from series_names where training_id = $1 and names = $2
        ), added as (
          insert into series_names (training_id, number, names)
          select $1, (select count(*) from series_names where training_id = $1) + 1, $2
          where not exists (select from found) returning number
        )
        select number from found union all select number from added
        """,
        training_id,
        list(names),
    )
    return number


async def list_epochs(conn: Connection, training_id: str) -> list[EpochRow]:
    """Lists what attempts measured, by epoch, then attempt; what is void as well."""
    names = await _list_names(conn, training_id)
    rows = await conn.fetch(
        "select epoch, attempt, names, values from epoch_row where training_id = $1"
        " order by epoch, attempt",
        training_id,
    )
    return [EpochRow(row["epoch"], row["attempt"], names[row["names"]], row[3]) for row in rows]


async def read_blocks(conn: Connection, training_id: str) -> Blocks:
    """Reads where the blocks of a training are, without their values; what is void as well."""
    row = await conn.fetchrow(
        """
        select coalesce(max(id), 0) as last_id,
          array_agg(attempt order by attempt, epoch, first_step) as attempts,
          array_agg(epoch order by attempt, epoch, first_step) as epochs,
          array_agg(first_step order by attempt, epoch, first_step) as first_steps,
          array_agg(num_steps order by attempt, epoch, first_step) as nums_steps,
          array_agg(num_values order by attempt, epoch, first_step) as nums_values,
          array_agg(names order by attempt, epoch, first_step) as lists
        from step_block where training_id = $1
        """,
        training_id,
    )
    assert row is not None  # there are no groups
    finished = await conn.fetch(
        "select attempt, min(epoch) from epoch_row where training_id = $1 group by attempt",
        training_id,
    )
    return Blocks(
        last_id=row["last_id"],
        names=await _list_names(conn, training_id),
        first_finished={attempt: epoch for attempt, epoch in finished},
        **{
            f"{name}_B": np.array(row[name] or [], np.int64)
            for name in ("attempts", "epochs", "first_steps", "nums_steps", "nums_values", "lists")
        },
    )


async def read_column(conn: Connection, training_id: str, name: str, *, last_id: int) -> bytes:
    """Reads the values of one name in all blocks that have it: float64, little-endian.

    Args:
        conn: Connection.
        training_id: Id of the training.
        name: Name of the series.
        last_id: Of the blocks; later ones are left out.
    """
    values: bytes | None = await conn.fetchval(
        """
        select string_agg(
          substring(b.columns from (array_position(n.names, $2) - 1) * 8 * b.num_values + 1
            for 8 * b.num_values),
          ''::bytea order by b.attempt, b.epoch, b.first_step)
        from step_block b
        join series_names n on n.training_id = b.training_id and n.number = b.names
        where b.training_id = $1 and b.id <= $3 and $2 = any(n.names)
        """,
        training_id,
        name,
        last_id,
    )
    return values or b""


async def _list_names(conn: Connection, training_id: str) -> dict[int, tuple[str, ...]]:
    rows = await conn.fetch(
        "select number, names from series_names where training_id = $1", training_id
    )
    return {row["number"]: tuple(row["names"]) for row in rows}
