"""Fuzzed requests by HTTP: REST, Connect, pages, and bytes that are no HTTP at all."""

import asyncio
import copy
import json
import struct
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any
from urllib.parse import quote

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from gateway import openapi
from gateway.routes import ANY, Binding, Router, UnsafePath, bindings, rpcs
from tests.fuzz.cases import PATIENCE_SECONDS, Outcome
from tests.fuzz.messages import TEXTS, Messages, Names, damaged

BINDINGS = list(bindings())
RPCS = list(rpcs())
ROUTER = Router(BINDINGS)
DOCUMENTED = {
    operation["operationId"]: {int(code) for code in operation["responses"]}
    for path in openapi.document(BINDINGS)["paths"].values()
    for operation in path.values()
}
PIECES = (
    *("projects", "versions", "trainings", "v1", "x1", "..", ".", "", "%2e%2e", "%252e", "%5c"),
    *("%2F", "\\", "%00", "%FF", ":watch", ":stop", "*", "-", "{name}", "a:b", "%ED%95%9C"),
    "x" * 300,
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 2**31, 2**63, 2**70, 1e300, 0.5, "", "x", "1", "NaN", "READY"),
    *("\ud800", "한국어", [], {}, [[]], [None], {"a": {"b": []}}, [{}], ["x"] * 200, "x" * 5000),
)
HEADERS = {
    "Accept-Encoding": ("gzip", "gzip;q=x", "*", ""),
    "Content-Type": ("application/json", "application/zip", "text/plain", "application/json; x"),
    "If-Match": ("*", '"1"', 'W/"1"', '"', '"a", "b"', "\xff"),
    "If-None-Match": ("*", '"1"', "\xff"),
    "If-Range": ('"1"', "\xff"),
    "Idempotency-Key": ("a", '"a b"', "", "\xff", "x" * 70),
    "Last-Event-ID": ("1", "\xff"),
    "Origin": ("http://localhost", "null", "https://evil.example"),
    "Range": ("bytes=0-1", "bytes=5-", "bytes=-0", "bytes=99999-", "lines=1", "\xff"),
    "Upload-Offset": ("0", "-1", "9" * 30),
    "X-Request-Timeout": ("5", "0", "x"),
}
PAGES = ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics", "/nothing", "/app.js")
_METHODS = ("GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS")
_LARGE_BODY = 5 << 20  # more than a JSON body may have
_BEGINNING_SECONDS = 0.05
_STREAM = b"text/event-stream"
_Headers = Mapping[str, str]


def odd_headers(rng: Random, given: _Headers) -> str:
    """Writes the given headers, with up to two odd ones among them."""
    headers = dict(given)
    for name in rng.sample(sorted(HEADERS), rng.choice((0, 0, 1, 2))):
        headers[name] = rng.choice(HEADERS[name])
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def documented(method: str, path: str) -> set[int]:
    """The statuses that a request may be answered with."""
    if not path.startswith("/v1/"):
        return {200, 304, 404, 405}  # the console has pages of its own
    try:
        match = ROUTER.find(method, path.partition("?")[0].encode())
    except UnsafePath:
        match = None
    if match is None:
        return {404}
    return DOCUMENTED[match.binding.rpc.name] if match.binding else {405}


