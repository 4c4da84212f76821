"""The memory of the preprocess service does not grow with what it reads."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest

from detflow import channels
from detflow.events import Bus
from detflow.postgres import Database
from detflow.v1 import dataset_pb2_grpc, preprocess_pb2_grpc, version_pb2
from tests.preprocess_process import Process, process
from tests.preprocess_rig import Caller, DatasetState, PreprocessingState
from tests.preprocess_samples import jpeg, pack

__all__ = ["process"]

NUM_IMAGES = 20_000
NUM_LARGE = 8
LIMIT_BYTES = 1 << 30
LABELS = b"".join(b"%d 0.5 0.5 0.%d 0.2\n" % (number % 2, 10 + number) for number in range(10))


@asynccontextmanager
async def measured(pid: int) -> AsyncIterator[list[int]]:
    """Notes the memory of a process and its children, shared parts counted once."""
    totals: list[int] = []

    async def look() -> None:
        while True:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            total = 0
            for one in family:
                try:
                    total += one.memory_full_info().pss
                except psutil.NoSuchProcess:  # it ended meanwhile
                    continue
            totals.append(total)
            await asyncio.sleep(0.2)

    looking = asyncio.create_task(look())
    try:
        yield totals
    finally:
        looking.cancel()


@pytest.mark.timeout(240)
async def test_twenty_thousand_images_stay_below_one_gibibyte(
    process: tuple[Process, Database], bus: Bus
) -> None:
    small = [jpeg(48, 48, seed=seed) for seed in range(40)]
    files = {"data.yaml": b"names: [a, b]\n"}
    for number in range(NUM_IMAGES):
        # Bytes after the end of a JPEG make it another file.
        files[f"images/{number:05d}.jpg"] = small[number % 40] + number.to_bytes(4, "little")
        files[f"labels/{number:05d}.txt"] = LABELS
    for number in range(NUM_LARGE):
        files[f"images/large-{number}.jpg"] = jpeg(6000, 4000, seed=number)
    archive = pack(files)
    service, _ = process
    assert service.process is not None
    async with channels.channel(service.address) as channel, measured(service.process.pid) as seen:
        rig = Caller(
            datasets=dataset_pb2_grpc.DatasetServiceStub(channel),
            preprocessings=preprocess_pb2_grpc.PreprocessServiceStub(channel),
            bus=bus,
        )
        dataset = await rig.import_archive(archive)
        assert dataset.state == DatasetState.READY, dataset
        assert dataset.num_images == NUM_IMAGES + NUM_LARGE
        recipe = version_pb2.Recipe(
            split=version_pb2.SplitRatio(train=70, val=20, test=10), max_side_px=640
        )
        made = await rig.preprocess(dataset.name, recipe)
        assert made.state == PreprocessingState.SUCCEEDED, made
    assert len(seen) > 10
    assert max(seen) < LIMIT_BYTES, max(seen)
