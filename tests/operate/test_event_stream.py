"""An event stream that is bounded by its size: what goes first, and what its readers notice."""

import asyncio

import pytest

from detflow.errors import OutOfRange
from detflow.events import EVENTS_STREAM, Bus
from detflow.watch import Snapshot, Watcher

_EVENT = b"x" * 10_000


async def publish(bus: Bus, number: int, first: int = 0) -> None:
    for n in range(first, first + number):
        await bus.publish_durable(
            "detflow.v1.something.s1.happened", _EVENT, {"Nats-Msg-Id": f"{n}"}
        )


async def test_the_oldest_events_go_and_their_cursors_expire(bus: Bus, nats_url: str) -> None:
    await publish(bus, 3)
    watcher = Watcher(bus)

    async def snapshot() -> Snapshot[str]:
        return Snapshot("", {})

    running = asyncio.create_task(watcher.run())
    items = watcher.follow(subjects=["detflow.v1.something.s1.*"], cursor="", snapshot=snapshot)
    cursor = (await anext(items)).cursor
    await items.aclose()

    bounded = await Bus.connect(nats_url, "bounded", events_bytes=100_000)
    await bounded.ensure_streams()  # the stream that is there gets the bound
    info = await bus.js.stream_info(EVENTS_STREAM)
    assert (info.config.max_bytes, info.state.messages) == (100_000, 3)
    await publish(bounded, 50, first=3)
    info = await bus.js.stream_info(EVENTS_STREAM)
    assert info.state.bytes <= 100_000 and info.state.last_seq == 53

    late = watcher.follow(subjects=["detflow.v1.something.s1.*"], cursor=cursor, snapshot=snapshot)
    with pytest.raises(OutOfRange) as caught:
        await anext(late)
    assert caught.value.reason == "CURSOR_EXPIRED"

    # Without the setting there is no bound, and what is there stays.
    await bus.ensure_streams()  # which was not told of any bound
    info = await bus.js.stream_info(EVENTS_STREAM)
    assert info.config.max_bytes == 100_000
    free = await Bus.connect(nats_url, "free", events_bytes=0)
    await free.ensure_streams()
    after = await bus.js.stream_info(EVENTS_STREAM)
    assert (after.config.max_bytes, after.state.messages) == (-1, info.state.messages)
    assert await bus.stream_epoch(EVENTS_STREAM, fresh=True) == await free.stream_epoch(
        EVENTS_STREAM
    )
    running.cancel()
    for one in (bounded, free):
        await one.close()
