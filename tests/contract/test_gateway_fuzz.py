"""Odd requests, by a fixed seed, through a real gateway: none may be answered with 5xx."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.routes import ANY, bindings
from tests.gateway_rig import Rig, running

BINDINGS = list(bindings())
NUM_REQUESTS = 3000
PIECES = (
    *("projects", "versions", "trainings", "v1", "x1", "..", ".", "", "%2e%2e", "%252e", "%5c"),
    *(
        "%2F",
        "\\",
        "%00",
        "%FF",
        ":watch",
        ":stop",
        "*",
        "-",
        "{name}",
        "a:b",
        "%ED%95%9C",
        "x" * 300,
    ),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 2**31, 2**63, 2**70, 1e300, 0.5, "", "x", "1", "NaN", "READY"),
    *("\ud800", "한국어", [], {}, [[]], [None], {"a": {"b": []}}, [{}], ["x"] * 200, "x" * 5000),
)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


def odd_path(rng: random.Random) -> str:
    binding = rng.choice(BINDINGS)
    segments = ["x1" if one == ANY else one for one in binding.template.segments]
    for _ in range(rng.randrange(3)):
        segments[rng.randrange(len(segments))] = rng.choice(PIECES)
    if rng.random() < 0.2:
        segments.append(rng.choice(PIECES))
    verb = f":{binding.template.verb}" if binding.template.verb and rng.random() < 0.8 else ""
    names = [field.json_name for field in binding.rpc.input_type.fields] + ["a.b", "", "cursor"]
    query = "&".join(
        f"{rng.choice(names)}={rng.choice(('', '1', 'x', '%FF', '-5', '%00', 'true'))}"
        for _ in range(rng.randrange(3))
    )
    return f"/{'/'.join(segments)}{verb}" + (f"?{query}" if query else "")


def odd_body(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(40))
    message = rng.choice([one for one in BINDINGS if one.body]).rpc.input_type
    body: dict[str, Any] = {}
    for _ in range(rng.randrange(4)):
        field = rng.choice(list(message.fields))
        if field.message_type is not None and rng.random() < 0.7:
            inner = list(field.message_type.fields)
            body[field.json_name] = {
                rng.choice(inner).json_name: rng.choice(ODD) for _ in range(rng.randrange(4))
            }
        else:
            body[field.json_name] = rng.choice(ODD)
    return json.dumps(rng.choice((body, body, body, rng.choice(ODD)))).encode()


async def test_odd_requests_are_never_a_server_error(rig: Rig) -> None:
    rng = random.Random(20)
    counts: dict[int, int] = {}
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    for _ in range(NUM_REQUESTS):
        method = rng.choice(("GET", "GET", "POST", "POST", "PATCH", "DELETE", "PUT"))
        path = odd_path(rng)
        body = b"" if method == "GET" else odd_body(rng)
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        code = int(head.split(b" ", 2)[1])
        assert code < 500, (method, path, body)
        counts[code] = counts.get(code, 0) + 1
        if b"transfer-encoding: chunked" in head.lower():
            await reader.readuntil(b"0\r\n\r\n")
        else:
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
    writer.close()
    assert {200, 400, 404, 405} <= counts.keys(), counts
