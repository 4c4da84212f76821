"""Fills the tables of all services with copies of one real version and its training.

The copies differ in their names, figures and times. They lie in one large project, which has a
tenth of them, and in 89 others. Every tenth version has a training with 67 epochs of all its
series. Straight into the tables, without events: a million trainings would take years.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import asyncpg

from detflow.names import last_segment

LARGE = "large"
NUM_TEAMS = 89
NUM_EPOCHS = 67  # of 15 series each: of 100,000 trainings 100 million points
VERSIONS_PER_TRAINING = 10

Connections = Mapping[str, "asyncpg.Connection[asyncpg.Record]"]

_PROJECT = f"case when n % 10 = 0 then '{LARGE}' else 'team-' || n % {NUM_TEAMS} end"
_VERSION = "'dv' || lpad(n::text, 14, '0')"
_TRAINING = "'dt' || lpad((n / 10)::text, 14, '0')"
# Of every ten versions one is trained; which one changes, so that each project has its share.
_TRAINED = "n % 10 = n / 10 % 10"
_QUALITY = "(n::bigint * 7919 % 1000003)::float8 / 1000003"
_TIME = "now() - (10000000 - n) * interval '1 second'"


def project_id(number: int) -> str:
    """Returns the project of a version."""
    return LARGE if number % 10 == 0 else f"team-{number % NUM_TEAMS}"


def version_name(number: int) -> str:
    """Returns the resource name of a version, from 1."""
    return f"projects/{project_id(number)}/versions/dv{number:014}"


def trained(training_number: int) -> int:
    """Returns the version of a training, from 1."""
    return training_number * VERSIONS_PER_TRAINING + training_number % VERSIONS_PER_TRAINING


def training_name(number: int) -> str:
    """Returns the resource name of a training, from 1."""
    return f"{version_name(trained(number))}/trainings/dt{number:014}"


@dataclass(frozen=True, slots=True)
class Sample:
    """What is copied: a version that a training has COMPLETED.

    Attributes:
        training: Its resource name.
    """

    training: str

    @property
    def version(self) -> str:
        """The version's resource name."""
        return self.training.rsplit("/", 2)[0]


async def make_projects(connections: Connections) -> None:
    """Makes the projects."""
    await connections["version"].execute(
        "insert into project (id, display_name) select id, id from unnest($1::text[]) as id",
        [LARGE, *(f"team-{number}" for number in range(NUM_TEAMS))],
    )


async def fill(connections: Connections, sample: Sample, first: int, last: int) -> None:
    """Makes the versions `first` to `last`, which end a ten each, with their trainings.

    Args:
        connections: To the database as superuser, by the service whose schema they use.
        sample: What is copied.
        first: Number of the first version; 1 after a multiple of ten.
        last: Number of the last.
    """
    for conn in connections.values():
        # Copies wake nobody; what rows refer to is there.
        await conn.execute("set session_replication_role = replica")
    await _fill_version(connections["version"], sample, first, last)
    await _fill_preprocess(connections["preprocess"], sample, first, last)
    await _fill_trainer(connections["trainer"], sample, first, last)
    await _fill_metrics(connections["metrics"], sample, first, last)
    for conn in connections.values():
        await conn.execute("vacuum analyze")


async def _fill_version(
    conn: asyncpg.Connection[asyncpg.Record], sample: Sample, first: int, last: int
) -> None:
    version_id = last_segment(sample.version)
    when_trained = {
        column: f"case when {_TRAINED} then {value} end"
        for column, value in {
            "training_id": _TRAINING,
            "metrics_training_id": _TRAINING,
            "run_time": _TIME,
            "map50": _QUALITY,
            "map50_95": f"{_QUALITY} * 0.6",
            "precision": f"1 - {_QUALITY} / 2",
            "recall": f"{_QUALITY} * 0.9",
        }.items()
    }
    name = "'V_' || n"
    await _copy(
        conn,
        "version",
        f"id = '{version_id}'",
        first,
        last,
        {
            "id": _VERSION,
            "project_id": _PROJECT,
            "display_name": name,
            "name_key": name,
            "state": f"case when {_TRAINED} then 'COMPLETED' else 'READY' end",
            "labels": "jsonb_build_object('site', 'hall-' || n / 10 % 50)",
            "request_id": "null",
            "create_time": _TIME,
            "update_time": _TIME,
            **when_trained,
        },
    )
    of_training = {"training_id": _TRAINING, "version_id": _VERSION}
    for table in ("version_training", "version_evaluation"):
        await _copy(
            conn, table, f"version_id = '{version_id}'", first, last, of_training, where=_TRAINED
        )
    await _copy_seq(conn, "version", version_id, _VERSION, first, last)


