"""Files on their way to a service: in chunks, with progress, begun again when the way breaks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, TypeVar

import grpc

from detflow.client import cancelling
from detflow.client.connection import Connection
from detflow.client.progress import OnProgress
from detflow.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    DetflowError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from detflow.v1 import common_pb2, dataset_pb2, dataset_pb2_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")

_CHUNK_BYTES = 1 << 20
_SECONDS = 6 * 3600.0
_ATTEMPTS = 3
_FIRST_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 3.0
_PATIENCE_SECONDS = 120.0


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
    source = _Source(file, noun)

    def parts() -> Iterator[Request]:
        at = 0
        yield opening
        while data := source.read(at):
            yield chunk(data)
            at += len(data)
            if progress is not None:
                progress(of_bytes("upload", at, num_total))
        yield ending(at)

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return connection.send(method, parts(), seconds=_SECONDS)
        except DetflowError as error:
            if source.problem is not None:
                raise source.problem from error
            is_away = isinstance(error, Unavailable) and error.reason != "UNREACHABLE"
            if not is_away or attempt == _ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def upload_archive(
    connection: Connection,
    stub: dataset_pb2_grpc.DatasetServiceStub,
    file: IO[bytes],
    *,
    project: str,
    progress: OnProgress | None,
) -> dataset_pb2.Upload:
    """Sends an archive, or what detflow does not have of it yet.

    An upload is known by its content: whoever sends the same bytes to the same project again goes
    on where it stood, also after the end of this process.

    Args:
        connection: Where to.
        stub: The service.
        file: Seekable.
        project: Id of the project.
        progress: Called in stages "hash" and "upload", with bytes.

    Raises:
        DetflowError: What the service raised; InvalidArgument if the file cannot be read;
            Unavailable if nothing gets through for two minutes.
    """
    source = _Source(file, "archive")
    num_total, sha256 = source.measure(progress)
    request = dataset_pb2.CreateUploadRequest(
        parent=f"projects/{project}", size_bytes=num_total, sha256=sha256, request_id=sha256
    )
    upload = connection.call(stub.CreateUpload, request)
    patience = _Patience()
    while upload.state != dataset_pb2.Upload.RECEIVED:
        try:
            parts = _parts(source, upload, num_total, progress)
            upload = connection.send(stub.WriteUpload, parts, seconds=_SECONDS)
        except DetflowError as error:
            if source.problem is not None:
                raise source.problem from error
            if not _may_go_on(error):
                raise
            patience.wait(error)
            upload = patience.call(lambda: connection.call(stub.CreateUpload, request))
        patience.see(upload.committed_bytes)
    return upload


def _parts(
    source: _Source,
    upload: dataset_pb2.Upload,
    num_total: int,
    progress: OnProgress | None,
) -> Iterator[dataset_pb2.WriteUploadRequest]:
    """Yields the messages that bring an upload what it does not have yet."""
    message = dataset_pb2.WriteUploadRequest
    at = upload.committed_bytes
    yield message(start=message.Start(name=upload.name, offset=at))
    while data := source.read(at):
        yield message(chunk=data)
        at += len(data)
        if progress is not None:
            progress(of_bytes("upload", at, num_total))


class _Source:
    """A file that is read by one attempt while the thread of another may not have ended yet.

    Args:
        file: Seekable.
        noun: What it is called in errors.

    Attributes:
        problem: Why it could not be read; gRPC keeps that to itself.
    """

    def __init__(self, file: IO[bytes], noun: str) -> None:
        self.problem: DetflowError | None = None
        self._file = file
        self._noun = noun
        self._lock = threading.Lock()

    def read(self, at: int) -> bytes:
        """Reads a chunk.

        Raises:
            InvalidArgument: It cannot be read.
        """
        cancelling.check()
        with self._lock, self._told():
            self._file.seek(at)
            return self._file.read(_CHUNK_BYTES)

    def measure(self, progress: OnProgress | None) -> tuple[int, str]:
        """Returns size and SHA-256.

        Raises:
            InvalidArgument: It cannot be read, or is empty.
        """
        digest, num_done = hashlib.sha256(), 0
        with self._told():
            num_total = self._file.seek(0, os.SEEK_END)
        while data := self.read(num_done):
            digest.update(data)
            num_done += len(data)
            if progress is not None:
                progress(of_bytes("hash", num_done, num_total))
        if not num_done:
            raise InvalidArgument(f"the {self._noun} is empty", reason="CORRUPT_ARCHIVE")
        return num_done, digest.hexdigest()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except InvalidArgument as error:
            self.problem = error
            raise
        except OSError as error:
            self.problem = InvalidArgument(
                f"the {self._noun} cannot be read to its end ({error.strerror})",
                reason="UNREADABLE_FILE",
            )
            raise self.problem from error


class _Patience:
    """Goes on as long as something gets through every two minutes."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + _PATIENCE_SECONDS
        self._backoff = _FIRST_BACKOFF_SECONDS
        self._num_done = -1

    def see(self, num_done: int) -> None:
        """Begins anew if there is progress."""
        if num_done > self._num_done:
            self._num_done = num_done
            self._deadline = time.monotonic() + _PATIENCE_SECONDS
            self._backoff = _FIRST_BACKOFF_SECONDS

    def wait(self, error: DetflowError) -> None:
        """Waits before the next attempt; raises the error if it has taken too long."""
        if time.monotonic() > self._deadline:
            raise error
        cancelling.pause(self._backoff)
        self._backoff = min(self._backoff * 2, _MAX_BACKOFF_SECONDS)

    def call(self, attempt: Callable[[], Response]) -> Response:
        """Repeats a call while the service is away."""
        while True:
            try:
                return attempt()
            except (Unavailable, DeadlineExceeded) as error:
                self.wait(error)


def _may_go_on(error: DetflowError) -> bool:
    """Whether an upload can go on after this error, from where it stands or from its beginning."""
    if isinstance(error, FailedPrecondition):
        return error.reason == "WRONG_OFFSET"
    return isinstance(error, (Aborted, Cancelled, DeadlineExceeded, NotFound, Unavailable))


def of_bytes(stage: str, num_done: int, num_total: int) -> common_pb2.Progress:
    """Makes the progress message of a file on its way."""
    return common_pb2.Progress(
        stage=stage,
        num_done=num_done,
        num_total=num_total,
        percent=100.0 * num_done / max(num_total, 1),
    )
