"""Images that come in a stream of messages: a header, chunks, the size; then perhaps the next."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from detflow.errors import InvalidArgument, ResourceExhausted, bad_field
from detflow.uploads import MAX_IMAGE_BYTES, next_message
from detflow.v1.prediction_pb2 import PredictImageHeader

IDLE_SECONDS = 60.0
"""How long a caller may send nothing."""


class Room:
    """Memory for images that have come and are not yet answered.

    Args:
        num_bytes: How much there is.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def take(self, num_bytes: int) -> None:
        """Takes some.

        Raises:
            ResourceExhausted: BUSY, nothing is left.
        """
        if num_bytes > self._left:
            raise busy("too many images wait")
        self._left -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Gives some back."""
        self._left += num_bytes


@dataclass(slots=True)
class ImageIn:
    """An image that has come.

    Attributes:
        header: What to do with it.
        data: The file; empty if it is too large.
        num_bytes: Size of the file.
        arrive_time: When its last byte came, in seconds of the monotonic clock.
    """

    header: PredictImageHeader
    data: bytearray
    num_bytes: int = 0
    arrive_time: float = 0.0

    def check(self) -> None:
        """Refuses an image that was too large to be kept.

        Raises:
            ResourceExhausted: IMAGE_LIMIT.
        """
        if self.num_bytes > MAX_IMAGE_BYTES:
            raise ResourceExhausted(
                f"an image may have {MAX_IMAGE_BYTES} bytes, not {self.num_bytes}; make it smaller",
                reason="IMAGE_LIMIT",
            )


class ImagesIn:
    """The images of one call.

    Args:
        messages: The call's, of PredictImage or of PredictImages.
        room: Memory for all calls.
        opened: Awaited with the header of each image; raises to refuse it.
    """

    def __init__(
        self,
        messages: AsyncIterator[Any],
        room: Room,
        opened: Callable[[PredictImageHeader], Awaitable[None]],
    ) -> None:
        self._messages = messages
        self._room = room
        self._opened = opened
        self._num_taken = 0

    async def next(self) -> ImageIn | None:
        """Returns the next image, or None at the end.

        Raises:
            InvalidArgument: INVALID_FIELD: messages out of order; INCOMPLETE_UPLOAD: cut off.
            ResourceExhausted: BUSY.
            DeadlineExceeded: UPLOAD_IDLE.
        """
        message = await next_message(self._messages, IDLE_SECONDS)
        if message is None:
            return None
        if not message.HasField("header"):
            raise bad_field("header", "INVALID_FIELD", "say first what to do with the image")
        image = ImageIn(message.header, bytearray())
        await self._opened(image.header)
        while (message := await next_message(self._messages, IDLE_SECONDS)) is not None:
            match message.WhichOneof("part"):
                case "chunk":
                    self._add(image, message.chunk)
                case "size_bytes" if message.size_bytes == image.num_bytes:
                    image.arrive_time = time.monotonic()
                    return image
                case "size_bytes":
                    break
                case _:
                    raise bad_field(
                        "header", "INVALID_FIELD", "send the size of the image before the next one"
                    )
        # A cancelled call can look like one that has ended, so the end is said explicitly.
        raise InvalidArgument(
            f"the image was cut off after {image.num_bytes} bytes: its last message must give its"
            " size; send it again",
            reason="INCOMPLETE_UPLOAD",
        )

    def done(self, image: ImageIn) -> None:
        """Gives back the memory of an image."""
        self._give_back(len(image.data))

    def close(self) -> None:
        """Gives back all memory."""
        self._give_back(self._num_taken)

    def _add(self, image: ImageIn, chunk: bytes) -> None:
        image.num_bytes += len(chunk)
        if image.num_bytes > MAX_IMAGE_BYTES:  # the rest is counted only
            self._give_back(len(image.data))
            image.data.clear()
            return
        self._room.take(len(chunk))
        self._num_taken += len(chunk)
        image.data += chunk

    def _give_back(self, num_bytes: int) -> None:
        self._num_taken -= num_bytes
        self._room.give_back(num_bytes)


def busy(what: str) -> ResourceExhausted:
    """Makes the error for too much at once."""
    return ResourceExhausted(
        f"{what} to be predicted; try again in a second, or give the metrics service more"
        " DETFLOW_PREDICT_PROCESSES",
        reason="BUSY",
        retry_seconds=1,
    )
