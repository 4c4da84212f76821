"""What one process of detflow carries: events of its outbox, open watches."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import psutil

from detflow import channels
from detflow.settings import Settings
from detflow.v1 import version_pb2, version_pb2_grpc
from tests.scale.fill import LARGE

_NUM_RESOURCES = 500
_EVENTS_EACH = 40
_PAYLOAD_BYTES = 500
_NUM_WATCHES = 1000


async def relayed_per_second(conn: asyncpg.Connection[asyncpg.Record]) -> float:
    """Puts events that nobody consumes into a service's outbox at once; times the relay.

    Args:
        conn: Connection in the schema of a running service.

    Returns:
        Events in the stream per second: 500 resources, 40 events of 500 bytes each.
    """
    await conn.execute(
        """
        insert into outbox (event_id, resource, seq, subject, name, payload)
        select gen_random_uuid(), 'bench.' || r, n, 'detflow.v1.bench.' || r || '.happened', '',
          convert_to(repeat('x', $3), 'utf8')
        from generate_series(1, $1::int) as r, generate_series(1, $2::int) as n
        """,
        _NUM_RESOURCES,
        _EVENTS_EACH,
        _PAYLOAD_BYTES,
    )
    start = time.perf_counter()
    await conn.execute("select pg_notify('outbox', '')")
    waiting = "select exists (select from outbox where publish_time is null)"
    while await conn.fetchval(waiting):  # noqa: ASYNC110  # nothing tells of the end
        await asyncio.sleep(0.01)  # seldom enough to cost the relay little
    return _NUM_RESOURCES * _EVENTS_EACH / (time.perf_counter() - start)


async def kilobytes_per_watch(address: str, token: str, pid: int) -> float:
    """Opens a thousand watches on one connection of the version service.

    Args:
        address: Its host:port.
        token: The owner's.
        pid: Its process.

    Returns:
        By how many kilobytes its memory grows for each.
    """
    process = psutil.Process(pid)
    request = version_pb2.WatchVersionsRequest(parent=f"projects/{LARGE}", snapshot_size=1)
    async with channels.channel(address, Settings(service_token=token)) as channel:
        stub = version_pb2_grpc.VersionServiceStub(channel)

        async def opened() -> Any:
            stream = stub.WatchVersions(request)
            assert await stream.read()
            return stream

        warm = [await opened() for _ in range(10)]
        before = process.memory_info().rss
        streams = await asyncio.gather(*(opened() for _ in range(_NUM_WATCHES)))
        grown = process.memory_info().rss - before
        for stream in (*warm, *streams):
            stream.cancel()
    return grown / _NUM_WATCHES / 1000
