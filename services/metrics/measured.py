"""The measured splits that questions are asked about: an evaluation and the matches behind it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from detflow.errors import DataLoss, FailedPrecondition
from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.metrics import store
from services.metrics.domain import Evaluation, Measurement
from services.metrics.kept import Kept
from services.metrics.matches import Matches

_MAX_KEPT_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A split of a training that was measured.

    Attributes:
        evaluation: Its evaluation.
        measurement: Its figures.
        matches: What became of every detection and every box.
        manifest: Manifest of the version's bundle.
    """

    evaluation: Evaluation
    measurement: Measurement
    matches: Matches
    manifest: StoredObject

    def threshold(self, wanted: float | None) -> float:
        """Returns the confidence threshold asked for, or the one with the best F1."""
        if wanted is not None:
            return wanted
        best = self.measurement.best_f1
        return best.confidence_threshold if best else 0.0


class MeasuredSplits:
    """Reads measured splits and keeps those read last, within 256 MiB.

    Args:
        db: Database of the service.
        objects: Object store.
    """

    def __init__(self, db: Database, objects: ObjectStore) -> None:
        self._db = db
        self._objects = objects
        self._kept: Kept[str, Matches] = Kept(_MAX_KEPT_BYTES, lambda matches: matches.num_bytes)

    async def read(self, training: str, split: str) -> Measured:
        """Reads one.

        Args:
            training: Resource name of the training.
            split: val or test.

        Raises:
            NotFound: There is no such training, or no evaluation of the split yet.
            FailedPrecondition: EVALUATION_FAILED, or NO_MATCHES: an earlier release measured it.
            DataLoss: What was stored of it is gone or damaged.
            Unavailable: The database or the object store is away.
        """
        evaluation = await self._evaluation(training, split)
        name = f"{training}/evaluations/{split}"
        if evaluation.measurement is None:
            raise FailedPrecondition(
                f"{name} failed, so there is nothing behind its figures; its failure says why",
                reason="EVALUATION_FAILED",
            )
        if evaluation.matches is None or evaluation.manifest is None:
            raise FailedPrecondition(
                f"{name} was measured by a release that kept the figures only; train again",
                reason="NO_MATCHES",
            )
        try:
            matches = await self._matches(StoredObject.FromString(evaluation.matches))
        except DataLoss:
            # Gone, if a newer attempt was measured meanwhile.
            if (await self._evaluation(training, split)).attempt == evaluation.attempt:
                raise
            return await self.read(training, split)
        return Measured(
            evaluation=evaluation,
            measurement=evaluation.measurement,
            matches=matches,
            manifest=StoredObject.FromString(evaluation.manifest),
        )

    async def _evaluation(self, training: str, split: str) -> Evaluation:
        async with self._db.connection() as conn:
            return await store.find_evaluation(conn, training, split)

    async def _matches(self, stored: StoredObject) -> Matches:
        def load() -> Matches:
            return Matches.from_bytes(self._objects.get(stored))

        return await asyncio.to_thread(self._kept.get, stored.sha256, load)
