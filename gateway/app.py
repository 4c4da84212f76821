"""The ASGI application: a few pages, and everything under /v1/ by the routes of the descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import secrets
import time
from collections.abc import Iterator, MutableMapping
from typing import Any

from google.protobuf.message import Message
from prometheus_client import Counter, Gauge, Histogram
from starlette.requests import Request

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.settings import Settings
from detflow.v1 import access_pb2
from gateway import backends as channels
from gateway import (
    compression,
    conditions,
    connect,
    credentials,
    download,
    errors,
    security,
    site,
    stream,
    system,
    transcode,
    upload,
)
from gateway.backends import Backends
from gateway.body import read as read_body
from gateway.body import read_json
from gateway.errors import HttpError
from gateway.login import Login
from gateway.protocol import ABORT
from gateway.routes import Binding, Router, UnsafePath
from gateway.sessions import Sessions
from gateway.stream import ClientGone, Receive, Send

Scope = MutableMapping[str, Any]
Headers = dict[bytes, bytes]

MAX_CALLS = 1024
"""Calls under way at once, streams of events not counted; beyond it callers are told to come back.

Each holds a request in memory, and a place in the queue of a service that does not keep up."""

log = telemetry.get_logger(__name__)

_REQUESTS = Counter("http_requests", "Answered HTTP requests", ["route", "method", "code"])
_SECONDS = Histogram(
    "http_request_duration_seconds",
    "Time from a request to the last byte of its answer",
    ["route"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
_STREAMS = Gauge("detflow_gateway_open_streams", "Open SSE streams")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TRACE = ("traceparent", "tracestate")
_JSON = (b"content-type", b"application/json")


class Gateway:
    """The whole gateway as one ASGI application; close with `await close()`.

    Args:
        backends: Open channels.
        settings: Where it listens, who may sign in, how large files may be.

    Raises:
        InvalidArgument: MISSING_SETTING or BAD_SETTING.
    """

    def __init__(self, backends: Backends, settings: Settings) -> None:
        self.draining = asyncio.Event()
        """Set to end streams and to be no longer ready."""
        self._backends = backends
        self._router = Router(backends.bindings)
        self._connect = connect.Connect(backends, self.draining, self._call_under_way)
        self._address = security.Address.of(settings)
        self._max_upload_bytes = settings.max_upload_bytes
        sessions = Sessions(backends.channel("version"), settings.service_token)
        self._login = Login(sessions, settings, self._address)
        self._pages = {
            **system.documents(backends.bindings),
            **system.probes(self.readiness),
            **self._login.pages(),
        }
        if not settings.metrics_listen:  # else they have a port of their own
            is_open = self._address.loopback and not self._address.public
            self._pages |= system.metrics(None if is_open else self._check_token)
        self._site = site.Site()
        self._num_calls = 0

    async def close(self) -> None:
        """Closes what the gateway has opened itself."""
        await self._login.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway speaks HTTP only, not {scope['type']}")
        headers: Headers = dict(scope["headers"])
        given = {name: headers.get(name.encode(), b"").decode("latin-1") for name in _TRACE}
        with telemetry.span(f"HTTP {scope['method']}", given):
            await self._answer(scope, headers, receive, send)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope["detflow.request_id"] = request_id
        answer = _Answer(send, request_id, is_secure=self._address.is_secure)
        answer.is_connect = scope["path"].startswith(connect.PREFIX)
        route = "page"
        try:
            security.check_host(headers, self._address, scope["path"])
            has_cookie = credentials.use_cookie(headers, self._address)
            security.check_origin(scope["method"], headers, self._address, has_cookie=has_cookie)
            if scope["path"].startswith("/v1/"):
                route = "unknown"
                binding, values = self._find(scope["method"], scope["raw_path"])
                route = binding.rpc.name
                with self._call_under_way(binding):
                    await self._call(binding, values, scope, headers, receive, answer, request_id)
            elif answer.is_connect:
                route = "unknown"
                call = self._connect.find(scope["method"], scope["path"], headers)
                route = call.binding.rpc.name
                await self._connect.answer(call, headers, request_id, receive, answer.send)
            else:
                await self._page(scope, receive, answer)
        except ClientGone:
            log.info("broken off by the client", route=route, request_id=request_id)
        except Exception as error:
            await self._fail(error, route, answer, request_id, headers)
            if answer.broken:
                scope["extensions"][ABORT]["abort"]()
                await stream.disconnected(receive)
        finally:
            self._count(scope, route, answer, time.perf_counter() - begin, request_id)

    def _count(
        self, scope: Scope, route: str, answer: _Answer, seconds: float, request_id: str
    ) -> None:
        _REQUESTS.labels(route, scope["method"], answer.code).inc()
        _SECONDS.labels(route).observe(seconds)
        telemetry.describe(
            f"HTTP {scope['method']} {route}", **{"http.response.status_code": answer.code}
        )
        if scope["method"] not in ("GET", "HEAD") or answer.code >= 400:
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                route=route,
                code=answer.code,
                seconds=round(seconds, 4),
                request_id=request_id,
            )

    async def _page(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        by_method = self._pages.get(scope["path"])
        if by_method is None:
            file = self._site.find(scope["path"])
            if file is None:
                raise _no_route()
            by_method = {"GET": file}
        method = scope["method"]
        page = by_method.get("GET" if method == "HEAD" else method)
        if page is None:
            raise _wrong_method(("GET", "HEAD") if "GET" in by_method else tuple(by_method))
        response = await page(Request(scope, receive))
        await response(scope, receive, answer.send)

    @contextlib.contextmanager
    def _call_under_way(self, binding: Binding) -> Iterator[None]:
        """Counts a call while it is under way.

        Raises:
            Unavailable: GATEWAY_BUSY.
        """
        if binding.is_event_stream:  # the limit of connections is theirs
            yield
            return
        if self._num_calls >= MAX_CALLS:
            raise Unavailable(
                f"{MAX_CALLS} calls are under way already; come back in a moment",
                reason="GATEWAY_BUSY",
                retry_seconds=1,
            )
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    async def _check_token(self, request: Request) -> None:
        """Takes everybody whose token counts.

        Raises:
            grpc.aio.AioRpcError: UNAUTHENTICATED.
        """
        headers: Headers = dict(request.headers.raw)
        credentials.use_cookie(headers, self._address)
        metadata = channels.metadata_of(headers, request.scope["detflow.request_id"])
        await self._backends.ask("GetPrincipal", access_pb2.GetPrincipalRequest(), metadata)

    def _find(self, method: str, raw_path: bytes) -> tuple[Binding, tuple[str, ...]]:
        try:
            match = self._router.find(method, raw_path)
        except UnsafePath:
            match = None
        if match is None:
            raise _no_route()
        if match.binding is None:
            raise _wrong_method(match.allowed)
        return match.binding, match.values

    async def _call(
        self,
        binding: Binding,
        values: tuple[str, ...],
        scope: Scope,
        headers: Headers,
        receive: Receive,
        answer: _Answer,
        request_id: str,
    ) -> None:
        metadata = channels.metadata_of(headers, request_id)
        if binding.rpc.client_streaming:
            kind = upload.KINDS[binding.rpc.name]
            max_bytes = kind.limit(self._max_upload_bytes)
            upload.check_headers(kind, headers, max_bytes)
            opening: Any = transcode.decode_request(binding, values, scope["query_string"], None)
            conditions.apply(binding, opening, headers)
            if kind.is_resumable:
                opening.start.offset = upload.read_offset(headers)
            call = self._backends.upload(binding, metadata)
            response = await upload.pass_on(call, opening, receive, max_bytes, kind)
            await answer.json(200, transcode.encode(response), upload.offset_headers(response))
            return
        # Of a body where none belongs it doesn't matter what type it has.
        body = await (read_json if binding.body else read_body)(headers, receive)
        request = transcode.decode_request(binding, values, scope["query_string"], body)
        conditions.apply(binding, request, headers)
        if binding.is_download:
            call = self._backends.stream(binding, request, metadata)
            describe = functools.partial(self._backends.describe, binding, values[0], metadata)
            is_head = scope["method"] == "HEAD"
            await download.send_file(call, describe, headers, receive, answer.send, is_head=is_head)
            return
        if binding.rpc.server_streaming:
            await self._stream(binding, request, headers, receive, answer, metadata, request_id)
            return
        check = channels.is_check(request)
        timeout = channels.timeout_seconds(headers, check=check)
        work = self._backends.unary(binding, request, timeout, metadata)
        # A check can take minutes of a whole machine; nobody may be waiting for it any more.
        response = await (stream.unless_gone(work, receive) if check else work)
        extra = upload.offset_headers(response)
        etag = conditions.etag_of(response)
        if etag:
            extra["etag"] = etag
            if binding.http_method == "GET":
                extra["cache-control"] = "private, no-cache"
                if conditions.names(headers.get(b"if-none-match", b""), etag):
                    await answer.empty(304, extra)
                    return
        encoded = transcode.encode(response)
        if binding.http_method == "GET" and not etag:  # a strong ETag is of these very bytes
            extra["vary"] = "accept-encoding"
            if len(encoded) >= compression.MIN_BYTES and compression.is_welcome(
                headers.get(b"accept-encoding", b"")
            ):
                encoded = await compression.pack(encoded)
                extra["content-encoding"] = "gzip"
        await answer.json(200, encoded, extra)

    async def _stream(
        self,
        binding: Binding,
        request: Message,
        headers: Headers,
        receive: Receive,
        answer: _Answer,
        metadata: channels.Metadata,
        request_id: str,
    ) -> None:
        stream.resume(request, headers)
        call = self._backends.stream(binding, request, metadata)
        with _STREAMS.track_inprogress():
            await stream.send_events(call, receive, answer.send, self.draining, request_id)

    async def _fail(
        self, error: Exception, route: str, answer: _Answer, request_id: str, given: Headers
    ) -> None:
        code, headers, body = errors.answer(error, request_id, is_conditional=b"if-match" in given)
        if answer.is_connect:
            body = connect.error_body(error, request_id)
        if code >= 500 or answer.started:
            log.warning(
                "request failed",
                route=route,
                code=code,
                request_id=request_id,
                error=repr(error)[:2000],
                exc_info=code == 500,
            )
        if answer.started:  # too late to say so
            answer.code, answer.broken = code, True
        else:
            await answer.json(code, body, headers)

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether every service answers its health check, and what each says."""
        services = await self._backends.health()
        ready = not self.draining.is_set() and all(s == "SERVING" for s in services.values())
        state = "DRAINING" if self.draining.is_set() else "READY" if ready else "NOT_READY"
        return ready, {"status": state, "services": services}


