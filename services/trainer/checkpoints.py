"""Checkpoints in Postgres: which there are, and which no attempt will go on from."""

from __future__ import annotations

from dataclasses import dataclass

from detflow.postgres import Connection
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.domain import Training

_NUM_KEPT = 2  # the newest, and the one before in case it cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedCheckpoint:
    """A checkpoint that no attempt will go on from."""

    training_id: str
    epoch: int
    step: int
    attempt: int
    object: StoredObject


async def insert_checkpoint(conn: Connection, training: Training, checkpoint: Checkpoint) -> None:
    """Keeps a checkpoint of the current attempt; those it replaces are not used any more."""
    await conn.execute(
        "insert into checkpoint (training_id, epoch, step, attempt, object)"
        " values ($1, $2, $3, $4, $5)",
        training.id,
        checkpoint.epoch,
        checkpoint.step,
        training.attempt,
        checkpoint.object.SerializeToString(),
    )
    await conn.execute(
        """
        update checkpoint set unused = true
        where training_id = $1 and not unused and (epoch, step, attempt) in (
          select epoch, step, attempt from checkpoint where training_id = $1 and not unreadable
          order by epoch desc, step desc, attempt desc offset $2)
        """,
        training.id,
        _NUM_KEPT,
    )


async def get_newest(conn: Connection, training_id: str) -> Checkpoint | None:
    """Reads the checkpoint that the next attempt goes on from."""
    row = await conn.fetchrow(
        "select epoch, step, object from checkpoint where training_id = $1 and not unreadable"
        " order by epoch desc, step desc, attempt desc limit 1",
        training_id,
    )
    if row is None:
        return None
    stored = StoredObject.FromString(row["object"])
    return Checkpoint(epoch=row["epoch"], step=row["step"], object=stored)


async def update_unreadable_checkpoint(conn: Connection, training: Training) -> bool:
    """Marks the checkpoint the current attempt began with: the next one takes the one before."""
    row = await conn.fetchrow(
        """
        update checkpoint c set unreadable = true, unused = true from attempt a
        where a.training_id = $1 and a.attempt = $2
          and c.training_id = $1 and (c.epoch, c.step) = (a.checkpoint_epoch, a.checkpoint_step)
          and c.attempt < $2
        returning c.epoch
        """,
        training.id,
        training.attempt,
    )
    return row is not None


async def list_unused(conn: Connection) -> list[UnusedCheckpoint]:
    """Reads checkpoints no attempt goes on from: outdated, unreadable or of an ended training."""
    rows = await conn.fetch(
        "select training_id, epoch, step, attempt, object from checkpoint where unused limit 100"
    )
    return [
        UnusedCheckpoint(
            training_id=row["training_id"],
            epoch=row["epoch"],
            step=row["step"],
            attempt=row["attempt"],
            object=StoredObject.FromString(row["object"]),
        )
        for row in rows
    ]


async def delete_checkpoint(conn: Connection, checkpoint: UnusedCheckpoint) -> None:
    """Forgets a checkpoint whose object is deleted."""
    await conn.execute(
        "delete from checkpoint where training_id = $1 and epoch = $2 and step = $3"
        " and attempt = $4",
        checkpoint.training_id,
        checkpoint.epoch,
        checkpoint.step,
        checkpoint.attempt,
    )
