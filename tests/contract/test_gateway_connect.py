"""The Connect protocol through a real gateway: both encodings, calls, streams, errors, limits."""

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from google.rpc import error_details_pb2

from detflow import errors
from detflow.v1 import metrics_pb2, trainer_pb2, training_pb2
from tests.gateway_rig import Rig, failing, running

TRAINER = "/detflow.v1.TrainerService"
TRAINING = "projects/p/versions/v/trainings/t"
JSON = {"content-type": "application/json"}
PROTO = {"content-type": "application/proto"}
STREAM = {"content-type": "application/connect+json"}


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


def envelope(data: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BI", flags, len(data)) + data


def parts(body: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """Splits an answer into its messages and what its end says."""
    found: list[tuple[int, bytes]] = []
    while body:
        flags, length = struct.unpack_from(">BI", body)
        found.append((flags, body[5 : 5 + length]))
        body = body[5 + length :]
    assert [flags for flags, _ in found] == [0] * (len(found) - 1) + [2]
    return [data for _, data in found[:-1]], json.loads(found[-1][1])


def info(error: dict[str, Any]) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo among the details, from its binary form."""
    for one in error["details"]:
        if one["type"] == "google.rpc.ErrorInfo":
            value = base64.b64decode(one["value"] + "=" * (-len(one["value"]) % 4))
            return error_details_pb2.ErrorInfo.FromString(value)
    raise AssertionError(f"no ErrorInfo in {error}")


async def two_states(request: Any, _context: Any) -> AsyncIterator[Any]:
    for cursor in ("c1", "c2"):
        yield trainer_pb2.WatchTrainingResponse(
            cursor=cursor, training=training_pb2.Training(name=request.name)
        )


async def test_unary_call_in_json_and_in_protobuf_gives_the_same(rig: Rig) -> None:
    request = trainer_pb2.GetTrainingRequest(name=TRAINING)
    answer = await rig.http.post(f"{TRAINER}/GetTraining", json={"name": TRAINING})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()["name"] == TRAINING
    answer = await rig.http.post(
        f"{TRAINER}/GetTraining", content=request.SerializeToString(), headers=PROTO
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/proto")
    assert training_pb2.Training.FromString(answer.content).name == TRAINING
    assert [call[1] for call in rig.backend.calls] == [request, request]


async def test_error_has_its_code_status_and_details(rig: Rig) -> None:
    rig.backend.replies["GetTraining"] = failing(
        errors.NotFound("no such training", reason="TRAINING_NOT_FOUND", metadata={"name": "x"})
    )
    answer = await rig.http.post(f"{TRAINER}/GetTraining", json={"name": TRAINING})
    assert answer.status_code == 404
    error = answer.json()
    assert (error["code"], error["message"]) == ("not_found", "no such training")
    assert info(error).reason == "TRAINING_NOT_FOUND" and info(error).metadata["name"] == "x"


async def test_internal_errors_show_nothing(rig: Rig) -> None:
    rig.backend.replies["GetTraining"] = failing(RuntimeError("secret"))
    answer = await rig.http.post(f"{TRAINER}/GetTraining", json={"name": TRAINING})
    assert answer.status_code == 500 and answer.json()["code"] == "internal"
    assert "secret" not in answer.text


@pytest.mark.parametrize("codec", ["json", "proto"])
async def test_stream_comes_in_envelopes_and_says_that_it_ended(rig: Rig, codec: str) -> None:
    rig.backend.replies["WatchTraining"] = two_states
    request = trainer_pb2.WatchTrainingRequest(name=TRAINING)
    data = (
        json.dumps({"name": TRAINING}).encode() if codec == "json" else request.SerializeToString()
    )
    kind = f"application/connect+{codec}"
    answer = await rig.http.post(
        f"{TRAINER}/WatchTraining", content=envelope(data), headers={"content-type": kind}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    messages, end = parts(answer.content)
    assert end == {}
    cursors = [
        json.loads(one)["cursor"]
        if codec == "json"
        else trainer_pb2.WatchTrainingResponse.FromString(one).cursor
        for one in messages
    ]
    assert cursors == ["c1", "c2"]


async def test_stream_that_fails_says_so_at_its_end(rig: Rig) -> None:
    async def reply(request: Any, context: Any) -> AsyncIterator[Any]:
        async for one in two_states(request, context):
            yield one
        raise errors.ResourceExhausted("too slow", reason="SLOW_WATCHER")

    rig.backend.replies["WatchTraining"] = reply
    body = envelope(json.dumps({"name": TRAINING}).encode())
    answer = await rig.http.post(f"{TRAINER}/WatchTraining", content=body, headers=STREAM)
    messages, end = parts(answer.content)
    assert len(messages) == 2 and answer.status_code == 200
    assert end["error"]["code"] == "resource_exhausted"
    assert info(end["error"]).reason == "SLOW_WATCHER"


async def test_invalid_stream_request_is_an_error_at_the_end(rig: Rig) -> None:
    for body in (b"", b"{}", envelope(b"{}") * 2, envelope(b'{"nme": 1}'), envelope(b"{}", 2)):
        answer = await rig.http.post(f"{TRAINER}/WatchTraining", content=body, headers=STREAM)
        messages, end = parts(answer.content)
        assert not messages and end["error"]["code"] == "invalid_argument", body
    answer = await rig.http.post(
        f"{TRAINER}/WatchTraining", content=envelope(b"{}", 1), headers=STREAM
    )
    assert parts(answer.content)[1]["error"]["code"] == "unimplemented"


async def test_rpc_without_a_rest_route_can_be_called(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield metrics_pb2.MetricColumns(name="loss", num_points=1)

    rig.backend.replies["ReadMetricColumns"] = reply
    answer = await rig.http.post(
        "/detflow.v1.MetricsService/ReadMetricColumns",
        content=envelope(json.dumps({"training": TRAINING}).encode()),
        headers=STREAM,
    )
    messages, end = parts(answer.content)
    assert end == {} and json.loads(messages[0])["name"] == "loss"


async def test_what_is_no_call_is_refused(rig: Rig) -> None:
    get = f"{TRAINER}/GetTraining"
    cases: list[tuple[str, str, dict[str, str], bytes, int, str]] = [
        ("POST", f"{TRAINER}/Nothing", JSON, b"{}", 404, "unimplemented"),
        ("GET", get, {}, b"", 405, "unimplemented"),
        ("POST", get, {"content-type": "text/plain"}, b"{}", 415, "invalid_argument"),
        ("POST", get, STREAM, b"{}", 415, "invalid_argument"),
        ("POST", get, JSON, b"{", 400, "invalid_argument"),
        ("POST", get, JSON, b'{"nme": "x"}', 400, "invalid_argument"),
        ("POST", get, PROTO, b"\xff\xff", 400, "invalid_argument"),
        ("POST", get, JSON, b" " * (1 << 20) + b"{}", 413, "resource_exhausted"),
        ("POST", get, {**JSON, "connect-timeout-ms": "-1"}, b"{}", 400, "invalid_argument"),
        ("POST", get, {**JSON, "connect-protocol-version": "2"}, b"{}", 400, "invalid_argument"),
        ("POST", get, {**JSON, "content-encoding": "gzip"}, b"{}", 501, "unimplemented"),
        ("POST", get, {**JSON, "origin": "http://evil.test"}, b"{}", 403, "permission_denied"),
        ("POST", get, {**JSON, "host": "evil.test"}, b"{}", 421, "permission_denied"),
        (
            "POST",
            "/detflow.v1.DatasetService/UploadArchive",
            {"content-type": "application/connect+proto"},
            b"",
            501,
            "unimplemented",
        ),
    ]
    for method, path, headers, body, status, code in cases:
        answer = await rig.http.request(method, path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (path, headers)
        assert answer.json()["message"] and info(answer.json()).reason
    assert not rig.backend.calls


async def test_timeout_of_the_caller_ends_calls_and_streams(rig: Rig) -> None:
    async def never(_request: Any, _context: Any) -> Any:
        await asyncio.Event().wait()

    async def silent(_request: Any, _context: Any) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    rig.backend.replies |= {"GetTraining": never, "WatchTraining": silent}
    soon = {"connect-timeout-ms": "50"}
    answer = await rig.http.post(f"{TRAINER}/GetTraining", json={"name": TRAINING}, headers=soon)
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    rig.backend.cancelled.clear()
    body = envelope(json.dumps({"name": TRAINING}).encode())
    answer = await rig.http.post(f"{TRAINER}/WatchTraining", content=body, headers=STREAM | soon)
    assert parts(answer.content)[1]["error"]["code"] == "deadline_exceeded"
    async with asyncio.timeout(5):
        await rig.backend.cancelled.wait()


async def endless(request: Any, context: Any) -> AsyncIterator[Any]:
    async for one in two_states(request, context):
        yield one
    await asyncio.Event().wait()


async def watch(rig: Rig) -> httpx.Response:
    body = envelope(json.dumps({"name": TRAINING}).encode())
    request = rig.http.build_request(
        "POST", f"{TRAINER}/WatchTraining", content=body, headers=STREAM
    )
    return await rig.http.send(request, stream=True)


async def test_disconnect_cancels_the_rpc(rig: Rig) -> None:
    rig.backend.replies["WatchTraining"] = endless
    answer = await watch(rig)
    assert await anext(answer.aiter_raw())
    await answer.aclose()
    async with asyncio.timeout(5):
        await rig.backend.cancelled.wait()


async def test_drain_ends_streams_with_what_to_do(rig: Rig) -> None:
    rig.backend.replies["WatchTraining"] = endless
    answer = await watch(rig)
    chunks = answer.aiter_raw()
    body = await anext(chunks)
    rig.server.should_exit = True
    body += b"".join([chunk async for chunk in chunks])
    _, end = parts(body)
    assert end["error"]["code"] == "unavailable"
    assert info(end["error"]).reason == "RESTARTING"