class _Answer:
    """Sends the answer of one request, with the headers that every answer has."""

    __slots__ = ("_headers", "_send", "broken", "code", "is_connect", "started")

    def __init__(self, send: Send, request_id: str, *, is_secure: bool) -> None:
        self._send = send
        self._headers = [*security.BASE_HEADERS, (b"x-request-id", request_id.encode())]
        if is_secure:
            self._headers.append(security.HSTS)
        self.code = 499  # until something is sent
        self.started = False
        self.broken = False
        self.is_connect = False  # errors have the shape of that protocol

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """ASGI send."""
        if message["type"] == "http.response.start":
            self.started = True
            self.code = message["status"]
            given = [*message.get("headers", ())]
            names = {name for name, _ in given}
            if b"content-security-policy" not in names:
                given.append((b"content-security-policy", security.CLOSED_POLICY))
            if b"cache-control" not in names:
                given.append((b"cache-control", b"no-store"))
            message["headers"] = [*given, *self._headers]
        await self._send(message)

    async def json(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Sends a whole JSON answer."""
        length = (b"content-length", str(len(body)).encode())
        await self._whole(code, [_JSON, length], headers or {}, body)

    async def empty(self, code: int, headers: dict[str, str]) -> None:
        """Sends an answer that cannot have a body."""
        await self._whole(code, [], headers, b"")

    async def _whole(
        self, code: int, first: list[tuple[bytes, bytes]], headers: dict[str, str], body: bytes
    ) -> None:
        extra = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        await self.send(
            {"type": "http.response.start", "status": code, "headers": [*first, *extra]}
        )
        await self.send({"type": "http.response.body", "body": body})


def _no_route() -> HttpError:
    return HttpError(
        404, "NOT_FOUND", "there is nothing at this path; see /docs", reason="NO_ROUTE"
    )


def _wrong_method(allowed: tuple[str, ...]) -> HttpError:
    names = ", ".join(allowed)
    return HttpError(
        405,
        "UNIMPLEMENTED",
        f"this path takes {names}",
        reason="METHOD_NOT_ALLOWED",
        headers={"allow": names},
    )
