"""Predictions: models tried on one's own images."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detflow.client import cancelling
from detflow.client.connection import Connection
from detflow.client.progress import Progress, shown
from detflow.errors import DetflowError, InvalidArgument, ResourceExhausted, failure
from detflow.uploads import MAX_IMAGE_BYTES
from detflow.v1 import prediction_pb2, prediction_pb2_grpc

Image = str | os.PathLike[str] | bytes
"""A path, or the bytes of a file."""

MAX_NAME_LENGTH = 1024
"""Of a longer path the end is sent."""

_CHUNK_BYTES = 1 << 20
_SECONDS = 6 * 3600.0


class Predictions:
    """Calls about predictions."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = prediction_pb2_grpc.PredictionServiceStub(connection.channel("metrics"))

    def predict(
        self,
        training: str,
        images: Iterable[Image],
        *,
        confidence_threshold: float | None = None,
        nms_iou: float | None = None,
        max_detections: int = 0,
        drawn_side_px: int = 0,
        progress: Progress = None,
    ) -> Iterator[prediction_pb2.Prediction]:
        """Finds things in images; yields what was found in each, in their order, as it comes.

        An image that cannot be read gives a prediction with a `failure`, and the next goes on. The
        images are read while the first are predicted, so there may be any number of them. Where
        the model is tried for the first time it is made ready before, which takes seconds.

        Args:
            training: Resource name of the training.
            images: Paths, or the bytes of image files.
            confidence_threshold: Least confidence of a detection, 0..1; None means 0.25.
            nms_iou: Of two detections of one class that overlap more the less confident is
                dropped, 0..1; None means 0.7.
            max_detections: How many at most in an image, up to 1000; 0 means 300.
            drawn_side_px: Longest side of a picture with the boxes to be given back as well; 0 for
                none.
            progress: Called with how far the model is being made ready; True shows a bar.

        Raises:
            NotFound: There is no such training.
            FailedPrecondition: It has no weights, or its model cannot be exported.
            ResourceExhausted: BUSY, too many wait; try again.

        Example:
            for found in client.predictions.predict(training.name, ["a.jpg", "b.png"]):
                for one in found.detections:
                    print(found.file_name, one.class_name, one.confidence, one.box)
        """
        header = prediction_pb2.PredictImageHeader(
            training=training,
            confidence_threshold=confidence_threshold,
            nms_iou=nms_iou,
            max_detections=max_detections,
            drawn_side_px=drawn_side_px,
        )
        source = _Source(images, header)
        call: Any = cancelling.begun(self._stub.PredictImages(source.messages(), timeout=_SECONDS))
        try:
            with self._connection.translated(), contextlib.ExitStack() as display:
                told = display.enter_context(shown(progress))
                for message in call:
                    if message.HasField("prediction"):
                        display.close()  # a bar would stand in what the caller prints of it
                        yield from source.unreadable()
                        source.expected.popleft()
                        yield message.prediction
                    elif told is not None:
                        told(message.progress)
            yield from source.unreadable()
        except DetflowError as error:
            if source.problem is not None:
                raise source.problem from error
            raise
        finally:
            call.cancel()


class _Source:
    """The images of a call, read by a thread of gRPC while answers are awaited.

    Args:
        images: Paths, or bytes.
        header: What to do with each.

    Attributes:
        expected: For each image whose turn has not come: None if it was sent, or the answer to one
            that could not be.
        problem: What the images' own iterator raised; gRPC keeps that to itself.
    """

    def __init__(self, images: Iterable[Image], header: prediction_pb2.PredictImageHeader) -> None:
        self._images = images
        self._header = header
        self.expected: deque[prediction_pb2.Prediction | None] = deque()
        self.problem: Exception | None = None

    def messages(self) -> Iterator[prediction_pb2.PredictImagesRequest]:
        """Yields what is sent."""
        make = prediction_pb2.PredictImagesRequest
        try:
            for image in self._images:
                self._header.file_name = "" if isinstance(image, bytes) else _name_of(image)
                try:
                    data = image if isinstance(image, bytes) else _read(Path(image))
                except DetflowError as error:
                    self.expected.append(
                        prediction_pb2.Prediction(
                            file_name=self._header.file_name, failure=failure(error)
                        )
                    )
                    continue
                self.expected.append(None)
                yield make(header=self._header)
                for start in range(0, len(data), _CHUNK_BYTES):
                    yield make(chunk=data[start : start + _CHUNK_BYTES])
                yield make(size_bytes=len(data))
        except Exception as error:
            self.problem = error
            raise

    def unreadable(self) -> Iterator[prediction_pb2.Prediction]:
        """Yields the answers to the images before the next one that was sent."""
        while self.expected and (answer := self.expected[0]) is not None:
            self.expected.popleft()
            yield answer


def _name_of(path: str | os.PathLike[str]) -> str:
    return os.fsencode(path).decode(errors="replace")[-MAX_NAME_LENGTH:]


def _read(path: Path) -> bytes:
    """Reads a whole image.

    Raises:
        InvalidArgument: NO_SUCH_FILE.
        ResourceExhausted: IMAGE_LIMIT.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(
            f"cannot read {path} ({error.strerror}): give an image file", reason="NO_SUCH_FILE"
        ) from error
    if len(data) > MAX_IMAGE_BYTES:
        raise ResourceExhausted(
            f"{path} has more than {MAX_IMAGE_BYTES} bytes; make it smaller", reason="IMAGE_LIMIT"
        )
    return data
