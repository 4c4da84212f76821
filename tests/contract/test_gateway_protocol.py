"""What is no proper HTTP, on raw connections: bounded, answered in one shape, and harmless."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from itertools import repeat
from typing import Any

import pytest

from detflow.v1 import trainer_pb2
from gateway import app, protocol
from gateway.protocol import MAX_HEAD_BYTES
from tests.gateway_rig import Rig, running

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = (
    b"POST /v1/projects/p/versions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
PIECE = b"a" * 65536


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


async def flood(rig: Rig, pieces: Iterable[bytes]) -> tuple[int, bytes]:
    """Sends pieces until the gateway has had enough; returns how many bytes it took, its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    num_bytes = 0
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            num_bytes += len(piece)
            await asyncio.sleep(0)  # lets the gateway, on the same loop, read
    except ConnectionError:
        pass
    try:
        answer = await reader.read()
    except ConnectionError:  # it closed before all was read, which drops its answer
        answer = b""
    writer.close()
    return num_bytes, answer


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (GET + b"X-A: ", PIECE),
        (GET, b"X-A: " + PIECE[:60000] + b"\r\n"),
        (b"GET /", PIECE),
        (POST + b"2;", PIECE),
        (POST + b"2\r\n{}\r\n0\r\nX-A: ", PIECE),
        (POST + b"2\r\n{}\r\n0\r\n", b"X-A: " + PIECE[:60000] + b"\r\n"),
    ],
    ids=["one header", "headers", "url", "chunk extension", "one trailer", "trailers"],
)
async def test_endless_head_is_cut_off(rig: Rig, start: bytes, piece: bytes) -> None:
    num_bytes, answer = await flood(rig, [start, *repeat(piece, 1000)])
    assert num_bytes < 20_000_000  # of 65: what the kernel and asyncio hold
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert (await rig.http.get("/healthz")).status_code == 200


async def test_too_many_headers_are_431_in_the_shape_of_every_error(rig: Rig) -> None:
    code, body = await rig.raw(GET + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n")
    assert code == 431
    error = json.loads(body)["error"]
    assert error["details"][0]["reason"] == "HEADERS_TOO_LARGE"
    assert str(MAX_HEAD_BYTES) in error["message"]


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\0\xa5", b"FOO / HTTP/1.1\r\n\r\n", POST + b"zz\r\nhello\r\n"],
    ids=["TLS", "method", "chunk size"],
)
async def test_what_is_no_http_is_400_in_the_shape_of_every_error(
    rig: Rig, request_bytes: bytes
) -> None:
    code, body = await rig.raw(request_bytes)
    assert code == 400
    assert json.loads(body)["error"]["details"][0]["reason"] == "MALFORMED_HTTP"


NOWHERE = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nx"


@pytest.mark.parametrize(
    ("request_bytes", "behind"),
    [
        (b"", b""),
        (b"", GET),
        (GET + b"\r\n", GET),
        (GET + b"\r\n", b"\r\n"),
        (NOWHERE, b"x"),
    ],
    ids=["nothing", "a head", "another head", "blank lines", "the body of what was answered"],
)
async def test_connection_that_sends_no_request_is_ended(
    rig: Rig, request_bytes: bytes, behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    async with asyncio.timeout(20):
        if request_bytes:
            writer.write(request_bytes)
            await reader.readuntil(b"}")
        writer.write(behind)
        answer = await reader.read()
    assert b"HTTP/1.1 408 " in answer and b'"HEADERS_TIMEOUT"' in answer
    writer.close()


async def test_answer_may_take_longer_than_a_head(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)

    async def reply(_request: Any, _context: Any) -> Any:
        await asyncio.sleep(0.3)  # the work
        return trainer_pb2.ListModelsResponse()

    rig.backend.replies["ListModels"] = reply
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    async with asyncio.timeout(20):
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal")
        await reader.readuntil(b'{"models":[]}')
        writer.write(b"thz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).endswith(b'{"status":"ALIVE"}')
    writer.close()


async def test_connections_beyond_the_limit_are_told_to_come_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 1)
    assert (await rig.http.get("/healthz")).status_code == 200  # and stays open
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in answer
    assert b'"TOO_MANY_CONNECTIONS"' in answer
    assert (await rig.http.get("/healthz")).status_code == 200


async def test_calls_beyond_the_limit_are_told_to_come_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_CALLS", 1)
    began, release = asyncio.Event(), asyncio.Event()

    async def reply(_request: Any, _context: Any) -> Any:
        began.set()
        await release.wait()
        return trainer_pb2.ListModelsResponse()

    rig.backend.replies["ListModels"] = reply
    first = asyncio.create_task(rig.http.get("/v1/models"))
    await began.wait()
    rpc = "/detflow.v1.ProjectService/ListProjects"
    for refused in (await rig.http.get("/v1/projects"), await rig.http.post(rpc, json={})):
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "GATEWAY_BUSY" in refused.text
    for path in ("/healthz", "/", "/v1/projects/p/versions:watch"):  # neither pages nor streams
        assert (await rig.http.get(path)).status_code == 200
    release.set()
    assert (await first).status_code == 200
    assert (await rig.http.get("/v1/projects")).status_code == 200


async def test_tiny_chunks_and_pipelined_requests_are_no_flood(rig: Rig) -> None:
    text = b" " * 100_000 + b'{"dataset": "projects/p/datasets/d"}'
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in text) + b"0\r\n\r\n"
    code, _ = await rig.raw(POST + body)
    assert code == 200
    code, rest = await rig.raw((GET + b"\r\n") * 3000 + GET + b"Connection: close\r\n\r\n")
    assert code == 200
    assert rest.count(b'{"status":"ALIVE"}') == 3001
