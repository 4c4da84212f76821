"""Attempts in Postgres: the records that were applied, epochs, predictions."""

from __future__ import annotations

from dataclasses import dataclass

from detflow.consumer import list_dead
from detflow.events import TooEarly
from detflow.postgres import Connection
from detflow.v1 import events_pb2, training_pb2
from detflow.v1.common_pb2 import StoredObject
from services.trainer.domain import Training
from services.trainer.store import append_event

_LAST_WRITES_SECONDS = 60.0

RECORDS_CONSUMER = "trainer-records"
"""Durable name of what applies the records; their event ids are training/attempt/seq."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedAttempt:
    """An attempt whose worker is gone.

    Attributes:
        prefix: Of the keys of what it has stored, without the last slash.
        recorded: The keys of these that are known, and stay as long as what they belong to.
    """

    training_id: str
    attempt: int
    prefix: str
    recorded: frozenset[str]


async def advance_attempt(conn: Connection, training_id: str, attempt: int, seq: int) -> bool:
    """Counts an applied record; False if it was applied before.

    Raises:
        TooEarly: A record before it, which may still come, has not been applied yet.
    """
    last = await last_record(conn, training_id, attempt, lock=True)
    if seq <= last:
        return False
    if seq > last + 1:
        missing = {f"{training_id}/{attempt}/{number}" for number in range(last + 1, seq)}
        if missing - set(await list_dead(conn, RECORDS_CONSUMER, f"{training_id}.{attempt}")):
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
    conn: Connection, training: Training, metrics: training_pb2.EpochMetrics
) -> None:
    """Notes a finished epoch and announces it."""
    await conn.execute(
        "update training set num_epochs_done = greatest(num_epochs_done, $2) where id = $1",
        training.id,
        metrics.epoch,
    )
    await append_event(conn, training, "epoch_completed", events_pb2.Event(epoch=metrics))


async def insert_steps(
    conn: Connection, training: Training, steps: training_pb2.StepMetrics
) -> None:
    """Announces what was measured in steps."""
    await append_event(conn, training, "steps_completed", events_pb2.Event(steps=steps))


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


async def list_unswept(conn: Connection) -> list[EndedAttempt]:
    """Reads attempts that have ended and may have left something, a hundred at most."""
    rows = await conn.fetch(
        """
        select a.training_id, a.attempt, a.predictions, t.weights is not null as has_weights,
          array(select object from checkpoint c
            where c.training_id = a.training_id and c.attempt = a.attempt) as checkpoints
        from attempt a join training t on t.id = a.training_id
        where a.end_time is not null and not a.swept limit 100
        """
    )
    return [
        EndedAttempt(
            training_id=row["training_id"],
            attempt=row["attempt"],
            prefix=prefix,
            recorded=frozenset(
                [
                    *(StoredObject.FromString(one).key for one in row["checkpoints"]),
                    *_keys_of(row["predictions"]),
                    # An older attempt's may be what another training begins with.
                    *([f"{prefix}/best.pt"] if row["has_weights"] else []),
                ]
            ),
        )
        for row in rows
        for prefix in [f"trainings/{row['training_id']}/{row['attempt']}"]
    ]


def _keys_of(predictions: bytes | None) -> list[str]:
    found = training_pb2.Predictions.FromString(predictions or b"")
    return [found.val.key, found.test.key]


async def update_swept(conn: Connection, ended: EndedAttempt) -> None:
    """Notes that nothing of an attempt is left but what is recorded, and that no more will come.

    A worker on a machine that was given up writes on until it hears that it has no say any more.
    """
    await conn.execute(
        "update attempt set swept = true where training_id = $1 and attempt = $2"
        " and end_time < now() - make_interval(secs => $3)",
        ended.training_id,
        ended.attempt,
        _LAST_WRITES_SECONDS,
    )
