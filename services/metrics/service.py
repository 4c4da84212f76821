"""The MetricsService servicer: series and evaluations of trainings, read and watched."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from detflow import names, outbox
from detflow.errors import Unavailable
from detflow.events import Bus
from detflow.postgres import Database
from detflow.tasks import Bell, wait
from detflow.v1 import common_pb2, metrics_pb2, metrics_pb2_grpc
from detflow.watch import HEARTBEAT_SECONDS, Change, Snapshot, Watcher
from services.metrics import store
from services.metrics.domain import (
    Applied,
    Evaluation,
    Measurement,
    TrainingState,
    is_finished,
)
from services.metrics.series import Series
from services.metrics.series_reader import (
    check_size,
    iterate_step_series,
    read_epoch_series,
    read_step_series,
)

_SPLITS = {"val": common_pb2.SPLIT_VAL, "test": common_pb2.SPLIT_TEST}
_CATCH_UP_SECONDS = 5.0
_HOLE_SECONDS = 1.0
_LOOK_AGAIN_SECONDS = 0.2
_LAST_BEAT_SECONDS = 1.0
_STEP_POINTS = 1000
"""Values of a series by step, unless it is said how many."""
_COLUMN_POINTS = 40_000
"""Values in one message of columns: 24 bytes each."""


class MetricsService(metrics_pb2_grpc.MetricsServiceServicer):
    """Answers from the service's own tables.

    Args:
        db: Database of the service.
        bus: To ask how far a training's events have come.
        watcher: Fan-out of the event stream.
        applied: Rung when an event of a training was applied.
    """

    def __init__(self, db: Database, bus: Bus, watcher: Watcher, applied: Bell) -> None:
        self._db = db
        self._bus = bus
        self._watcher = watcher
        self._applied = applied

    async def ListMetricSeries(
        self, request: metrics_pb2.ListMetricSeriesRequest, context: Any
    ) -> metrics_pb2.ListMetricSeriesResponse:
        """The series of a training, sorted by name."""
        async with self._db.transaction(isolation="repeatable_read") as conn:
            training = await store.find_training(conn, request.training)
            if request.resolution == metrics_pb2.RESOLUTION_STEP:
                max_points = request.max_points or _STEP_POINTS
                found = await read_step_series(conn, training, request.names, max_points=max_points)
            else:
                found = await read_epoch_series(
                    conn, training, request.names, max_points=request.max_points
                )
        check_size(found)
        return metrics_pb2.ListMetricSeriesResponse(series=map(to_metric_series, found))

    async def ReadMetricColumns(
        self, request: metrics_pb2.ReadMetricColumnsRequest, context: Any
    ) -> AsyncIterator[metrics_pb2.MetricColumns]:
        """Whole series as binary columns, sorted by name."""
        async with self._db.connection() as conn:
            training = await store.find_training(conn, request.training)
        if request.resolution == metrics_pb2.RESOLUTION_STEP:
            async for one in iterate_step_series(self._db, training, request.names):
                for part in to_metric_columns(one):
                    yield part
            return
        async with self._db.transaction(isolation="repeatable_read") as conn:
            found = await read_epoch_series(conn, training, request.names)
        for one in found:
            for part in to_metric_columns(one):
                yield part

    async def GetEvaluation(
        self, request: metrics_pb2.GetEvaluationRequest, context: Any
    ) -> metrics_pb2.Evaluation:
        """One evaluation."""
        parent, split = request.name.rsplit("/evaluations/", 1)
        async with self._db.connection() as conn:
            return to_evaluation(await store.find_evaluation(conn, parent, split))

    async def ListEvaluations(
        self, request: metrics_pb2.ListEvaluationsRequest, context: Any
    ) -> metrics_pb2.ListEvaluationsResponse:
        """The evaluations of a training: validation, then test."""
        async with self._db.connection() as conn:
            training = await store.find_training(conn, request.parent)
            evaluations = await store.list_evaluations(conn, training)
        return metrics_pb2.ListEvaluationsResponse(
            evaluations=[to_evaluation(evaluation) for evaluation in evaluations]
        )

    async def WatchMetrics(
        self, request: metrics_pb2.WatchMetricsRequest, context: Any
    ) -> AsyncIterator[metrics_pb2.WatchMetricsResponse]:
        """What there is, then steps, epochs and evaluations until nothing more will be measured."""
        training_id = names.last_segment(request.training)
        await self._catch_up(request.training)
        async with self._db.connection() as conn:
            await store.find_training(conn, request.training)
        # Who resumes after the last message gets no other: then silence tells that it was the last.
        at_end = bool(request.cursor) and await self._is_over(training_id)

        async def snapshot() -> Snapshot[tuple[metrics_pb2.MetricsSnapshot, bool]]:
            # Events up to here are not sent as changes, so the snapshot must hold them.
            await self._catch_up(request.training)
            return await self._read_snapshot(request)

        items = self._watcher.follow(
            subjects=[
                f"detflow.v1.training.{training_id}.epoch_completed",
                f"detflow.v1.training.{training_id}.state_changed",
                f"detflow.v1.evaluation.{training_id}.completed",
                *([f"detflow.v1.training.{training_id}.steps_completed"] * request.with_steps),
            ],
            cursor=request.cursor,
            snapshot=snapshot,
            heartbeat_seconds=_LAST_BEAT_SECONDS if at_end else HEARTBEAT_SECONDS,
        )
        async with contextlib.aclosing(items):
            async for item in items:
                response = metrics_pb2.WatchMetricsResponse(cursor=item.cursor)
                if isinstance(item, Snapshot):
                    snapshot_message, is_last = item.value
                    response.snapshot.CopyFrom(snapshot_message)
                    yield response
                elif isinstance(item, Change):
                    if _fill(response, item):
                        yield response
                    is_last = await self._is_last(training_id, item)
                else:
                    is_last = at_end and await self._is_over(training_id)
                    if not is_last:
                        response.heartbeat.SetInParent()
                        yield response
                if is_last:
                    return

    async def _catch_up(self, name: str) -> None:
        """Waits until what the stream holds of a training has been applied here or at a replica.

        Raises:
            Unavailable: It takes too long; or NATS or the database is away.
        """
        training_id, version_id = names.last_segment(name), name.split("/")[3]
        last = await self._bus.last_seq(f"detflow.v1.training.{training_id}.>")
        start = time.monotonic()
        while True:
            heard = self._applied.listen()
            async with self._db.connection() as conn:
                training = await store.get_training(conn, training_id)
                if training is None and await store.is_purged(conn, version_id):
                    return
            applied = training.applied if training else Applied()
            waited = time.monotonic() - start
            if applied.seq >= last:
                return
            if applied.highest >= last and waited >= _HOLE_SECONDS:
                return  # what is missing in between cannot be applied or has left the stream
            if waited >= _CATCH_UP_SECONDS:
                raise Unavailable("metrics are behind for the moment; retry", reason="BEHIND")
            await wait(heard, _LOOK_AGAIN_SECONDS)

    async def _read_snapshot(
        self, request: metrics_pb2.WatchMetricsRequest
    ) -> Snapshot[tuple[metrics_pb2.MetricsSnapshot, bool]]:
        max_points = request.max_points or _STEP_POINTS
        async with self._db.transaction(isolation="repeatable_read") as conn:
            training = await store.find_training(conn, request.training)
            by_epoch = await read_epoch_series(conn, training)
            by_step = (
                await read_step_series(conn, training, max_points=max_points)
                if request.with_steps
                else []
            )
            evaluations = await store.list_evaluations(conn, training)
            seqs = await outbox.last_seqs(conn, [f"evaluation.{training.id}"])
        check_size([*by_epoch, *by_step])
        message = metrics_pb2.MetricsSnapshot(
            series=map(to_metric_series, by_epoch),
            evaluations=[to_evaluation(evaluation) for evaluation in evaluations],
            step_series=map(to_metric_series, by_step),
        )
        seqs[f"training.{training.id}"] = training.applied.seq
        return Snapshot((message, is_finished(training, evaluations)), seqs)

    async def _is_over(self, training_id: str) -> bool:
        """Says whether nothing more will be measured and all of it is in the stream."""
        subject = f"evaluation.{training_id}"
        published = await self._bus.last_seq(f"detflow.v1.{subject}.>")
        async with self._db.transaction(isolation="repeatable_read") as conn:
            training = await store.get_training(conn, training_id)
            if training is None:
                return False
            evaluations = await store.list_evaluations(conn, training)
            seqs = await outbox.last_seqs(conn, [subject])
        return is_finished(training, evaluations) and published >= seqs.get(subject, 0)

    async def _is_last(self, training_id: str, change: Change) -> bool:
        """Says whether nothing will follow a change, as far as is known now."""
        if change.what in ("epoch_completed", "steps_completed"):
            return False
        async with self._db.transaction(isolation="repeatable_read") as conn:
            training = await store.get_training(conn, training_id)
            if training is None:
                return False
            evaluations = await store.list_evaluations(conn, training)
            seqs = await outbox.last_seqs(conn, [f"evaluation.{training_id}"])
        if change.kind == "training":
            reported = change.event.training
            is_at_rest = TrainingState(reported.state).is_at_rest
            return is_at_rest and reported.revision >= training.revision
        is_newest = change.seq >= seqs.get(f"evaluation.{training_id}", 0)
        return is_newest and is_finished(training, evaluations)


def _fill(response: metrics_pb2.WatchMetricsResponse, change: Change) -> bool:
    """Puts a change into a response; False if it is none for the caller."""
    if change.what == "epoch_completed":
        epoch = change.event.epoch
        response.points.CopyFrom(
            metrics_pb2.MetricPoints(epoch=epoch.epoch, values=epoch.values, attempt=epoch.attempt)
        )
    elif change.what == "steps_completed":
        response.steps.CopyFrom(change.event.steps)
    elif change.kind == "evaluation":
        response.evaluation.CopyFrom(change.event.evaluation)
    else:
        return False
    return True


def to_metric_series(series: Series) -> metrics_pb2.MetricSeries:
    """Makes the message of a series."""
    by_epoch = series.steps_N is None
    return metrics_pb2.MetricSeries(
        name=series.name,
        epochs=series.epochs_N.tolist() if by_epoch else (),
        positions=() if by_epoch else series.positions_N.tolist(),
        values=series.values_N.tolist(),
        num_points=series.num_points,
    )


def to_metric_columns(series: Series) -> Iterator[metrics_pb2.MetricColumns]:
    """Makes the messages of a series, each of less than a MiB."""
    for first in range(0, len(series.values_N), _COLUMN_POINTS):
        part = slice(first, first + _COLUMN_POINTS)
        message = metrics_pb2.MetricColumns(
            name=series.name,
            num_points=len(series.values_N[part]),
            epochs=series.epochs_N[part].astype("<i4").tobytes(),
            values=series.values_N[part].astype("<f8", copy=False).tobytes(),
        )
        if series.steps_N is not None:
            message.steps = series.steps_N[part].astype("<i4").tobytes()
            message.positions = series.positions_N[part].astype("<f8", copy=False).tobytes()
        yield message


def to_evaluation(evaluation: Evaluation) -> metrics_pb2.Evaluation:
    """Makes the message of an evaluation."""
    message = metrics_pb2.Evaluation(
        name=f"{evaluation.training}/evaluations/{evaluation.split}",
        split=_SPLITS[evaluation.split],
        attempt=evaluation.attempt,
        ground_truth_sha256=evaluation.ground_truth_sha256,
    )
    message.create_time.FromDatetime(evaluation.create_time)
    if evaluation.failure is not None:
        message.state = metrics_pb2.Evaluation.FAILED
        message.failure.ParseFromString(evaluation.failure)
    if evaluation.measurement is not None:
        message.state = metrics_pb2.Evaluation.SUCCEEDED
        _fill_figures(message, evaluation.measurement)
    return message


def _fill_figures(message: metrics_pb2.Evaluation, measurement: Measurement) -> None:
    message.coco.CopyFrom(metrics_pb2.CocoSummary(**dataclasses.asdict(measurement.coco)))
    if measurement.best_f1 is not None:
        message.best_f1.CopyFrom(
            metrics_pb2.OperatingPoint(**dataclasses.asdict(measurement.best_f1))
        )
    message.classes.extend(
        metrics_pb2.ClassMetrics(**dataclasses.asdict(figures)) for figures in measurement.classes
    )
    message.num_images = measurement.num_images
    message.num_ground_truths = measurement.num_ground_truths
    message.num_predictions = measurement.num_predictions
