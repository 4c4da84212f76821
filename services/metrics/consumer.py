"""What the metrics service does when a training reports something, or its version is purged."""

from __future__ import annotations

import dataclasses

from detflow import names, telemetry
from detflow.consumer import AfterCommit
from detflow.events import Delivered
from detflow.postgres import Connection
from detflow.tasks import Bell
from detflow.v1 import events_pb2, training_pb2
from services.metrics import series_store, store
from services.metrics.domain import SPLITS, Training, TrainingState

log = telemetry.get_logger(__name__)

CONSUMER = "metrics-training"
SUBJECTS = ("detflow.v1.training.>", "detflow.v1.version.*.purged")
"""Every event of a training, log lines too: only so is it known which of them are applied."""


class TrainingEvents:
    """Applies the events of trainings, each once, in whatever order they come.

    Args:
        applied: Rung when an event was applied.
        jobs: Rung when there is something to measure.
    """

    def __init__(self, applied: Bell, jobs: Bell) -> None:
        self._applied = applied
        self._jobs = jobs

    async def handle(
        self, conn: Connection, delivered: Delivered[events_pb2.Event]
    ) -> AfterCommit | None:
        """Applies one event in the caller's transaction."""
        if delivered.kind == "version":
            await store.purge_version(conn, delivered.resource_id)
            return self._applied.ring
        training = await store.lock_training(
            conn,
            training_id=delivered.resource_id,
            project_id=names.project_of(delivered.name),
            name=delivered.name,
        )
        if training is None:
            return None
        event, bell = delivered.message, self._applied
        what = event.WhichOneof("what")
        if what == "training":
            training = await _apply_state(conn, training, event.training)
        elif what == "epoch":
            training = _with_attempt(training, event.epoch.attempt)
            await series_store.insert_epoch(
                conn,
                training_id=training.id,
                attempt=event.epoch.attempt,
                epoch=event.epoch.epoch,
                values=event.epoch.values,
            )
        elif what == "steps":
            training = _with_attempt(training, event.steps.attempt)
            await series_store.insert_steps(
                conn,
                training_id=training.id,
                attempt=event.steps.attempt,
                epoch=event.steps.epoch,
                first_step=event.steps.first_step,
                num_steps=event.steps.num_steps,
                columns={column.name: column.values for column in event.steps.columns},
            )
        elif what == "predictions":
            is_wanted = _is_wanted(training, event.predictions.attempt)
            training = _with_attempt(training, event.predictions.attempt)
            if is_wanted:
                await _queue(
                    conn, training, event.predictions, delivered.carrier.get("traceparent", "")
                )
                bell = self._jobs
        await store.update_training(
            conn, dataclasses.replace(training, applied=training.applied.add(delivered.seq))
        )
        if bell is self._jobs:
            return self._ring_both
        return self._applied.ring

    async def _ring_both(self) -> None:
        await self._applied.ring()
        await self._jobs.ring()


async def _apply_state(
    conn: Connection, training: Training, reported: training_pb2.Training
) -> Training:
    training = _with_attempt(training, reported.attempt)
    state = TrainingState(reported.state)
    if state.is_at_rest:
        # Nobody waits for these figures any more, even if this comes late; finished ones stay.
        await store.delete_jobs(conn, training_id=training.id, up_to_attempt=reported.attempt)
    if reported.revision <= training.revision:
        return training
    return dataclasses.replace(
        training,
        state=state,
        revision=reported.revision,
        message=reported.SerializeToString(deterministic=True),
    )


def _is_wanted(training: Training, attempt: int) -> bool:
    """Says whether somebody waits for the figures of an attempt: not if it is known to have ended.

    Its predictions may come after its end, when an event is delivered for the second time.
    """
    if not training.state.is_at_rest:
        return True
    return attempt > training_pb2.Training.FromString(training.message).attempt


def _with_attempt(training: Training, attempt: int) -> Training:
    return dataclasses.replace(training, attempt=max(training.attempt, attempt))


async def _queue(
    conn: Connection, training: Training, predictions: training_pb2.Predictions, traceparent: str
) -> None:
    for split in SPLITS:
        await store.insert_job(
            conn,
            training_id=training.id,
            attempt=predictions.attempt,
            split=split,
            manifest=predictions.manifest.SerializeToString(),
            predictions=getattr(predictions, split).SerializeToString(),
            traceparent=traceparent,
        )
