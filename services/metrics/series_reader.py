"""Series of a training as they are read: by epoch or by step, whole or thinned out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from detflow.errors import ResourceExhausted, not_found
from detflow.postgres import Connection, Database
from services.metrics import series_store
from services.metrics.domain import Training
from services.metrics.series import Blocks, Series, epoch_series

_MAX_VALUES = 200_000
"""Of all series of one answer; it stays below the 4 MiB that a gRPC client takes."""


async def read_epoch_series(
    conn: Connection, training: Training, names: Sequence[str] = (), *, max_points: int = 0
) -> list[Series]:
    """Reads the series by epoch, sorted by name.

    Args:
        conn: Connection.
        training: The training.
        names: Only these, unless empty.
        max_points: At most so many values of each; 0 means all.
    """
    rows = await series_store.list_epochs(conn, training.id)

    def make() -> list[Series]:
        found = epoch_series(rows, names)
        return [one.thinned(max_points) for one in found] if max_points else found

    return await asyncio.to_thread(make)


async def read_step_series(
    conn: Connection, training: Training, names: Sequence[str] = (), *, max_points: int
) -> list[Series]:
    """Reads the series by step, thinned out, sorted by name.

    Args:
        conn: Connection in a transaction that sees the tables at one moment.
        training: The training.
        names: Only these, unless empty.
        max_points: At most so many values of each.

    Raises:
        ResourceExhausted: TOO_MANY_VALUES for one answer.
    """
    blocks = await series_store.read_blocks(conn, training.id)
    found: list[Series] = []
    for name in _chosen(blocks, names):
        column = await series_store.read_column(conn, training.id, name, last_id=blocks.last_id)

        def make(name: str = name, column: bytes = column) -> Series:
            return blocks.series(name, column).thinned(max_points)

        found.append(await asyncio.to_thread(make))
        check_size(found)
    return found


async def iterate_step_series(
    db: Database, training: Training, names: Sequence[str] = ()
) -> AsyncIterator[Series]:
    """Reads the whole series by step one after the other, sorted by name, as they are now.

    No connection is held while the caller does something with one.

    Args:
        db: Database.
        training: The training.
        names: Only these, unless empty.

    Raises:
        NotFound: The training was purged meanwhile.
    """
    async with db.transaction(isolation="repeatable_read") as conn:
        blocks = await series_store.read_blocks(conn, training.id)
    for name in _chosen(blocks, names):
        async with db.connection() as conn:
            column = await series_store.read_column(conn, training.id, name, last_id=blocks.last_id)
        try:
            yield await asyncio.to_thread(blocks.series, name, column)
        except ValueError as error:  # blocks go only with their training
            raise not_found(training.name) from error


def _chosen(blocks: Blocks, names: Sequence[str]) -> list[str]:
    return [name for name in blocks.column_names if not names or name in names]


def check_size(series: Sequence[Series]) -> None:
    """Checks that series fit into one answer.

    Raises:
        ResourceExhausted: TOO_MANY_VALUES.
    """
    if sum(len(one.values_N) for one in series) > _MAX_VALUES:
        raise ResourceExhausted(
            f"the series hold more than {_MAX_VALUES} values; lower max_points, name fewer of them,"
            " or read them as columns (ReadMetricColumns)",
            reason="TOO_MANY_VALUES",
        )
