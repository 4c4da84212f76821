"""The file that a model predicts with: an ONNX export of its training, made if there is none."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass

from detflow import channels, names
from detflow.errors import (
    Aborted,
    DeadlineExceeded,
    DetflowError,
    FailedPrecondition,
    NotFound,
    from_status,
)
from detflow.resize import Resize
from detflow.v1 import (
    export_pb2,
    export_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    training_pb2,
    version_pb2,
    version_pb2_grpc,
)
from detflow.v1.common_pb2 import Progress, StoredObject

_PATIENCE_SECONDS = 900.0
_MAX_KNOWN = 1000
_UNFINISHED = (export_pb2.Export.QUEUED, export_pb2.Export.RUNNING)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """What it takes to predict as a training has learnt to.

    Attributes:
        file: The ONNX file: fp32, for inputs of any size, without suppression.
        resize: What the version's recipe does with the sizes of images.
        grayscale: Whether it makes them gray.
    """

    file: StoredObject
    resize: Resize
    grayscale: bool


class ModelFiles:
    """Finds the files of trainings, and has them made.

    Args:
        trainings: The trainer's trainings.
        exports: The trainer's exports.
        versions: The versions, for their recipes.
    """

    def __init__(
        self,
        trainings: trainer_pb2_grpc.TrainerServiceAsyncStub,
        exports: export_pb2_grpc.ExportServiceAsyncStub,
        versions: version_pb2_grpc.VersionServiceAsyncStub,
    ) -> None:
        self._trainings = trainings
        self._exports = exports
        self._versions = versions
        self._known: OrderedDict[tuple[str, str], ModelFile] = OrderedDict()

    async def check(self, training: str) -> training_pb2.Training:
        """Reads a training that can predict.

        Args:
            training: Resource name.

        Raises:
            NotFound: There is none.
            FailedPrecondition: TRAINING_HAS_NO_WEIGHTS.
            Unavailable: The trainer is away.
        """
        with channels.translate():
            found = await self._trainings.GetTraining(trainer_pb2.GetTrainingRequest(name=training))
        if not found.HasField("weights"):
            state = training_pb2.Training.State.Name(found.state)
            raise FailedPrecondition(
                f"{training} is {state} and has no weights to predict with; wait for its end, or"
                " choose a training that has come to its end",
                reason="TRAINING_HAS_NO_WEIGHTS",
                metadata={"training": training, "state": state},
            )
        return found

    async def make_ready(
        self, training: training_pb2.Training
    ) -> AsyncIterator[Progress | ModelFile]:
        """Yields how far the file is being made, if it has to be, and at last the file.

        All who ask at once wait for one export: the id of the request says what it is for.

        Args:
            training: One that has weights.

        Raises:
            FailedPrecondition: EXPORT_FAILED; the message says of what, and how to try again.
            Aborted: EXPORT_CANCELLED, by somebody else.
            DeadlineExceeded: EXPORT_TIMEOUT.
            Unavailable: The trainer or the version service is away.
        """
        key = (training.name, training.weights.sha256)
        if key not in self._known:
            export = await self._find(training)
            if export is None:
                export = await self._create(training)
                try:
                    async with asyncio.timeout(_PATIENCE_SECONDS):
                        async for step in self._finish(export):
                            if isinstance(step, Progress):
                                yield step
                            else:
                                export = step
                except TimeoutError as error:
                    raise DeadlineExceeded(
                        f"{export.name} is not made after {_PATIENCE_SECONDS:.0f} s; it goes on:"
                        " try again later",
                        reason="EXPORT_TIMEOUT",
                    ) from error
            self._known[key] = await self._describe(training.name, export)
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        yield self._known[key]

    def forget(self, training: training_pb2.Training) -> None:
        """Looks for another file next time: the one there was is gone."""
        self._known.pop((training.name, training.weights.sha256), None)

    async def _find(self, training: training_pb2.Training) -> export_pb2.Export | None:
        """Returns an export that somebody made of the training's last weights, if one fits."""
        with channels.translate():
            listed = await self._exports.ListExports(
                export_pb2.ListExportsRequest(parent=training.name, page_size=1000)
            )
        image_size = training.hyperparameters.fields["image_size"].number_value
        # What was made before the training ended may be of weights that it has no more.
        since = training.end_time.ToNanoseconds() if training.HasField("end_time") else None
        for export in listed.exports:
            if (
                export.state == export_pb2.Export.SUCCEEDED
                and export.format == export_pb2.Export.ONNX
                and export.precision == export_pb2.Export.FP32
                and export.image_size_px == image_size
                and export.dynamic
                and not export.end_to_end
                and since is not None
                and export.create_time.ToNanoseconds() >= since
            ):
                return export
        return None

    async def _create(self, training: training_pb2.Training) -> export_pb2.Export:
        """Asks for an export; for the one that was asked for before, if it is of use."""
        request_id = f"predict-{training.weights.sha256[:32]}"
        while True:
            request = export_pb2.CreateExportRequest(
                parent=training.name,
                export=export_pb2.Export(format=export_pb2.Export.ONNX, dynamic=True),
                request_id=request_id,
            )
            with channels.translate():
                export = await self._exports.CreateExport(request)
            if export.state in _UNFINISHED or await self._is_kept(export):
                return export
            # It was cancelled or deleted. Everybody comes upon the same one after it.
            request_id = f"predict-{names.last_segment(export.name)}"

    async def _is_kept(self, export: export_pb2.Export) -> bool:
        if export.state == export_pb2.Export.CANCELLED:
            return False
        try:
            with channels.translate():
                await self._exports.GetExport(export_pb2.GetExportRequest(name=export.name))
        except NotFound:
            return False
        return True

    async def _finish(
        self, export: export_pb2.Export
    ) -> AsyncIterator[Progress | export_pb2.Export]:
        """Yields progress until an export is made, then the export."""
        if export.state in _UNFINISHED:
            with channels.translate():
                watch = self._exports.WatchExport(export_pb2.WatchExportRequest(name=export.name))
                try:
                    async for message in watch:
                        if message.HasField("progress"):
                            yield message.progress
                        elif message.HasField("export"):
                            export = message.export
                finally:
                    watch.cancel()
        if export.state == export_pb2.Export.FAILED:
            raise _failed(export.name, from_status(export.failure.status))
        if export.state != export_pb2.Export.SUCCEEDED:
            raise Aborted(
                f"{export.name}, which the model predicts with, was cancelled; try again to have"
                " another one made",
                reason="EXPORT_CANCELLED",
            )
        yield export

    async def _describe(self, training: str, export: export_pb2.Export) -> ModelFile:
        version = training.rsplit("/trainings/", 1)[0]
        with channels.translate():
            found = await self._versions.GetVersion(version_pb2.GetVersionRequest(name=version))
        return ModelFile(
            file=export.object,
            resize=Resize.of(found.recipe),
            grayscale=found.recipe.grayscale,
        )


def _failed(name: str, error: DetflowError) -> FailedPrecondition:
    return FailedPrecondition(
        f"{name}, which the model predicts with, failed: {error.message}. Delete it to have it made"
        " again",
        reason="EXPORT_FAILED",
        metadata={"export": name, "failure": error.reason},
    )
