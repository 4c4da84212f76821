"""The worker's NATS thread through an outage."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path

import nats
from nats.aio.msg import Msg

from detflow.events import Bus
from detflow.local import nats as local_nats
from detflow.v1.training_pb2 import EpochMetrics, StopMode
from detflow.v1.worker_pb2 import EpochRecord, LeaseResponse, WorkerRecord
from services.trainer.worker.link import Link
from services.trainer.worker.orders import Orders
from services.trainer.worker.records import Spool


def epoch(number: int) -> WorkerRecord:
    return WorkerRecord(epoch=EpochRecord(metrics=EpochMetrics(epoch=number)))


async def stored(url: str) -> list[tuple[str, WorkerRecord]]:
    """Returns what is in the stream, with the ids."""
    bus = await Bus.connect(url, "test")
    first, last = await bus.stream_bounds("DETFLOW_RECORDS")
    messages = [await bus.js.get_msg("DETFLOW_RECORDS", seq) for seq in range(first, last + 1)]
    await bus.close()
    return [
        ((message.headers or {})["Nats-Msg-Id"], WorkerRecord.FromString(message.data or b""))
        for message in messages
    ]


async def test_records_written_while_nats_is_away_arrive_once_and_in_order(
    tmp_path: Path,
) -> None:
    server = local_nats.prepare(tmp_path / "nats")
    spool = Spool("projects/p/versions/v/trainings/t", 1)
    link = Link(url=server.url, training_id="t", attempt=1, orders=Orders(), spool=spool)
    with link:  # NATS is not even there
        spool.write(epoch(1))
        process = await asyncio.to_thread(server.start, tmp_path / "nats.log")
        bus = await Bus.connect(server.url, "test")
        await bus.ensure_streams()
        await bus.close()
        assert await asyncio.to_thread(link.flush, 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for number in (2, 3):
            spool.write(epoch(number))
        process = await asyncio.to_thread(server.start, tmp_path / "nats.log")
        assert await asyncio.to_thread(link.flush, 20)
    messages = await stored(server.url)
    process.terminate()
    process.wait()
    assert [id_ for id_, _ in messages] == ["t/1/1", "t/1/2", "t/1/3"]
    assert [record.epoch.metrics.epoch for _, record in messages] == [1, 2, 3]


async def test_lease_replies_become_orders(bus: Bus, nats_url: str) -> None:
    orders, fenced = Orders(), threading.Event()
    client = await nats.connect(nats_url)
    replies = iter((LeaseResponse(stop_mode=StopMode.STOP_MODE_FINISH), LeaseResponse(fenced=True)))

    async def on_lease(message: Msg) -> None:
        reply = next(replies, None)
        if reply is None:
            fenced.set()  # the reply before this request has been obeyed
            return
        await message.respond(reply.SerializeToString())

    await client.subscribe("detflow.lease.t", cb=on_lease)
    await client.flush()
    spool = Spool("projects/p/versions/v/trainings/t", 1)
    with Link(url=nats_url, training_id="t", attempt=1, orders=orders, spool=spool) as link:
        assert await asyncio.to_thread(fenced.wait, 10)
        assert orders.finish and orders.fenced and not orders.stop
        refused = spool.write(epoch(1))
        assert await asyncio.to_thread(link.flush, 10)
        assert refused.cancelled()
    await client.close()


async def test_flush_gives_up_at_its_deadline_when_nats_stays_away(tmp_path: Path) -> None:
    server = local_nats.prepare(tmp_path / "nats")
    spool = Spool("projects/p/versions/v/trainings/t", 1)
    with Link(url=server.url, training_id="t", attempt=1, orders=Orders(), spool=spool) as link:
        spool.write(epoch(1))
        assert not await asyncio.to_thread(link.flush, 0.2)