class HttpSurface:
    """Sends cases to the gateway; each of its senders keeps a connection.

    Args:
        port: Of the gateway on this machine.
        names: Resources that there are.
        token: Shown with every request.
    """

    def __init__(self, port: int, names: Names, token: str) -> None:
        self._port = port
        self._names = names
        self._given = {"Host": "localhost"}
        if token:
            self._given["Authorization"] = f"Bearer {token}"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def send(self, rng: Random) -> Outcome:
        """Sends the case that `rng` makes."""
        kind = rng.random()
        if kind < 0.6:
            return await self._send_rest(rng)
        if kind < 0.93:
            return await self._send_connect(rng)
        if kind < 0.95:
            return await self._send_page(rng)
        return await self._send_garbage(rng)

    async def _send_rest(self, rng: Random) -> Outcome:
        binding = rng.choice(BINDINGS)
        message = Messages(rng, self._names).make(binding.rpc.input_type)
        method = binding.http_method if rng.random() < 0.9 else rng.choice(_METHODS)
        path = self._path(rng, binding) + _query(rng, binding, message)
        data = b"" if method in ("GET", "HEAD") else _body(rng, binding, message)
        return await self._exchange(rng, method, path, {}, data, binding.rpc.name)

    async def _send_connect(self, rng: Random) -> Outcome:
        binding = rng.choice(RPCS)
        message = Messages(rng, self._names).make(binding.rpc.input_type)
        codec = rng.choice(("json", "proto"))
        data = _json(rng, message) if codec == "json" else message.SerializeToString()
        if rng.random() < 0.2:
            data = damaged(rng, data)
        kind = f"application/{codec}"
        if binding.rpc.server_streaming:
            kind = f"application/connect+{codec}"
            flags, length = rng.choice(((0, len(data)),) * 8 + ((1, 3), (2, len(data)), (9, 2**31)))
            data = struct.pack(">BI", flags, length) + data
        headers = {"Content-Type": kind, "Connect-Protocol-Version": rng.choice("1112")}
        if rng.random() < 0.1:
            headers["Connect-Timeout-Ms"] = rng.choice(("1", "0", "-1", "x", "9" * 11))
        path = binding.template.text if rng.random() < 0.98 else binding.template.text + "x"
        return await self._exchange(rng, "POST", path, headers, data, f"connect {binding.rpc.name}")

    async def _send_page(self, rng: Random) -> Outcome:
        path = rng.choice(PAGES) + rng.choice(("", "", "?x", "/..", "/%2e%2e/%2e%2e/etc/passwd"))
        return await self._exchange(rng, rng.choice(_METHODS), path, {}, b"", "page")

    async def _send_garbage(self, rng: Random) -> Outcome:
        """Sends what is hardly HTTP, and sees the connection closed or refused."""
        head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        data = rng.choice(
            (
                rng.randbytes(rng.choice((1, 10, 1000))),
                damaged(rng, head),
                head[:-2] + b"X: " + b"y" * rng.choice((10, 70_000)) + b"\r\n\r\n",
                head[:-2] + b"Content-Length: -1\r\n\r\n",
                head[:-2] + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nzz\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(20),
                b"\x16\x03\x01" + rng.randbytes(200),
            )
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(data)
        writer.write_eof()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                answer = await reader.read(4096)
        except (ConnectionError, TimeoutError):
            answer = b""
        finally:
            writer.close()
        code = answer.split(b" ", 2)[1:2]
        is_fault = bool(code) and code[0].startswith(b"5")
        problem = answer[:1000].decode("latin-1") * is_fault
        return Outcome(f"garbage {b''.join(code).decode('latin-1')[:3]}", problem, data.hex())

    def _path(self, rng: Random, binding: Binding) -> str:
        """Writes a path of the route, that of a resource where one fits."""
        template = binding.template.segments
        fitting = [
            name.split("/")
            for name in self._names.names
            if len(name.split("/")) <= len(template) - 1
            and all(a in (ANY, b) for a, b in zip(template[1:], name.split("/"), strict=False))
        ]
        segments = list(template)
        if fitting and rng.random() < 0.9:
            chosen = rng.choice(sorted(fitting, key=len)[-3:])
            segments[1 : 1 + len(chosen)] = chosen
        segments = ["x1" if one == ANY else one for one in segments]
        if rng.random() < 0.15:
            for _ in range(rng.randrange(3)):
                segments[rng.randrange(len(segments))] = rng.choice(PIECES)
            if rng.random() < 0.2:
                segments.append(rng.choice(PIECES))
        verb = binding.template.verb if rng.random() < 0.95 else rng.choice(("", "x", ":"))
        return f"/{'/'.join(segments)}" + (f":{verb}" if verb else "")

    async def _exchange(
        self, rng: Random, method: str, path: str, headers: _Headers, data: bytes, what: str
    ) -> Outcome:
        if rng.random() < 0.001:
            data = b" " * _LARGE_BODY
        head = f"{method} {path} HTTP/1.1\r\n"
        odd = odd_headers(rng, {"Content-Type": "application/json", **headers})
        given = "".join(f"{name}: {value}\r\n" for name, value in self._given.items())
        length = f"Content-Length: {len(data)}\r\n\r\n"
        sent = f"{head}{odd}\n{data[:3000]!r}"
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                code, body = await self._ask((head + given + odd + length).encode("latin-1"), data)
        except TimeoutError:
            return Outcome(f"{what} slow", "", sent)
        expected = documented(method, path) | {403}  # to who is no page of this host
        if path.startswith("/detflow."):
            expected = set(range(200, 500)) | {501, 504}  # no such stream or method; no time
        if len(data) == _LARGE_BODY:
            expected |= {413}
        wrong = code not in expected or code in (401, 500, 503)
        return Outcome(f"{what} {code}", f"{code} {body[:1000]!r}" * wrong, sent)

    async def _ask(self, head: bytes, data: bytes) -> tuple[int, bytes]:
        """Sends a request on an idle connection, or on a new one if that is closed by now."""
        while True:
            fresh = not self._idle
            if fresh:
                pair = await asyncio.open_connection("127.0.0.1", self._port)
            else:
                pair = self._idle.pop()
            try:
                return await self._ask_on(*pair, head, data)
            except (ConnectionError, asyncio.IncompleteReadError):
                pair[1].close()
                if fresh:
                    return 0, b"the connection was closed without an answer"
            except BaseException:
                pair[1].close()
                raise

    async def _ask_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes, data: bytes
    ) -> tuple[int, bytes]:
        writer.write(head + data)
        answer = await reader.readuntil(b"\r\n\r\n")
        code = int(answer.split(b" ", 2)[1])
        low = answer.lower()
        if _STREAM in low or b"connect+" in low:  # it may go on forever
            await asyncio.wait({asyncio.create_task(reader.read(4096))}, timeout=_BEGINNING_SECONDS)
            writer.close()
            return code, b""
        body = b""
        if not head.startswith(b"HEAD ") and code not in (204, 304):
            body = await _read_body(reader, low)
        if b"connection: close" in low:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return code, body


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    if b"transfer-encoding: chunked" not in head:
        length = head.partition(b"content-length: ")[2].split(b"\r\n")[0]
        return await reader.readexactly(int(length))
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


