"""An upload survives the service that receives it, and the client goes on by itself."""

import asyncio
import itertools
import os
import signal
import threading
from pathlib import Path

from detflow.client import Client
from detflow.postgres import Database
from detflow.v1 import common_pb2, dataset_pb2
from services.preprocess.uploads import PART_BYTES
from tests.preprocess_process import Process, process
from tests.preprocess_samples import yolo_files

__all__ = ["process"]

PARTS = "select upload_id, start, key, ctid from upload_part order by start"


async def test_kill_in_the_middle_of_an_upload_goes_on_at_the_committed_bytes(
    process: tuple[Process, Database], tmp_path: Path
) -> None:
    service, database = process
    service.environment["DETFLOW_LISTEN"] = service.address
    folder = tmp_path / "cells"
    for name, data in yolo_files(5).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "notes.bin").write_bytes(os.urandom(4 * PART_BYTES))
    far_enough, killed = threading.Event(), threading.Event()
    places: list[int] = []

    def progress(message: common_pb2.Progress) -> None:
        if message.stage != "upload":
            return
        places.append(message.num_done)
        if message.num_done > 3 * PART_BYTES and not killed.is_set():
            far_enough.set()
            killed.wait(60)

    with Client(environ={"DETFLOW_PREPROCESS_ADDRESS": service.address}) as client:
        importing = asyncio.create_task(
            asyncio.to_thread(
                client.datasets.import_, folder, project="p", name="resumed", progress=progress
            )
        )
        await asyncio.to_thread(far_enough.wait, 60)
        async with asyncio.timeout(30), database.connection() as conn:
            while not (before := await conn.fetch(PARTS)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await service.end(signal.SIGKILL)
            before = await conn.fetch(PARTS)
        killed.set()
        await service.start()
        dataset = await importing
        assert dataset.state == dataset_pb2.Dataset.READY

        async with database.connection() as conn:
            after = await conn.fetch(PARTS)
        assert after[: len(before)] == before  # not one of them came again
        resumed = next(b for a, b in itertools.pairwise(places) if b < a)
        assert resumed == before[-1]["start"] + PART_BYTES + (1 << 20)

        again = await asyncio.to_thread(
            client.datasets.import_, folder, project="p", name="again", progress=progress
        )
        assert again.content_sha256 == dataset.content_sha256
        async with database.connection() as conn:
            assert await conn.fetch(PARTS) == after  # the same bytes are not sent twice
