"""Server-Sent Events through a real gateway: cursors, errors, disconnects, drain."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from detflow import errors
from detflow.v1 import common_pb2, metrics_pb2, trainer_pb2, training_pb2
from gateway import stream
from tests.gateway_rig import Rig, details, running

WATCH = "/v1/projects/p/versions/v/trainings/t:watch"


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


async def events(answer: httpx.Response) -> AsyncIterator[dict[str, str]]:
    """Parses an event stream: dicts of field to value."""
    one: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line:
            name, _, value = line.partition(":")
            one[name] = value.removeprefix(" ")
        elif one:
            yield one
            one = {}


def message(cursor: str, state: int) -> trainer_pb2.WatchTrainingResponse:
    return trainer_pb2.WatchTrainingResponse(
        cursor=cursor,
        training=training_pb2.Training(state=state),  # type: ignore[arg-type]
    )


async def two_states(request: Any, _context: Any) -> AsyncIterator[Any]:
    if not request.cursor:
        yield message("c1", training_pb2.Training.RUNNING)
    yield trainer_pb2.WatchTrainingResponse(cursor="c2", heartbeat=common_pb2.Heartbeat())
    yield message("c3", training_pb2.Training.SUCCEEDED)


async def test_messages_become_events_with_cursor_case_and_json(rig: Rig) -> None:
    rig.backend.replies["WatchTraining"] = two_states
    async with rig.http.stream("GET", WATCH) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-accel-buffering"] == "no"
        seen = [one async for one in events(answer)]
    assert [one["event"] for one in seen] == ["training", "heartbeat", "training", "end"]
    assert [one.get("id") for one in seen] == ["c1", "c2", "c3", None]
    assert json.loads(seen[0]["data"])["training"]["state"] == "RUNNING"


def test_same_bytes_of_two_kinds_are_rendered_as_what_they_are() -> None:
    beat = trainer_pb2.WatchTrainingResponse(cursor="c1", heartbeat=common_pb2.Heartbeat())
    steps = metrics_pb2.WatchMetricsResponse(cursor="c1", steps=training_pb2.StepMetrics())
    assert beat.SerializeToString() == steps.SerializeToString()
    for _ in range(2):  # the second time from memory
        assert stream.event(beat).startswith(b"id: c1\nevent: heartbeat\n")
        assert stream.event(steps).startswith(b"id: c1\nevent: steps\n")


async def test_last_event_id_resumes_and_wins_over_the_query(rig: Rig) -> None:
    rig.backend.replies["WatchTraining"] = two_states
    for query, headers, expected in (
        ("?cursor=c0", {}, "c0"),
        ("?cursor=c0", {"last-event-id": "c1"}, "c1"),
    ):
        answer = await rig.http.get(WATCH + query, headers=headers)
        assert rig.backend.calls[-1][1].cursor == expected
        assert [one["id"] async for one in events(answer) if "id" in one] == ["c2", "c3"]


async def test_expired_cursor_is_an_ordinary_error_with_its_reason(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        raise errors.OutOfRange("too old; start again without it", reason="CURSOR_EXPIRED")
        yield

    rig.backend.replies["WatchTraining"] = reply
    answer = await rig.http.get(WATCH, headers={"last-event-id": "old"})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert details(answer, "ErrorInfo")["reason"] == "CURSOR_EXPIRED"


async def test_later_error_is_an_event_and_ends_the_stream(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield message("c1", training_pb2.Training.RUNNING)
        raise errors.ResourceExhausted("too slow", reason="SLOW_WATCHER", metadata={"cursor": "c1"})

    rig.backend.replies["WatchTraining"] = reply
    answer = await rig.http.get(WATCH)
    seen = [one async for one in events(answer)]
    assert [one["event"] for one in seen] == ["training", "error"]
    shown = json.loads(seen[1]["data"])["error"]
    assert (shown["code"], shown["status"]) == (429, "RESOURCE_EXHAUSTED")
    assert shown["details"][0]["metadata"]["cursor"] == "c1"


async def test_invalid_watch_is_400(rig: Rig) -> None:
    answer = await rig.http.get(WATCH, headers={"last-event-id": "x" * 300})
    assert answer.status_code == 400
    assert details(answer, "BadRequest")["fieldViolations"][0]["field"] == "cursor"


async def endless(_request: Any, context: Any) -> AsyncIterator[Any]:
    yield message("c1", training_pb2.Training.RUNNING)
    await asyncio.Event().wait()


async def test_disconnect_cancels_the_rpc_at_once(rig: Rig) -> None:
    rig.backend.replies["WatchTraining"] = endless
    async with rig.http.stream("GET", WATCH) as answer:
        await anext(events(answer))
    async with asyncio.timeout(2):
        await rig.backend.cancelled.wait()


async def test_disconnect_before_the_first_message_cancels_the_rpc(rig: Rig) -> None:
    began = asyncio.Event()

    async def silent(_request: Any, _context: Any) -> AsyncIterator[Any]:
        began.set()
        await asyncio.Event().wait()
        yield

    rig.backend.replies["WatchTraining"] = silent
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(f"GET {WATCH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await began.wait()
    writer.close()
    async with asyncio.timeout(2):
        await rig.backend.cancelled.wait()


async def test_silent_stream_opens_after_a_moment(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FIRST_MESSAGE_SECONDS", 0.05)
    opened = asyncio.Event()

    async def late(_request: Any, _context: Any) -> AsyncIterator[Any]:
        await opened.wait()
        raise errors.Unavailable("restarting")
        yield

    rig.backend.replies["WatchTraining"] = late
    async with rig.http.stream("GET", WATCH) as answer:
        assert answer.status_code == 200
        opened.set()
        assert [one["event"] async for one in events(answer) if "event" in one] == ["error"]


async def test_drain_ends_streams_and_lets_requests_finish(rig: Rig) -> None:
    began, release = asyncio.Event(), asyncio.Event()

    async def slow(_request: Any, _context: Any) -> Any:
        began.set()
        await release.wait()
        return trainer_pb2.ListModelsResponse()

    rig.backend.replies["WatchTraining"] = endless
    rig.backend.replies["ListModels"] = slow
    request = asyncio.create_task(rig.http.get("/v1/models"))
    await began.wait()
    async with rig.http.stream("GET", WATCH) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == "id: c1"
        rig.server.should_exit = True
        rest = [line async for line in lines]
    assert "retry: 1000" in rest
    assert not request.done()
    release.set()
    assert (await request).status_code == 200
    await rig.stopped


async def test_drain_ends_a_stream_that_has_said_nothing_yet(rig: Rig) -> None:
    began = asyncio.Event()

    async def silent(_request: Any, _context: Any) -> AsyncIterator[Any]:
        began.set()
        await asyncio.Event().wait()
        yield

    rig.backend.replies["WatchTraining"] = silent
    watching = asyncio.create_task(rig.http.get(WATCH))
    await began.wait()
    rig.server.should_exit = True
    answer = await watching
    assert answer.status_code == 200
    assert answer.text.startswith("retry: 1000\n")
    await rig.backend.cancelled.wait()
    await rig.stopped


async def test_slow_reader_holds_back_the_service_only_for_itself(rig: Rig) -> None:
    sent = 0
    blocked = asyncio.Event()

    async def flood(_request: Any, context: Any) -> AsyncIterator[Any]:
        nonlocal sent
        line = "x" * 65536
        while True:
            one = trainer_pb2.WatchTrainingResponse(
                cursor="c", log=training_pb2.LogLines(lines=[line])
            )
            try:
                async with asyncio.timeout(0.5):
                    await context.write(one)
            except TimeoutError:
                blocked.set()
                raise errors.ResourceExhausted("too slow", reason="SLOW_WATCHER") from None
            sent += 1
        yield

    rig.backend.replies["WatchTraining"] = flood
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1 << 16)
    writer.write(f"GET {WATCH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    async with asyncio.timeout(20):
        await blocked.wait()
    assert sent < 1000  # 64 MiB: what sockets and flow-control windows hold, and no more
    assert (await rig.http.get("/v1/models")).status_code == 200
    writer.close()
    del reader
