"""Attempts in Postgres: the records that were applied, checkpoints, predictions."""

from __future__ import annotations

from dataclasses import dataclass

from detflow.events import TooEarly
from detflow.postgres import Connection
from detflow.v1 import events_pb2, training_pb2
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.domain import Training
from services.trainer.store import append_event

_KEPT_CHECKPOINTS = 2  # the newest, and the one before in case it cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedCheckpoint:
    """A checkpoint that no attempt will go on from."""

    training_id: str
    epoch: int
    attempt: int
    object: StoredObject


async def advance_attempt(conn: Connection, training_id: str, attempt: int, seq: int) -> bool:
    """Counts an applied record; False if it was applied before.

    Raises:
        TooEarly: A record before it has not been applied yet.
    """
    last = await last_record(conn, training_id, attempt, lock=True)
    if seq <= last:
        return False
    if seq > last + 1:
        raise TooEarly(f"record {seq} came after {last}")
    await conn.execute(
        "update attempt set last_seq = $3 where training_id = $1 and attempt = $2",
        training_id,
        attempt,
        seq,
    )
    return True


async def last_record(
    conn: Connection, training_id: str, attempt: int, *, lock: bool = False
) -> int:
    """Returns the position of the last record of an attempt that was applied."""
    last: int = await conn.fetchval(
        "select last_seq from attempt where training_id = $1 and attempt = $2"
        + (" for update" if lock else ""),
        training_id,
        attempt,
    )
    return last


async def insert_epoch(
    conn: Connection,
    training: Training,
    metrics: training_pb2.EpochMetrics,
    checkpoint: Checkpoint | None,
) -> None:
    """Keeps what a finished epoch left and announces it."""
    await conn.execute(
        "update training set num_epochs_done = greatest(num_epochs_done, $2) where id = $1",
        training.id,
        metrics.epoch,
    )
    await append_event(conn, training, "epoch_completed", events_pb2.Event(epoch=metrics))
    if checkpoint is not None:
        await conn.execute(
            "insert into checkpoint (training_id, epoch, attempt, object) values ($1, $2, $3, $4)",
            training.id,
            checkpoint.epoch,
            training.attempt,
            checkpoint.object.SerializeToString(),
        )


async def update_unreadable_checkpoint(conn: Connection, training: Training) -> bool:
    """Marks the checkpoint the current attempt began with: the next one takes the one before."""
    row = await conn.fetchrow(
        """
        update checkpoint c set unreadable = true from attempt a
        where a.training_id = $1 and a.attempt = $2
          and c.training_id = $1 and c.epoch = a.checkpoint_epoch and c.attempt < $2
        returning c.epoch
        """,
        training.id,
        training.attempt,
    )
    return row is not None


async def list_unused_checkpoints(conn: Connection) -> list[UnusedCheckpoint]:
    """Reads checkpoints no attempt goes on from: outdated, unreadable or of an ended training."""
    rows = await conn.fetch(
        """
        select training_id, epoch, attempt, object from (
          select c.*, t.state, row_number() over (
            partition by training_id order by unreadable, epoch desc, c.attempt desc) as rank
          from checkpoint c join training t on t.id = c.training_id) as ranked
        where rank > $1 or unreadable or state in ('SUCCEEDED', 'STOPPED')
        limit 100
        """,
        _KEPT_CHECKPOINTS,
    )
    return [
        UnusedCheckpoint(
            training_id=row["training_id"],
            epoch=row["epoch"],
            attempt=row["attempt"],
            object=StoredObject.FromString(row["object"]),
        )
        for row in rows
    ]


async def delete_checkpoint(conn: Connection, checkpoint: UnusedCheckpoint) -> None:
    """Forgets a checkpoint whose object is deleted."""
    await conn.execute(
        "delete from checkpoint where training_id = $1 and epoch = $2 and attempt = $3",
        checkpoint.training_id,
        checkpoint.epoch,
        checkpoint.attempt,
    )


async def insert_log(conn: Connection, training: Training, lines: training_pb2.LogLines) -> None:
    """Announces lines a worker logged."""
    await append_event(conn, training, "logged", events_pb2.Event(log=lines))


async def update_predictions(
    conn: Connection, training: Training, predictions: training_pb2.Predictions
) -> None:
    """Keeps an attempt's predictions and announces them to be measured."""
    await conn.execute(
        "update attempt set predictions = $3, predictions_time = now()"
        " where training_id = $1 and attempt = $2",
        training.id,
        training.attempt,
        predictions.SerializeToString(),
    )
    event = events_pb2.Event(predictions=predictions)
    await append_event(conn, training, "predictions_written", event)


async def update_evaluated(conn: Connection, training: Training, *, val: bool, test: bool) -> bool:
    """Notes that a split of the current attempt was measured; True when both are."""
    both: bool = await conn.fetchval(
        """
        update attempt
        set val_evaluated = val_evaluated or $3, test_evaluated = test_evaluated or $4
        where training_id = $1 and attempt = $2
        returning val_evaluated and test_evaluated
        """,
        training.id,
        training.attempt,
        val,
        test,
    )
    return both


async def predictions_age_seconds(conn: Connection, training: Training) -> float:
    """Returns the age of the current attempt's predictions, by the database's clock."""
    seconds: float = await conn.fetchval(
        "select extract(epoch from now() - predictions_time)::float8 from attempt"
        " where training_id = $1 and attempt = $2",
        training.id,
        training.attempt,
    )
    return seconds
