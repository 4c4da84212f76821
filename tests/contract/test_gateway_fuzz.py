"""Odd requests, by a fixed seed, through a real gateway: only answers that the document names."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.routes import ANY
from tests.fuzz.over_http import BINDINGS, ODD, PIECES, documented, odd_headers
from tests.gateway_rig import Rig, running

WITH_FIELDS = [one for one in BINDINGS if one.body and one.rpc.input_type.fields]
GIVEN = {"Host": "localhost", "Content-Type": "application/json"}
NUM_REQUESTS = 3000
METHODS = ("GET", "GET", "HEAD", "POST", "POST", "PATCH", "DELETE", "PUT")


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
    message = rng.choice(WITH_FIELDS).rpc.input_type
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


async def test_odd_requests_get_answers_that_the_document_names(rig: Rig) -> None:
    rng = random.Random(20)
    counts: dict[int, int] = {}
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    for _ in range(NUM_REQUESTS):
        method = rng.choice(METHODS)
        path = odd_path(rng)
        body = b"" if method in ("GET", "HEAD") else odd_body(rng)
        head_sent = f"{method} {path} HTTP/1.1\r\n{odd_headers(rng, GIVEN)}"
        writer.write(
            head_sent.encode("latin-1") + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        code = int(head.split(b" ", 2)[1])
        assert code < 500, (head_sent, body)
        # Whoever is no browser's page of this host is told so whatever the path.
        assert code in documented(method, path) | {403}, (code, head_sent, body)
        counts[code] = counts.get(code, 0) + 1
        if method == "HEAD" or code == 304:
            continue
        if b"transfer-encoding: chunked" in head.lower():
            await reader.readuntil(b"0\r\n\r\n")
        else:
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
    writer.close()
    assert {200, 400, 403, 404, 405, 415} <= counts.keys(), counts
