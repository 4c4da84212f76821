"""The ComparisonService servicer: trainings compared, with intervals."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeAlias

from detflow import names
from detflow.errors import DeadlineExceeded, FailedPrecondition, bad_field
from detflow.postgres import Database
from detflow.v1 import common_pb2, comparison_pb2, comparison_pb2_grpc, training_pb2
from detflow.v1.common_pb2 import StoredObject
from services.metrics import store
from services.metrics.comparison import Compared, Delta, compare, difference, differing_parameters
from services.metrics.measured import Measured, MeasuredSplits
from services.metrics.service import to_evaluation

Comparison = comparison_pb2.Comparison

_DEFAULT_RESAMPLES = 1000
_DEFAULT_LEVEL = 0.95
_MAX_KEPT = 32
_MAX_SECONDS = 50.0  # less than a call may take, so that the answer says what to do
_MAX_DRAWN = 50_000_000  # figures of classes, 4 bytes each
_SPLITS = {common_pb2.SPLIT_VAL: "val", common_pb2.SPLIT_TEST: "test"}
_Key: TypeAlias = tuple[tuple[str, ...], int, float, int]


class ComparisonService(comparison_pb2_grpc.ComparisonServiceServicer):
    """Compares measured splits, one comparison at a time, and keeps those made last.

    Args:
        db: Database of the service.
        splits: Where measured splits are read.
    """

    def __init__(self, db: Database, splits: MeasuredSplits) -> None:
        self._db = db
        self._splits = splits
        self._kept: OrderedDict[_Key, Compared] = OrderedDict()
        self._turn = asyncio.Lock()  # a comparison takes a whole core for seconds

    async def CompareTrainings(
        self, request: comparison_pb2.CompareTrainingsRequest, context: Any
    ) -> Comparison:
        """Trainings of one project against the first of them."""
        for number, training in enumerate(request.trainings):
            if names.project_of(training) != names.last_segment(request.parent):
                raise bad_field(
                    f"trainings[{number}]",
                    "OTHER_PROJECT",
                    f"{training} is not in {request.parent}; compare trainings of one project",
                )
        return await self.compare(
            request.trainings,
            request.split,
            num_resamples=request.num_resamples,
            confidence_level=request.confidence_level,
            seed=request.seed,
        )

    async def compare(
        self,
        trainings: Sequence[str],
        split: common_pb2.Split.ValueType = common_pb2.SPLIT_TEST,
        *,
        num_resamples: int = 0,
        confidence_level: float = 0.0,
        seed: int = 0,
    ) -> Comparison:
        """Compares trainings with the first of them.

        Args:
            trainings: Resource names, at least two, none twice.
            split: Validation or test; not stated means test.
            num_resamples: Draws of the bootstrap; 0 means 1000.
            confidence_level: What share of the draws an interval holds; 0 means 0.95.
            seed: The same one gives the same draws.

        Raises:
            NotFound: A training is not there, or not evaluated on this split.
            FailedPrecondition: DIFFERENT_DATA: they were measured on other images or boxes;
                EVALUATION_FAILED; or NO_MATCHES: an earlier release measured one.
            InvalidArgument: It would take too much memory.
            DeadlineExceeded: TOO_SLOW: so many resamples take more than 50 s.
            DataLoss: What was stored of an evaluation is gone or damaged.
            Unavailable: The database or the object store is away.
        """
        split = split or common_pb2.SPLIT_TEST
        num_resamples = num_resamples or _DEFAULT_RESAMPLES
        confidence_level = confidence_level or _DEFAULT_LEVEL
        measured = [await self._splits.read(training, _SPLITS[split]) for training in trainings]
        _check_same_data(measured)
        _check_size(measured, num_resamples)
        key = (tuple(_sha256(one) for one in measured), num_resamples, confidence_level, seed)
        try:
            async with asyncio.timeout(_MAX_SECONDS):
                compared = await self._compared(key, measured)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{num_resamples} resamples of {len(trainings)} trainings were not done within"
                f" {_MAX_SECONDS:.0f} s; ask for fewer, or when less is going on",
                reason="TOO_SLOW",
            ) from error
        messages = await self._messages(trainings)
        return Comparison(
            split=split,
            sides=[_to_side(one, message) for one, message in zip(measured, messages, strict=True)],
            deltas=[
                Comparison.Delta(training=training, metric=name, **_to_fields(delta))
                for training, deltas in zip(trainings[1:], compared.deltas, strict=True)
                for name, delta in deltas.items()
            ],
            class_deltas=[
                Comparison.ClassDelta(
                    training=training,
                    class_name=figures.class_name,
                    num_ground_truths=figures.num_ground_truths,
                    **_to_fields(delta),
                )
                for training, deltas in zip(trainings[1:], compared.class_deltas, strict=True)
                for figures, delta in zip(measured[0].measurement.classes, deltas, strict=True)
            ],
            parameters=[
                Comparison.ParameterDiff(name=name, values=values)
                for name, values in differing_parameters(messages)
            ],
            images=[
                Comparison.ImageDelta(
                    inference_results=[
                        f"{training}/inferenceResults/{_SPLITS[split]}"
                        f"-{measured[0].matches.id_I[image.image]}"
                        for training in trainings
                    ],
                    image_path=measured[0].matches.paths[image.image],
                    f1s=image.f1s,
                    difference=image.difference,
                )
                for image in compared.images
            ],
            num_images=measured[0].measurement.num_images,
            num_resamples=num_resamples,
            confidence_level=confidence_level,
        )

    async def _compared(self, key: _Key, measured: Sequence[Measured]) -> Compared:
        """Returns what is kept, or compares; that ends soon if the caller goes away."""
        _, num_resamples, confidence_level, seed = key
        async with self._turn:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
            cancelled = threading.Event()
            try:
                found = await asyncio.to_thread(
                    compare,
                    measured,
                    num_resamples=num_resamples,
                    confidence_level=confidence_level,
                    seed=seed,
                    cancelled=cancelled,
                )
            finally:
                cancelled.set()
            self._kept[key] = found
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
            return found

    async def _messages(self, trainings: Sequence[str]) -> list[training_pb2.Training]:
        """Reads the newest message of each training."""
        messages = []
        async with self._db.connection() as conn:
            for name in trainings:
                training = await store.get_training(conn, names.last_segment(name))
                message = training_pb2.Training.FromString(training.message if training else b"")
                message.name = name
                messages.append(message)
        return messages


def _check_same_data(measured: Sequence[Measured]) -> None:
    first = measured[0]
    for other in measured[1:]:
        if first.evaluation.ground_truth_sha256 != other.evaluation.ground_truth_sha256:
            raise FailedPrecondition(
                f"{_name(first)} and {_name(other)} were measured on different data:"
                f" {difference(first.matches, other.matches)}; compare trainings of one version, or"
                " of versions with the same split of the same dataset",
                reason="DIFFERENT_DATA",
                metadata={"baseline": _name(first), "other": _name(other)},
            )


def _check_size(measured: Sequence[Measured], num_resamples: int) -> None:
    most = _MAX_DRAWN // (len(measured) * max(1, len(measured[0].matches.class_names)))
    if num_resamples > most:
        raise bad_field(
            "num_resamples",
            "TOO_MANY_RESAMPLES",
            f"{num_resamples} resamples of {len(measured)} trainings with"
            f" {len(measured[0].matches.class_names)} classes do not fit into memory; ask for at"
            f" most {most}",
        )


def _name(split: Measured) -> str:
    return f"{split.evaluation.training}/evaluations/{split.evaluation.split}"


def _sha256(split: Measured) -> str:
    return StoredObject.FromString(split.evaluation.matches or b"").sha256


def _to_side(split: Measured, training: training_pb2.Training) -> Comparison.Side:
    evaluation = to_evaluation(split.evaluation)
    side = Comparison.Side(
        training=split.evaluation.training, model=training.model, coco=evaluation.coco
    )
    if evaluation.HasField("best_f1"):
        side.best_f1.CopyFrom(evaluation.best_f1)
    return side


def _to_fields(delta: Delta) -> dict[str, Any]:
    return {
        "baseline": delta.baseline,
        "value": delta.value,
        "delta": delta.delta,
        "low": delta.low,
        "high": delta.high,
        "significant": delta.significant,
    }
