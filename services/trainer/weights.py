"""Uploaded weights in Postgres, and as the API shows them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from detflow.errors import FailedPrecondition, not_found
from detflow.names import last_segment, project_of
from detflow.postgres import Connection
from detflow.times import timestamp
from detflow.v1 import weights_pb2
from detflow.v1.common_pb2 import StoredObject
from services.trainer.domain import LIVE, training_name

_UNSTORED_DAYS = 1
"""After which an object that was to be stored is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Uploaded weights.

    Attributes:
        id: Id.
        project: Id of the project.
        display_name: Name shown to people.
        model: Id of the model they were trained with; empty if the file does not say.
        class_names: Classes they were trained for, if the file says.
        num_tensors: Tensors in the file.
        num_parameters: Numbers in all tensors.
        object: The file.
        create_time: When they were uploaded.
    """

    id: str
    project: str
    display_name: str
    model: str
    class_names: Sequence[str]
    num_tensors: int
    num_parameters: int
    object: StoredObject
    create_time: datetime.datetime

    @property
    def name(self) -> str:
        """Resource name."""
        return f"projects/{self.project}/weights/{self.id}"


def object_key(weights_id: str) -> str:
    """Returns where the file is stored."""
    return f"weights/{weights_id}"


def to_message(weights: Weights) -> weights_pb2.Weights:
    """Returns weights as the API shows them."""
    return weights_pb2.Weights(
        name=weights.name,
        display_name=weights.display_name,
        model=weights.model,
        class_names=weights.class_names,
        num_tensors=weights.num_tensors,
        num_parameters=weights.num_parameters,
        size_bytes=weights.object.size_bytes,
        sha256=weights.object.sha256,
        create_time=timestamp(weights.create_time),
    )


def _from_row(row: asyncpg.Record) -> Weights:
    return Weights(
        id=row["id"],
        project=row["project"],
        display_name=row["display_name"],
        model=row["model"],
        class_names=row["class_names"],
        num_tensors=row["num_tensors"],
        num_parameters=row["num_parameters"],
        object=StoredObject.FromString(row["object"]),
        create_time=row["create_time"],
    )


async def insert_weights(
    conn: Connection, *, weights_id: str, project: str, found: weights_pb2.Weights
) -> None:
    """Notes what is about to be stored; nobody sees it yet.

    Args:
        conn: Connection in a transaction.
        weights_id: Id.
        project: Id of the project.
        found: Display name, and what the file holds.
    """
    await conn.execute(
        "insert into weights (id, project, display_name, model, class_names, num_tensors,"
        " num_parameters, object) values ($1, $2, $3, $4, $5, $6, $7, $8)",
        weights_id,
        project,
        found.display_name,
        found.model,
        list(found.class_names),
        found.num_tensors,
        found.num_parameters,
        StoredObject(key=object_key(weights_id)).SerializeToString(),
    )


async def update_stored(conn: Connection, weights_id: str, stored: StoredObject) -> Weights:
    """Shows weights whose file is stored."""
    row = await conn.fetchrow(
        "update weights set state = 'STORED', object = $2 where id = $1 returning *",
        weights_id,
        stored.SerializeToString(),
    )
    assert row is not None  # given up only after a day
    return _from_row(row)


async def get_weights(conn: Connection, name: str, *, lock: bool = False) -> Weights:
    """Reads weights by their name; `lock` keeps them from being deleted meanwhile.

    Raises:
        NotFound: There are none, or in another project.
    """
    row = await conn.fetchrow(
        "select * from weights where id = $1 and project = $2 and state = 'STORED'"
        + (" for update" if lock else ""),
        last_segment(name),
        project_of(name),
    )
    if row is None:
        raise not_found(name)
    return _from_row(row)


async def list_weights(
    conn: Connection, *, project: str, before: str | None, limit: int
) -> list[Weights]:
    """Reads a project's weights, newest first, older than `before`."""
    rows = await conn.fetch(
        "select * from weights where project = $1 and state = 'STORED'"
        " and ($2::text is null or id < $2) order by id desc limit $3",
        project,
        before,
        limit,
    )
    return [_from_row(row) for row in rows]


async def delete_weights(conn: Connection, name: str) -> None:
    """Deletes weights; their object follows.

    Raises:
        NotFound: There are none.
        FailedPrecondition: WEIGHTS_IN_USE, a training is still to take them over.
    """
    weights = await get_weights(conn, name, lock=True)
    user = await conn.fetchrow(
        "select project, version, id from training t where warm_start_id = $1"
        " and state = any($2) and not exists (select from checkpoint where training_id = t.id)"
        " limit 1",
        weights.id,
        list(LIVE),
    )
    if user is not None:
        training = training_name(user["project"], user["version"], user["id"])
        raise FailedPrecondition(
            f"{training} is to begin with {name}; wait until it has finished an epoch, or stop it",
            reason="WEIGHTS_IN_USE",
            metadata={"training": training},
        )
    await conn.execute("update weights set state = 'DELETED' where id = $1", weights.id)


async def list_unstored(conn: Connection) -> list[Weights]:
    """Reads weights whose objects have to go: deleted ones, and those that were never shown."""
    rows = await conn.fetch(
        "select * from weights where state = 'DELETED'"
        " or (state = 'STORING' and create_time < now() - make_interval(days => $1)) limit 100",
        _UNSTORED_DAYS,
    )
    return [_from_row(row) for row in rows]


async def forget_weights(conn: Connection, weights_id: str) -> None:
    """Forgets weights whose object is gone."""
    await conn.execute("delete from weights where id = $1 and state <> 'STORED'", weights_id)


async def is_there(conn: Connection, name: str) -> bool:
    """Says whether weights are there, whoever asks."""
    there: bool = await conn.fetchval(
        "select exists (select from weights where id = $1 and state = 'STORED')",
        last_segment(name),
    )
    return there
