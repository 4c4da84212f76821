"""Gathers what reports, charts and tables are made from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from detflow import channels, names, telemetry
from detflow.errors import DataLoss, DetflowError, FailedPrecondition
from detflow.postgres import Database
from detflow.settings import Settings
from detflow.v1 import common_pb2, version_pb2, version_pb2_grpc
from detflow.v1.analysis_pb2 import EvaluationAnalysis
from detflow.v1.comparison_pb2 import Comparison
from detflow.v1.training_pb2 import Training
from services.metrics import results, store
from services.metrics.analysis_service import evaluation_analysis, evaluation_curves
from services.metrics.domain import Evaluation
from services.metrics.measured import Measured, MeasuredSplits
from services.metrics.pictures import Look, Pictures
from services.metrics.reports.content import (
    MAX_CHART_CLASSES,
    ComparisonContent,
    Picture,
    PicturePair,
    SplitContent,
    TrainingContent,
)
from services.metrics.results import Filter
from services.metrics.series import Series
from services.metrics.series_reader import read_epoch_series
from services.metrics.service import to_evaluation

log = telemetry.get_logger(__name__)

SPLITS = {
    common_pb2.SPLIT_UNSPECIFIED: "test",
    common_pb2.SPLIT_VAL: "val",
    common_pb2.SPLIT_TEST: "test",
}
"""Splits that requests name; test where they name none."""

_NUM_PICTURES = 8
_NUM_PAIRS = 6
_PICTURE_PX = 480
_VERSION_SECONDS = 2.0


class ReportSources:
    """Reads everything that is known of trainings.

    Args:
        db: Database of the service.
        splits: Measured splits.
        pictures: Pictures of their images.
        settings: How to reach the version service, which knows what versions are called.
    """

    def __init__(
        self, db: Database, splits: MeasuredSplits, pictures: Pictures, settings: Settings
    ) -> None:
        self._db = db
        self._splits = splits
        self._pictures = pictures
        self._settings = settings

    async def training(self, name: str, *, with_tables: bool) -> TrainingContent:
        """Gathers what a report of a training shows, as far as it is there.

        Args:
            name: Resource name.
            with_tables: Also what only its tables hold.

        Raises:
            NotFound: There is no such training.
            DataLoss: What was stored of it is gone or damaged.
            Unavailable: The database or the object store is away.
        """
        message, series, evaluations = await self._read(name)
        version = await self.version(name)
        splits: list[SplitContent] = []
        last: Measured | None = None
        for evaluation in evaluations:
            measured = await self._measured(name, evaluation)
            if measured is None:
                splits.append(SplitContent(evaluation=to_evaluation(evaluation)))
            else:
                splits.append(await self._split(measured, with_tables=with_tables))
                last = measured
        return TrainingContent(
            training=message,
            version=version,
            series=tuple(series),
            splits=tuple(splits),
            pictures=await self._worst(last) if last else (),
        )

    async def series(self, name: str) -> tuple[Series, ...]:
        """Reads the series by epoch of a training that is there."""
        return tuple((await self._read(name))[1])

    async def evaluations(self, name: str) -> list[Evaluation]:
        """Reads the evaluations of a training that is there."""
        return (await self._read(name))[2]

    async def split(self, name: str, split: str, *, every_class: bool = False) -> SplitContent:
        """Gathers what charts and tables of a measured split show.

        Raises:
            DetflowError: As `MeasuredSplits.read`.
        """
        measured = await self._splits.read(name, split)
        return await self._split(measured, with_tables=every_class)

    async def measured(self, name: str, split: str) -> Measured:
        """Reads a measured split."""
        return await self._splits.read(name, split)

    async def analysis(self, measured: Measured, threshold: float) -> EvaluationAnalysis:
        """Counts what a threshold makes of a measured split."""
        return await asyncio.to_thread(evaluation_analysis, measured.matches, threshold)

    async def comparison(self, comparison: Comparison) -> ComparisonContent:
        """Gathers what a report of a comparison shows beside it."""
        split = SPLITS[comparison.split]
        trainings = [side.training for side in comparison.sides]
        measured = [await self._splits.read(training, split) for training in trainings]
        versions = await asyncio.gather(*map(self.version, trainings))
        pairs = [
            PicturePair(
                path=image.image_path,
                f1s=tuple(image.f1s),
                jpegs=await self._pair(image, measured),
            )
            for image in comparison.images[:_NUM_PAIRS]
            if image.difference > 0
        ]
        return ComparisonContent(
            comparison=comparison, versions=tuple(versions), pairs=tuple(pairs)
        )

    async def version(self, training: str) -> str:
        """Returns what the version of a training is called; its id if nobody can say just now."""
        name = training.rsplit("/trainings/", 1)[0]
        try:
            async with channels.channel(self._settings.version_address, self._settings) as channel:
                stub = version_pb2_grpc.VersionServiceStub(channel)
                with channels.translate():
                    request = version_pb2.GetVersionRequest(name=name)
                    found = await stub.GetVersion(request, timeout=_VERSION_SECONDS)
        except DetflowError as error:
            log.info("a report calls a version by its id", version=name, error=str(error))
            return names.last_segment(name)
        return found.display_name or names.last_segment(name)

    async def _read(self, name: str) -> tuple[Training, Sequence[Series], list[Evaluation]]:
        async with self._db.transaction(isolation="repeatable_read") as conn:
            training = await store.find_training(conn, name)
            series = await read_epoch_series(conn, training)
            evaluations = await store.list_evaluations(conn, training)
        message = Training.FromString(training.message)
        message.name = name
        if not message.state:
            message.state = Training.State.ValueType(training.state)
        return message, series, evaluations

    async def _measured(self, name: str, evaluation: Evaluation) -> Measured | None:
        """Reads what is behind the figures of a split; None if nothing was kept."""
        try:
            return await self._splits.read(name, evaluation.split)
        except FailedPrecondition:
            return None

    async def _split(self, measured: Measured, *, with_tables: bool) -> SplitContent:
        matches = measured.matches

        def make() -> SplitContent:
            num_classes = len(matches.class_names)
            few = with_tables or num_classes <= MAX_CHART_CLASSES
            return SplitContent(
                evaluation=to_evaluation(measured.evaluation),
                curves=evaluation_curves(matches, range(num_classes) if few else ()),
                analysis=evaluation_analysis(matches, measured.threshold(None)),
                matches=matches if with_tables else None,
            )

        return await asyncio.to_thread(make)

    async def _worst(self, measured: Measured) -> tuple[Picture, ...]:
        """Makes pictures of the images with the most errors; of none if there is no error."""
        matches = measured.matches
        outcomes = results.at_threshold(matches, measured.threshold(None))
        worst = (await asyncio.to_thread(results.choose, outcomes, Filter()))[:_NUM_PICTURES]
        pictures = []
        for image in worst.tolist():
            in_image_N, in_image_M = matches.image_N == image, matches.image_M == image
            num_wrong = int(np.count_nonzero(outcomes.wrong_N & in_image_N))
            num_lost = int(np.count_nonzero(outcomes.lost_M & in_image_M))
            jpeg = await self._picture(measured, image)
            if jpeg is None or num_wrong + num_lost == 0:
                break
            pictures.append(
                Picture(
                    path=matches.paths[image],
                    jpeg=jpeg,
                    num_true_positives=int(np.count_nonzero(outcomes.right_N & in_image_N)),
                    num_false_positives=num_wrong,
                    num_false_negatives=num_lost,
                )
            )
        return tuple(pictures)

    async def _pair(
        self, image: Comparison.ImageDelta, measured: Sequence[Measured]
    ) -> tuple[bytes, ...]:
        image_id = int(image.inference_results[0].rsplit("-", 1)[1])
        jpegs = []
        for one in measured:
            place = results.find_image(one.matches, image_id)
            jpeg = None if place is None else await self._picture(one, place)
            if jpeg is not None:
                jpegs.append(jpeg)
        return tuple(jpegs)

    async def _picture(self, measured: Measured, image: int) -> bytes | None:
        """Draws an image; None if it is gone: the figures are worth a report without it."""
        look = Look(
            threshold=measured.threshold(None),
            max_side_px=_PICTURE_PX,
            detections=True,
            ground_truths=True,
        )
        try:
            return (await self._pictures.get(measured, image, look)).data
        except DataLoss as error:
            log.warning(
                "a report lacks an image", training=measured.evaluation.training, error=str(error)
            )
            return None
