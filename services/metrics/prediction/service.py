"""The gRPC servicer of predictions: receives images, has them predicted, answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from detflow import errors
from detflow.errors import DataLoss, DetflowError, InvalidArgument, ResourceExhausted
from detflow.v1 import prediction_pb2, prediction_pb2_grpc, training_pb2
from detflow.v1.common_pb2 import Progress
from detflow.v1.prediction_pb2 import PredictImageHeader
from services.metrics.prediction.images_in import ImageIn, ImagesIn, Room, busy
from services.metrics.prediction.model_files import ModelFile, ModelFiles
from services.metrics.prediction.predictors import Predictors
from services.metrics.prediction.task import Task

MAX_CALLS = 64
"""Calls at once, most of them waiting in line."""

MAX_WAITING_BYTES = 512 << 20
"""All images that have come and are not answered."""

DEFAULT_CONFIDENCE_THRESHOLD = 0.25
DEFAULT_NMS_IOU = 0.7
DEFAULT_MAX_DETECTIONS = 300

_OF_THE_IMAGE = ("CORRUPT_IMAGE", "IMAGE_LIMIT", "IMAGE_TOO_LARGE", "UNSUPPORTED_IMAGE")


class PredictionService(prediction_pb2_grpc.PredictionServiceServicer):
    """Tries models on images of their users.

    Args:
        files: What models predict with.
        predictors: The processes that do.
    """

    def __init__(self, files: ModelFiles, predictors: Predictors) -> None:
        self._files = files
        self._predictors = predictors
        self._room = Room(MAX_WAITING_BYTES)
        self._num_calls = 0

    async def PredictImage(
        self,
        request_iterator: AsyncIterator[prediction_pb2.PredictImageRequest],
        context: object,
    ) -> prediction_pb2.Prediction:
        """Finds things in one image."""
        with self._in_line():
            call = _Call(self._files)
            images = ImagesIn(request_iterator, self._room, call.open)
            with contextlib.closing(images):
                image = await images.next()
                if image is None:
                    raise InvalidArgument(
                        "there is no image in the call; send a header, chunks and the size",
                        reason="INVALID_FIELD",
                    )
                async for _ in call.make_ready(image.header):
                    pass
                return await self._predict(call, image)

    async def PredictImages(
        self,
        request_iterator: AsyncIterator[prediction_pb2.PredictImagesRequest],
        context: object,
    ) -> AsyncIterator[prediction_pb2.PredictImagesResponse]:
        """Finds things in images, one after the other, while the next one comes."""
        with self._in_line():
            call = _Call(self._files)
            images = ImagesIn(request_iterator, self._room, call.open)
            with contextlib.closing(images):
                coming = asyncio.create_task(images.next())
                try:
                    while (image := await coming) is not None:
                        coming = asyncio.create_task(images.next())
                        async for progress in call.make_ready(image.header):
                            yield prediction_pb2.PredictImagesResponse(progress=progress)
                        result = await self._predict_or_say_why(call, image)
                        images.done(image)
                        yield prediction_pb2.PredictImagesResponse(prediction=result)
                finally:
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)

    async def _predict_or_say_why(self, call: _Call, image: ImageIn) -> prediction_pb2.Prediction:
        try:
            return await self._predict(call, image)
        except DetflowError as error:
            if error.reason not in _OF_THE_IMAGE:
                raise
            return prediction_pb2.Prediction(
                file_name=image.header.file_name, failure=errors.failure(error)
            )

    async def _predict(self, call: _Call, image: ImageIn) -> prediction_pb2.Prediction:
        header = image.header
        try:
            image.check()
            result = await self._ask(call, image)
        except (InvalidArgument, ResourceExhausted) as error:
            name = f"{header.file_name}: " if header.file_name else ""
            raise type(error)(name + error.message, reason=error.reason) from error
        result.file_name = header.file_name
        result.latency.total_seconds = time.monotonic() - image.arrive_time
        return result

    async def _ask(self, call: _Call, image: ImageIn) -> prediction_pb2.Prediction:
        try:
            return await self._ask_with(call.file(image.header), image)
        except DataLoss:
            # Perhaps its export was deleted, and only its name is remembered: have it made again.
            await call.make_again(image.header)
            return await self._ask_with(call.file(image.header), image)

    async def _ask_with(self, found: ModelFile, image: ImageIn) -> prediction_pb2.Prediction:
        task = _task(image.header, found)
        return await self._predictors.predict(task, found.file, image.data)

    @contextlib.contextmanager
    def _in_line(self) -> Iterator[None]:
        if self._num_calls >= MAX_CALLS:
            raise busy("too many callers have images")
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1


class _Call:
    """The trainings that one call predicts with."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self._trainings: dict[str, training_pb2.Training] = {}
        self._ready: dict[str, ModelFile] = {}

    async def open(self, header: PredictImageHeader) -> None:
        """Looks at the training of an image before its bytes come."""
        if header.training not in self._trainings:
            self._trainings[header.training] = await self._files.check(header.training)

    async def make_ready(self, header: PredictImageHeader) -> AsyncIterator[Progress]:
        """Yields how far the file of the image's model is, until it is there."""
        if header.training in self._ready:
            return
        async for step in self._files.make_ready(self._trainings[header.training]):
            if isinstance(step, Progress):
                yield step
            else:
                self._ready[header.training] = step

    async def make_again(self, header: PredictImageHeader) -> None:
        """Looks for the file again, because it is not where it was."""
        self._files.forget(self._trainings[header.training])
        del self._ready[header.training]
        async for _ in self.make_ready(header):
            pass

    def file(self, header: PredictImageHeader) -> ModelFile:
        """Returns the file of the image's model."""
        return self._ready[header.training]


def _task(header: PredictImageHeader, found: ModelFile) -> Task:
    has_threshold = header.HasField("confidence_threshold")
    return Task(
        model_sha256=found.file.sha256,
        resize=found.resize,
        grayscale=found.grayscale,
        confidence_threshold=(
            header.confidence_threshold if has_threshold else DEFAULT_CONFIDENCE_THRESHOLD
        ),
        nms_iou=header.nms_iou if header.HasField("nms_iou") else DEFAULT_NMS_IOU,
        max_detections=header.max_detections or DEFAULT_MAX_DETECTIONS,
        drawn_side_px=header.drawn_side_px,
    )
