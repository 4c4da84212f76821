"""A network that breaks anywhere: acknowledged writes stay, the others are UNAVAILABLE."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from detflow.errors import Unavailable
from detflow.events import EVENTS_STREAM, Bus, Header
from detflow.outbox import Relay, append
from detflow.postgres import Database
from detflow.v1 import events_pb2
from tests.background import running
from tests.chaos.proxy import Proxy

MakeUrl = Callable[[str], Awaitable[str]]
NUM_WRITES = 150


async def behind(proxy: Proxy, url: str) -> str:
    """Puts a proxy in front of an address and returns the one to use instead."""
    port = urlsplit(url).port
    assert port is not None
    await proxy.open(port)
    return url.replace(f":{port}", f":{proxy.port}")


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    made = Proxy()
    yield made
    await made.close()


async def break_now_and_then(proxy: Proxy, chance: random.Random) -> None:
    """Cuts and halves, at no moment in particular."""
    while True:
        await asyncio.sleep(chance.uniform(0.0, 0.1))
        if chance.random() < 0.5:
            proxy.cut()
        else:
            proxy.halve()


async def test_message_is_delayed_held_halved_and_cut(proxy: Proxy) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        await proxy.open(server.sockets[0].getsockname()[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        begin = time.monotonic()
        with proxy.slow(0.2):
            writer.write(b"slow")
            assert await reader.read(100) == b"slow"
        assert time.monotonic() - begin >= 0.4  # there and back
        with proxy.black_hole():
            writer.write(b"held")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(100), 0.2)
        assert await reader.read(100) == b"held"
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            await reader.read(100)
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.halve()
        writer.write(b"in two")
        with pytest.raises(ConnectionResetError):
            while data := await reader.read(100):
                assert data == b"in "
        writer.close()


async def test_connection_that_is_lost_and_given_up_is_unavailable(
    make_database_url: MakeUrl,
) -> None:
    db = await Database.connect(await make_database_url("version"), "version")
    with pytest.raises(Unavailable):
        async with db.connection() as conn:
            conn.terminate()  # as whoever must not give its locks back to the pool
            raise asyncpg.InternalClientError("lost in the middle of its hand-over")
    async with db.connection() as conn:
        assert await conn.fetchval("select 1") == 1
    await db.close()


async def test_what_postgres_has_acknowledged_is_there_and_all_else_is_unavailable(
    make_database_url: MakeUrl, proxy: Proxy
) -> None:
    chance = random.Random(1)
    url = await make_database_url("version")
    db = await Database.connect(await behind(proxy, url), "version")
    acknowledged: set[int] = set()
    num_refused = 0

    async def write(number: int) -> None:
        nonlocal num_refused
        try:
            async with db.transaction() as conn:
                await conn.execute("insert into inbox values ('test', $1)", str(number))
                await conn.fetch("select repeat('x', 2000) from generate_series(1, 20)")
        except Unavailable:  # anything else ends the test
            num_refused += 1
        else:
            acknowledged.add(number)

    async with running(break_now_and_then(proxy, chance)):
        first = 0
        while first < NUM_WRITES or not num_refused:
            await asyncio.gather(*(write(number) for number in range(first, first + 5)))
            first += 5
    async with asyncio.timeout(30):  # the pool heals by itself
        while first not in acknowledged:
            await write(first)
    await db.close()
    direct = await Database.connect(url, "version")
    async with direct.connection() as conn:
        rows = await conn.fetch("select event_id from inbox where consumer = 'test'")
    await direct.close()
    assert acknowledged <= {int(row["event_id"]) for row in rows}
    assert len(acknowledged) > 1  # not everything was refused


async def test_relay_survives_a_connection_that_is_lost_in_the_middle_of_a_call(
    make_database_url: MakeUrl, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await Database.connect(await make_database_url("version"), "version")
    listen, execute = db.listen, asyncpg.Connection.execute
    opened: list[Any] = []

    async def noted() -> Any:
        opened.append(await listen())
        return opened[-1]

    async def lost(self: Any, *arguments: Any, **options: Any) -> str:
        if opened and self is opened[0]:
            raise asyncpg.InternalClientError("cannot switch to state 12; another is in progress")
        return await execute(self, *arguments, **options)

    monkeypatch.setattr(db, "listen", noted)
    monkeypatch.setattr(asyncpg.Connection, "execute", lost)
    async with db.transaction() as conn:
        await append(
            conn,
            kind="version",
            resource_id="a",
            what="told",
            name="projects/p/versions/a",
            event=events_pb2.Event(),
        )
    relay = asyncio.create_task(Relay(db, bus, "test").run())
    async with asyncio.timeout(30):
        while await bus.last_seq("detflow.v1.version.a.>") < 1:
            assert not relay.done(), relay.exception()
            await asyncio.sleep(0.02)
    relay.cancel()
    await asyncio.wait([relay])
    await db.close()
    assert len(opened) == 2


# nats-py leaves a stream that breaks during its handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_what_nats_has_acknowledged_is_there_once_and_all_else_is_unavailable(
    bus: Bus, nats_url: str, proxy: Proxy
) -> None:
    chance = random.Random(2)
    mine = await Bus.connect(await behind(proxy, nats_url), "broken")
    num_refused = 0
    async with asyncio.timeout(90), running(break_now_and_then(proxy, chance)):
        number = 0
        while number < NUM_WRITES // 3 or not num_refused:
            while True:  # as the relay does: again, with the same id, until it is acknowledged
                try:
                    headers = {Header.EVENT_ID: str(number), Header.SEQ: str(number + 1)}
                    await mine.publish_durable("detflow.v1.test.a.told", b"x" * 3000, headers)
                    break
                except Unavailable:
                    num_refused += 1
                    await mine.wait_until_connected()
            number += 1
    await mine.close()
    first, last = await bus.stream_bounds(EVENTS_STREAM)
    assert last - first + 1 == number
    assert await bus.last_seq("detflow.v1.test.a.>") == number