def _query(rng: Random, binding: Binding, message: Message) -> str:
    """Writes some fields of a message, and odd ones, as query parameters."""
    pairs: list[tuple[str, str]] = []
    if binding.body != "*":
        for field, value in message.ListFields():
            if field.message_type is None and rng.random() < 0.7:
                for one in list(value)[:250] if field.is_repeated else [value]:
                    if field.enum_type is not None and one in field.enum_type.values_by_number:
                        one = field.enum_type.values_by_number[one].name
                    pairs.append((field.json_name, str(one)))
    names = [field.json_name for field in binding.rpc.input_type.fields] + ["a.b", "", "cursor"]
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        pairs.append((rng.choice(names), rng.choice(TEXTS[:-6])))
    text = "&".join(f"{quote(k)}={quote(v[:2000], errors='replace')}" for k, v in pairs)
    if rng.random() < 0.02:
        text += rng.choice(("&%FF=1", "&=&&;", "&a=%", "&x" * 300))
    return f"?{text}" if text else ""


def _body(rng: Random, binding: Binding, message: Message) -> bytes:
    if not binding.body:
        return rng.randbytes(rng.choice((0, 0, 0, 20, 2000)))
    if binding.body != "*":
        message = getattr(message, binding.body)
    return _json(rng, message)


def _json(rng: Random, message: Message) -> bytes:
    """Writes a message as JSON, some of it replaced by what does not belong there."""
    try:
        value: Any = json_format.MessageToDict(message)
    except (json_format.SerializeToJsonError, DecodeError, ValueError, TypeError):  # NaN, no moment
        value = {}
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        _replace_something(rng, value)
    if rng.random() < 0.03:
        value = rng.choice(ODD)
    text = json.dumps(value)
    if rng.random() < 0.05:
        return damaged(rng, text.encode())
    if rng.random() < 0.01:
        return b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 5000
    return text.encode()


def _replace_something(rng: Random, value: Any) -> None:
    while True:
        keys: Sequence[Any] = list(value) if isinstance(value, dict) else range(len(value))
        if not keys:
            return
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            value = inner
            continue
        value[key] = copy.deepcopy(rng.choice(ODD))
        return
