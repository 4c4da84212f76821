"""Files on their way to a service: in chunks, with progress, begun again when the way breaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import IO, TypeVar

import grpc

from detflow.client.connection import Connection
from detflow.errors import DetflowError, InvalidArgument, Unavailable
from detflow.v1 import common_pb2

Request = TypeVar("Request")
Response = TypeVar("Response")
OnProgress = Callable[[common_pb2.Progress], None]

_CHUNK_BYTES = 1 << 20
_SECONDS = 6 * 3600.0
_ATTEMPTS = 3


def upload(
    connection: Connection,
    method: grpc.StreamUnaryMultiCallable[Request, Response],
    file: IO[bytes],
    *,
    opening: Request,
    chunk: Callable[[bytes], Request],
    ending: Callable[[int], Request],
    noun: str,
    progress: OnProgress | None,
) -> Response:
    """Sends a file from its first byte to its last, and returns what the service answers.

    Args:
        connection: Where to.
        method: Client-streaming method of a stub.
        file: Seekable.
        opening: First message.
        chunk: Makes a message of bytes.
        ending: Makes the last message of the number of bytes.
        noun: What the file is called in errors.
        progress: Called in stage "upload", with bytes.

    Raises:
        DetflowError: What the service raised; InvalidArgument if the file cannot be read.
    """
    num_total = os.fstat(file.fileno()).st_size
    unreadable: list[OSError] = []

    def read() -> bytes:
        # gRPC keeps to itself what was wrong with the parts.
        try:
            return file.read(_CHUNK_BYTES)
        except OSError as error:
            unreadable.append(error)
            raise

    def parts() -> Iterator[Request]:
        yield opening
        while data := read():
            yield chunk(data)
            if progress is not None:
                progress(of_bytes("upload", file.tell(), num_total))
        yield ending(file.tell())

    for attempt in range(1, _ATTEMPTS + 1):
        file.seek(0)
        try:
            with connection.translated():
                return method(parts(), timeout=_SECONDS)
        except Unavailable as error:
            if attempt == _ATTEMPTS or error.reason == "UNREACHABLE":
                raise
        except DetflowError as error:
            if not unreadable:
                raise
            raise InvalidArgument(
                f"the {noun} cannot be read to its end ({unreadable[0].strerror})",
                reason="UNREADABLE_FILE",
            ) from error
    raise AssertionError("the last attempt returns or raises")


def of_bytes(stage: str, num_done: int, num_total: int) -> common_pb2.Progress:
    """Makes the progress message of a file on its way."""
    return common_pb2.Progress(
        stage=stage,
        num_done=num_done,
        num_total=num_total,
        percent=100.0 * num_done / max(num_total, 1),
    )
