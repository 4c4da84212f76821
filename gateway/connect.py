"""The Connect protocol (connectrpc.com/docs/protocol), version 1: RPCs at /package.Service/Method.

Unary RPCs are `application/json` or `application/proto` both ways, errors are JSON with the HTTP
status of their code. Server streams are `application/connect+json` or `application/connect+proto`:
messages in envelopes (a byte of flags, four of length), the last of which says how it ended, so
these answer 200 even when they fail. Nothing is compressed. RPCs that stream to the server have
routes of their own under /v1/.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import struct
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import orjson
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from prometheus_client import Gauge

from detflow import telemetry
from detflow.errors import DeadlineExceeded, InvalidArgument, Unavailable, Unimplemented
from gateway import backends as channels
from gateway import body, errors, stream, transcode
from gateway.backends import Backends
from gateway.errors import HttpError
from gateway.routes import Binding
from gateway.stream import EOF, ClientGone, Receive, Send

PREFIX = "/detflow.v1."
"""How the paths begin."""

log = telemetry.get_logger(__name__)

_STREAMS = Gauge("detflow_gateway_open_connect_streams", "Open streams of the Connect protocol")
_END, _COMPRESSED = 2, 1  # flags of an envelope
_HEAD = struct.Struct(">BI")
_TIMEOUT = re.compile(rb"[0-9]{1,10}")
_JSON, _PROTO = "json", "proto"


@dataclass(frozen=True, slots=True)
class Call:
    """A call whose headers are checked.

    Attributes:
        codec: "json" or "proto".
        timeout_seconds: What the caller asks for, or None.
    """

    binding: Binding
    codec: str
    timeout_seconds: float | None

    @property
    def media_type(self) -> bytes:
        """Content-Type, both ways."""
        kind = "connect+" if self.binding.rpc.server_streaming else ""
        return f"application/{kind}{self.codec}".encode()

    def decode(self, data: bytes) -> Message:
        """Reads the request.

        Raises:
            InvalidArgument: It is none.
        """
        if self.codec == _JSON:
            return transcode.decode_request(self.binding, (), b"", data)
        try:
            return self.binding.request.FromString(data)
        except DecodeError as error:
            raise InvalidArgument(
                f"the body is no {self.binding.rpc.input_type.full_name} in protobuf's encoding",
                reason="MALFORMED_PROTO",
            ) from error

    def encode(self, message: Message) -> bytes:
        """Renders an answer."""
        return transcode.encode(message) if self.codec == _JSON else message.SerializeToString()


class Connect:
    """Finds and answers calls.

    Args:
        backends: Open channels.
        draining: Set when streams are to end.
        under_way: Entered around each call; it may refuse.
    """

    def __init__(
        self,
        backends: Backends,
        draining: asyncio.Event,
        under_way: Callable[[Binding], AbstractContextManager[None]],
    ) -> None:
        self._backends = backends
        self._draining = draining
        self._under_way = under_way
        self._bindings = {one.grpc_path: one for one in backends.rpcs}

    def find(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Call:
        """Returns what is called, and how.

        Raises:
            HttpError: 404, 405 or 415.
            InvalidArgument: A header is wrong.
            Unimplemented: The RPC takes a stream, or the body is compressed.
        """
        binding = self._bindings.get(path)
        if binding is None:
            raise HttpError(
                404,
                "UNIMPLEMENTED",
                f"there is no RPC {path[1:]!r}; the protos have the names of services and methods",
                reason="NO_RPC",
            )
        if method != "POST":
            raise HttpError(
                405,
                "UNIMPLEMENTED",
                "RPCs are called with POST",
                reason="METHOD_NOT_ALLOWED",
                headers={"allow": "POST"},
            )
        if binding.rpc.client_streaming:
            raise Unimplemented(
                f"{binding.rpc.name} takes a stream, which HTTP does not carry here: send the "
                "file to its route under /v1/ (see /docs), or call the service by gRPC",
                reason="CLIENT_STREAM",
            )
        if headers.get(b"connect-protocol-version", b"1") != b"1":
            raise InvalidArgument(
                "the Connect-Protocol-Version must be 1", reason="BAD_PROTOCOL_VERSION"
            )
        call = Call(binding, _codec(binding, headers), _timeout_seconds(headers))
        streams = binding.rpc.server_streaming
        name = b"connect-content-encoding" if streams else b"content-encoding"
        if headers.get(name, b"identity") != b"identity":
            raise Unimplemented(
                "compressed messages are not read; send them as they are (identity)",
                reason="UNSUPPORTED_ENCODING",
            )
        return call

    async def answer(
        self,
        call: Call,
        headers: Mapping[bytes, bytes],
        request_id: str,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answers a call; a stream to its end, of which failing is a way.

        Raises:
            ClientGone: The client left.
            Exception: A unary call failed; `error_body` renders it.
        """
        if call.binding.rpc.server_streaming:
            with _STREAMS.track_inprogress():
                await self._answer_stream(call, headers, request_id, receive, send)
            return
        with self._under_way(call.binding):
            data = await self._answer_unary(call, headers, request_id, receive)
        length = (b"content-length", str(len(data)).encode())
        await send(_start(call, length))
        await send(_part(data, more=False))

    async def _answer_unary(
        self, call: Call, headers: Mapping[bytes, bytes], request_id: str, receive: Receive
    ) -> bytes:
        request = call.decode(await body.read(headers, receive))
        check = channels.is_check(request)
        seconds = channels.CHECK_TIMEOUT_SECONDS if check else channels.MAX_TIMEOUT_SECONDS
        default = seconds if check else channels.DEFAULT_TIMEOUT_SECONDS
        asked = default if call.timeout_seconds is None else call.timeout_seconds
        work = self._backends.unary(
            call.binding, request, min(asked, seconds), channels.metadata_of(headers, request_id)
        )
        return call.encode(await (stream.unless_gone(work, receive) if check else work))

    async def _answer_stream(
        self,
        call: Call,
        headers: Mapping[bytes, bytes],
        request_id: str,
        receive: Receive,
        send: Send,
    ) -> None:
        seconds = call.timeout_seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        end: dict[str, Any] = {}
        started = False
        try:
            request = call.decode(_only_envelope(await body.read(headers, receive)))
            metadata = channels.metadata_of(headers, request_id)
            grpc_call = self._backends.stream(call.binding, request, metadata)
            async with contextlib.aclosing(
                self._messages(grpc_call, receive, deadline)
            ) as messages:
                async for message in messages:
                    if not started:
                        started = True
                        await send(_start(call))
                    if message is not None:
                        await send(_part(_envelope(0, call.encode(message)), more=True))
        except ClientGone:
            raise
        except Exception as error:
            status = errors.status_of(error, request_id)
            log.warning(
                "stream failed",
                route=call.binding.rpc.name,
                status=errors.name_of(status),
                request_id=request_id,
                error=repr(error)[:2000],
                exc_info=errors.http_of(status) == 500,
            )
            end = {"error": _error(status)}
        if not started:
            await send(_start(call))
        await send(_part(_envelope(_END, orjson.dumps(end)), more=False))

    async def _messages(
        self, call: Any, receive: Receive, deadline: float | None
    ) -> AsyncGenerator[Message | None, None]:
        """Yields the messages of a gRPC call, which ends with the iterator; None: it is open.

        Raises:
            ClientGone: The client left.
            DeadlineExceeded: The deadline (of time.monotonic) has passed.
            grpc.aio.AioRpcError: The call failed.
            Unavailable: The gateway is about to stop.
        """
        gone = asyncio.create_task(stream.disconnected(receive))
        drain = asyncio.create_task(self._draining.wait())
        reading: asyncio.Task[Any] | None = None
        opening = time.monotonic() + stream.FIRST_MESSAGE_SECONDS
        opened = False
        try:
            while True:
                reading = reading or asyncio.create_task(call.read())
                until = [one for one in (deadline, None if opened else opening) if one is not None]
                seconds = max(min(until) - time.monotonic(), 0) if until else None
                await asyncio.wait(
                    {reading, gone, drain}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done():
                    raise ClientGone
                if reading.done():
                    message = reading.result()
                    reading = None
                    if message is EOF:
                        return
                    yield message
                elif drain.done():
                    raise Unavailable(
                        "the gateway restarts; watch again with the last cursor",
                        reason="RESTARTING",
                        retry_seconds=1,
                    )
                elif deadline is not None and time.monotonic() >= deadline:
                    raise DeadlineExceeded("the time that the call was given is over")
                else:
                    yield None
                opened = True
        finally:
            call.cancel()
            tasks = [task for task in (gone, drain, reading) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def error_body(error: BaseException, request_id: str) -> bytes:
    """Returns the body of an answer that is an error, for any exception."""
    return orjson.dumps(_error(errors.status_of(error, request_id)))


def _error(status: status_pb2.Status) -> dict[str, Any]:
    name = errors.name_of(status)
    readable = errors.body_of(status, errors.http_of(status))["error"]["details"]
    return {
        "code": "canceled" if name == "CANCELLED" else name.lower(),
        "message": status.message,
        "details": [
            {
                "type": detail.TypeName(),
                "value": base64.b64encode(detail.value).rstrip(b"=").decode(),
                "debug": debug,
            }
            for detail, debug in zip(status.details, readable, strict=True)
        ],
    }


def _codec(binding: Binding, headers: Mapping[bytes, bytes]) -> str:
    kind = "application/connect+" if binding.rpc.server_streaming else "application/"
    text = headers.get(b"content-type", b"").decode("latin-1").lower()
    media_type, _, parameters = text.partition(";")
    charset = parameters.strip().removeprefix("charset=").strip('"')
    codec = media_type.strip().removeprefix(kind)
    if f"{kind}{codec}" != media_type.strip() or codec not in (_JSON, _PROTO):
        codec = ""
    if not codec or charset not in ("", "utf-8"):
        raise HttpError(
            415,
            "INVALID_ARGUMENT",
            f"send {binding.rpc.name} as Content-Type: {kind}{_JSON} or {kind}{_PROTO}, "
            f"not {text!r}",
            reason="UNSUPPORTED_MEDIA_TYPE",
            headers={"accept-post": f"{kind}{_JSON}, {kind}{_PROTO}"},
        )
    return codec


def _timeout_seconds(headers: Mapping[bytes, bytes]) -> float | None:
    text = headers.get(b"connect-timeout-ms")
    if text is None:
        return None
    if not _TIMEOUT.fullmatch(text) or not int(text):
        raise InvalidArgument(
            "Connect-Timeout-Ms must be a positive number of milliseconds, such as 10000",
            reason="BAD_TIMEOUT",
        )
    return int(text) / 1000


def _only_envelope(data: bytes) -> bytes:
    """Returns what is in the one envelope of a request.

    Raises:
        InvalidArgument: It is not exactly one.
        Unimplemented: It is compressed.
    """
    flags, length = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else (0, -1)
    if length != len(data) - _HEAD.size or flags & _END:
        raise InvalidArgument(
            "the body must be one envelope: a byte of flags, four of length, and the message",
            reason="BAD_ENVELOPE",
        )
    if flags & _COMPRESSED:
        raise Unimplemented(
            "compressed messages are not read; send them as they are (identity)",
            reason="UNSUPPORTED_ENCODING",
        )
    return data[_HEAD.size :]


def _envelope(flags: int, data: bytes) -> bytes:
    return _HEAD.pack(flags, len(data)) + data


def _start(call: Call, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    kind = (b"content-type", call.media_type)
    return {"type": "http.response.start", "status": 200, "headers": [kind, *headers]}


def _part(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
