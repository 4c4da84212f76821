"""Channels to the services: deadlines, typed errors, watches that reconnect by themselves."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import grpc
from google.api.httpbody_pb2 import HttpBody

from detflow.channels import from_rpc_error
from detflow.client import cancelling
from detflow.client.credentials import Credentials
from detflow.errors import (
    Cancelled,
    DeadlineExceeded,
    DetflowError,
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

Request = TypeVar("Request")
Response = TypeVar("Response")
Item = TypeVar("Item")
Watched = TypeVar("Watched", bound="Watchable")

DEFAULT_TIMEOUT_SECONDS = 15.0
SERVICES = ("version", "preprocess", "trainer", "metrics")

_HOST = re.compile(r"\[[0-9a-fA-F:.%]+\]|[^\s/@:\[\]]+")
_FIRST_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 3.0
_PATIENCE_SECONDS = 120.0
_CLOSE_SECONDS = 1.0


class Watchable(Protocol):
    """A message of a watch stream."""

    @property
    def cursor(self) -> str:
        """Where to resume after it; empty keeps the one before."""

    def WhichOneof(self, oneof_group: Literal["what"], /) -> str | None:
        """Returns what the message brings, e.g. heartbeat."""


class Connection:
    """Lazily opened channels to the services behind one address.

    Args:
        address: host:port of the gateway, with https:// before it where its services have TLS.
        environ: Where the addresses of single services are read, and DETFLOW_TOKEN and the like.
        timeout: Seconds that a call may take unless it says otherwise.
        token: As of `Credentials`, and so the others.
        ca_file: As of `Credentials`.
        cert_file: As of `Credentials`.
        key_file: As of `Credentials`.

    Raises:
        InvalidArgument: The address is not host:port, the timeout is no time, the token cannot be
            one or would be sent without TLS to another machine, or a file of TLS is none.
    """

    def __init__(
        self,
        address: str,
        environ: Mapping[str, str],
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        *,
        token: str | None = None,
        ca_file: str = "",
        cert_file: str = "",
        key_file: str = "",
    ) -> None:
        if not 0 < timeout < math.inf:
            raise InvalidArgument(
                f"timeout {timeout!r} must be a number of seconds above 0", reason="BAD_TIMEOUT"
            )
        scheme, there, place = address.rpartition("://")
        place = place.removesuffix("/") if there else place
        host, _, port = place.rpartition(":")
        number = int(port) if re.fullmatch("[0-9]{1,5}", port) else 0
        is_known = not there or scheme in ("http", "https")
        if not (is_known and _HOST.fullmatch(host) and 0 < number < 65536 - len(SERVICES)):
            raise InvalidArgument(
                f"address {address!r} must be host:port, such as 127.0.0.1:7100, or"
                " https://host:port where it has TLS",
                reason="BAD_ADDRESS",
            )
        self.address = address
        self._credentials = Credentials(
            place,
            scheme == "https",
            environ,
            token=token,
            ca_file=ca_file,
            cert_file=cert_file,
            key_file=key_file,
        )
        self._addresses = {
            name: environ.get(f"DETFLOW_{name.upper()}_ADDRESS") or f"{host}:{number + offset}"
            for offset, name in enumerate(SERVICES, 1)
        }
        self._channels: dict[str, grpc.Channel] = {}
        self._timeout = timeout
        self._was_there = False

    def channel(self, service: str) -> grpc.Channel:
        """Returns the channel to a service; it connects with the first call."""
        if service not in self._channels:
            self._channels[service] = self._credentials.channel(self._addresses[service])
        return self._channels[service]

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        seconds: float | None = None,
    ) -> Response:
        """Calls a method with a deadline.

        A read of a detflow that has answered before is repeated until then while it cannot be
        reached: a service may be starting again.

        Args:
            method: Of a stub.
            request: What is asked.
            seconds: How long it takes where that is known; the client's timeout if that is more.

        Raises:
            DetflowError: What the service raised; Unavailable if it cannot be reached;
                DeadlineExceeded if no answer came in time.
        """
        allowed = self._timeout if seconds is None else max(seconds, self._timeout)
        deadline, backoff = time.monotonic() + allowed, _FIRST_BACKOFF_SECONDS
        while True:
            left = deadline - time.monotonic()
            try:
                with self.translated():
                    if cancelling.is_scoped():
                        call: Any = cancelling.begun(method.future(request, timeout=left))
                        response: Response = call.result()
                    else:
                        response = method(request, timeout=left)
            except Unavailable as error:
                is_away = self._was_there and error.reason == "UNREACHABLE"
                if not (is_away and _is_read(request)) or time.monotonic() + backoff > deadline:
                    raise
                cancelling.pause(backoff)
                backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)
            else:
                self._was_there = True
                return response

    def send(
        self,
        method: grpc.StreamUnaryMultiCallable[Request, Response],
        requests: Iterator[Request],
        *,
        seconds: float,
    ) -> Response:
        """Sends a stream of messages and returns the answer; nothing is repeated.

        Raises:
            DetflowError: As of `call`.
        """
        with self.translated():
            if cancelling.is_scoped():
                call: Any = cancelling.begun(method.future(requests, timeout=seconds))
                response: Response = call.result()
                return response
            return method(requests, timeout=seconds)

    def download(
        self,
        method: grpc.UnaryStreamMultiCallable[Request, HttpBody],
        request: Request,
        *,
        seconds: float,
    ) -> Generator[bytes, None, None]:
        """Yields the bytes of a file as they come; the call ends with the iterator.

        Raises:
            DetflowError: What the service raised; Unavailable if it cannot be reached.
        """
        stream = cancelling.begun(method(request, timeout=seconds))
        try:
            with self.translated():
                for part in stream:
                    yield part.data
        finally:
            stream.cancel()  # type: ignore[no-untyped-call]

    def watch(
        self,
        method: grpc.UnaryStreamMultiCallable[Request, Watched],
        request: Callable[[str], Request],
        *,
        cursor: str = "",
    ) -> Iterator[Watched]:
        """Follows a watch stream, without its heartbeats.

        When the stream breaks it is opened again with the cursor of the last message: nothing is
        missed and nothing comes twice. If the cursor has expired the watch begins again with a
        snapshot.

        Args:
            method: The watch method of a stub.
            request: Makes the request for a cursor.
            cursor: Where to begin; empty begins with a snapshot.

        Raises:
            DetflowError: What the service raised; Unavailable if it stays away for two minutes.
        """
        heard, backoff = False, _FIRST_BACKOFF_SECONDS
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            stream = cancelling.begun(method(request(cursor)))
            try:
                with self.translated():
                    for message in stream:
                        heard, backoff = True, _FIRST_BACKOFF_SECONDS
                        deadline = time.monotonic() + _PATIENCE_SECONDS
                        cursor = message.cursor or cursor
                        if message.WhichOneof("what") != "heartbeat":
                            yield message
                    return
            except OutOfRange as error:
                if error.reason != "CURSOR_EXPIRED" or not cursor:
                    raise
                cursor = ""
            except (Unavailable, ResourceExhausted):
                if not heard or time.monotonic() > deadline:
                    raise
                cancelling.pause(backoff)
                backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)
            finally:
                stream.cancel()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turns a failed call into the error the service raised."""
        try:
            yield
        except grpc.FutureCancelledError as error:
            raise Cancelled("the caller has cancelled this") from error
        except grpc.RpcError as error:
            raise self._translate(error) from error

    def _translate(self, error: grpc.RpcError) -> DetflowError:
        translated = from_rpc_error(error)
        # A service that answers says why it cannot serve; only the transport gives no details.
        if isinstance(translated, Unavailable) and translated.reason == "UNAVAILABLE":
            if not _has_details(error):
                return self._unreachable(error)
        if isinstance(translated, Unimplemented) and not _has_details(error):
            return Unimplemented(
                f"what answers at {self.address} is not this version of detflow: name the host:port"
                " of its gateway with --address",
                reason="NOT_DETFLOW",
            )
        if isinstance(translated, DeadlineExceeded) and not _has_details(error):
            return DeadlineExceeded(
                f"detflow at {self.address} has not answered in time: try again, or allow more with"
                " Client(timeout=...)"
            )
        if isinstance(translated, Unauthenticated):
            return self._unknown(translated)
        return translated

    def _unreachable(self, error: grpc.RpcError) -> Unavailable:
        # What was reached before has the right certificates, and is away for another reason.
        why = "" if self._was_there else self._credentials.explain(error)
        why = why or "start it with `detflow up`, or name another with --address"
        return Unavailable(f"cannot reach detflow at {self.address}: {why}", reason="UNREACHABLE")

    def _unknown(self, error: Unauthenticated) -> Unauthenticated:
        if self._credentials.has_token:
            message = (
                f"detflow at {self.address} does not take this token: it is another installation's,"
                " has expired or was deleted; set DETFLOW_TOKEN to one that counts"
            )
        elif self._credentials.is_starting:
            message = f"detflow at {self.address} is still starting: try again in a moment"
        else:
            message = (
                f"detflow at {self.address} wants to know who is calling: set DETFLOW_TOKEN to an"
                " API key or name a file that holds one with --token-file; for what runs on this"
                " machine, set DETFLOW_DATA_DIR to its folder"
            )
        return Unauthenticated(message, reason=error.reason, metadata=error.metadata)

    def close(self) -> None:
        """Closes all channels.

        gRPC waits for calls to end, and for one that Ctrl-C interrupted at the wrong moment it
        waits for ever: so this leaves it alone after a second.
        """
        channels = [*self._channels.values()]
        self._channels.clear()
        closing = threading.Thread(target=_close, args=(channels,), daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


def _close(channels: Sequence[grpc.Channel]) -> None:
    for channel in channels:
        channel.close()


def _is_read(request: Any) -> bool:
    return str(request.DESCRIPTOR.name).startswith(("Get", "List"))


def _has_details(error: grpc.RpcError) -> bool:
    call: Any = error  # an RpcError is also its call
    return any(entry[0] == "grpc-status-details-bin" for entry in call.trailing_metadata() or ())


def pages(fetch: Callable[[str], tuple[Sequence[Item], str]]) -> Iterator[Item]:
    """Yields the items of all pages; `fetch` gets a page token and returns (items, next token)."""
    token = ""
    while True:
        items, token = fetch(token)
        yield from items
        if not token:
            return