async def _fill_preprocess(
    conn: asyncpg.Connection[asyncpg.Record], sample: Sample, first: int, last: int
) -> None:
    version_id = last_segment(sample.version)
    name = f"'projects/' || {_PROJECT} || '/versions/' || {_VERSION}"
    for table in ("preprocessing", "shard", "bundle_object", "leak_report"):
        changes = {"version_id": _VERSION}
        if table == "preprocessing":
            changes |= {"version_name": name, "create_time": _TIME, "end_time": _TIME}
        await _copy(conn, table, f"version_id = '{version_id}'", first, last, changes)
    await _copy_seq(conn, "preprocessing", version_id, _VERSION, first, last)


async def _fill_trainer(
    conn: asyncpg.Connection[asyncpg.Record], sample: Sample, first: int, last: int
) -> None:
    training_id = last_segment(sample.training)
    times = {"create_time": _TIME, "start_time": _TIME, "end_time": _TIME}
    await _copy(
        conn,
        "training",
        f"id = '{training_id}'",
        first,
        last,
        {
            "id": _TRAINING,
            "project": _PROJECT,
            "version": _VERSION,
            "request_id": "null",
            "epochs": str(NUM_EPOCHS),
            "num_epochs_done": str(NUM_EPOCHS),
            **times,
        },
        where=_TRAINED,
    )
    await _copy(
        conn,
        "attempt",
        f"training_id = '{training_id}'",
        first,
        last,
        {"training_id": _TRAINING, "start_time": _TIME, "end_time": _TIME},
        where=_TRAINED,
    )
    await _copy_seq(conn, "training", training_id, _TRAINING, first, last, where=_TRAINED)


async def _fill_metrics(
    conn: asyncpg.Connection[asyncpg.Record], sample: Sample, first: int, last: int
) -> None:
    training_id = last_segment(sample.training)
    name = (
        f"'projects/' || {_PROJECT} || '/versions/' || {_VERSION} || '/trainings/' || {_TRAINING}"
    )
    await _copy(
        conn,
        "training",
        f"id = '{training_id}'",
        first,
        last,
        {"id": _TRAINING, "project_id": _PROJECT, "name": name},
        where=_TRAINED,
    )
    of_training = {"training_id": _TRAINING}
    for table in ("series_names", "evaluation"):
        await _copy(
            conn, table, f"training_id = '{training_id}'", first, last, of_training, where=_TRAINED
        )
    # Epoch by epoch, as trainings that run at the same time would write them.
    for epoch in range(1, NUM_EPOCHS + 1):
        await _copy(
            conn,
            "epoch_row",
            f"training_id = '{training_id}' and epoch = 1",
            first,
            last,
            of_training | {"epoch": str(epoch)},
            where=_TRAINED,
        )
    await _copy_seq(conn, "evaluation", training_id, _TRAINING, first, last, where=_TRAINED)


async def _copy_seq(
    conn: asyncpg.Connection[asyncpg.Record],
    kind: str,
    sample_id: str,
    new_id: str,
    first: int,
    last: int,
    where: str = "true",
) -> None:
    """Copies how many events a resource had; those themselves are kept for days only."""
    await _copy(
        conn,
        "outbox_seq",
        f"resource = '{kind}.{sample_id}'",
        first,
        last,
        {"resource": f"'{kind}.' || {new_id}"},
        where=where,
    )


async def _copy(
    conn: asyncpg.Connection[asyncpg.Record],
    table: str,
    which: str,
    first: int,
    last: int,
    changes: Mapping[str, str],
    where: str = "true",
) -> None:
    """Copies rows of a table once for each number `n` that `where` holds for.

    Args:
        conn: Connection; the table is of its schema.
        table: Name of the table.
        which: SQL of the rows that are copied.
        first: First number.
        last: Last number.
        changes: By column the SQL of its new value, of `n`.
        where: SQL of the numbers, of `n`.
    """
    columns = [
        row["column_name"]
        for row in await conn.fetch(
            "select column_name from information_schema.columns"
            " where table_schema = current_schema and table_name = $1"
            " and is_generated = 'NEVER' and is_identity = 'NO' order by ordinal_position",
            table,
        )
    ]
    assert changes.keys() <= set(columns), changes.keys() - set(columns)
    await conn.execute(
        f"insert into {table} ({', '.join(columns)})"
        f" select {', '.join(changes.get(c, f's.{c}') for c in columns)}"
        f" from generate_series({first}, {last}) as n, (select * from {table} where {which}) as s"
        f" where {where}"
    )
