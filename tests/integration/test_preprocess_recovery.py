"""What survives a kill: work is taken over when the lease ends, nothing is done twice or lost."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from detflow import channels
from detflow.events import Bus
from detflow.postgres import Database
from detflow.scratch import Scratch
from detflow.v1 import dataset_pb2, dataset_pb2_grpc, preprocess_pb2_grpc, version_pb2
from services.preprocess import bundle_store, store
from services.preprocess.pool import WorkerDied, WorkerPool
from tests.preprocess_process import Process, process
from tests.preprocess_rig import (
    PROJECT,
    DatasetState,
    PreprocessingState,
    Rig,
    rig,
    until,
    version_of,
)
from tests.preprocess_samples import jpeg, pack, yolo_files

__all__ = ["process", "rig"]


def big_archive(num_images: int = 160) -> bytes:
    """An archive whose bundle takes long enough to be interrupted."""
    files = yolo_files(num_images)
    for i in range(num_images):
        files[f"images/{i:03d}.jpg"] = jpeg(1280, 960, seed=i % 4)
    return pack(files)


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, grandchildren included."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def fetch(database: Database, query: str, *args: Any) -> list[Any]:
    """Reads rows."""
    async with database.connection() as conn:
        return list(await conn.fetch(query, *args))


async def wait_for_shards(database: Database, num_shards: int) -> None:
    """Waits until so many shards of a bundle are recorded."""
    async with asyncio.timeout(60):
        while len(await fetch(database, "select 1 from shard")) < num_shards:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def connect(process: Process, bus: Bus, channel: Any) -> Rig:
    """Clients of the process."""
    return Rig(
        service=None,  # type: ignore[arg-type]
        datasets=dataset_pb2_grpc.DatasetServiceStub(channel),
        preprocessings=preprocess_pb2_grpc.PreprocessServiceStub(channel),
        bus=bus,
    )


async def test_kill_in_the_middle_resumes_at_the_shard_and_leaves_no_process(
    process: tuple[Process, Database], bus: Bus
) -> None:
    service, database = process
    recipe = version_pb2.Recipe(augmentations=[version_pb2.AUGMENTATION_ROTATE_90])
    async with channels.channel(service.address) as channel:
        rig = connect(service, bus, channel)
        dataset = await rig.import_archive(big_archive())
        assert dataset.state == DatasetState.READY
        await rig.tell("created", version_of(dataset.name, recipe))
        await wait_for_shards(database, 2)
        assert service.process is not None
        workers = children(service.process.pid)
        assert workers
        await service.end(signal.SIGKILL)
    await until(lambda: not any(map(alive, workers)))
    before = await fetch(database, "select ctid, * from shard order by split, position")
    (state,) = await fetch(database, "select state from preprocessing")
    assert state["state"] == "RUNNING"

    await service.start()
    async with channels.channel(service.address) as channel:
        rig = connect(service, bus, channel)
        final = (await rig.watch_preprocessing(f"{PROJECT}/versions/v1"))[-1].preprocessing
        assert final.state == PreprocessingState.SUCCEEDED
        assert final.revision == 3
        after = await fetch(database, "select ctid, * from shard order by split, position")
        assert set(before) <= set(after)  # not one of them was made again
        await rig.tell("created", version_of(dataset.name, recipe, "v2"))
        again = (await rig.watch_preprocessing(f"{PROJECT}/versions/v2"))[-1].preprocessing
        assert again.manifest == final.manifest  # interrupted or not, the bytes are the same


async def test_kill_during_an_import_starts_again_without_doubles(
    process: tuple[Process, Database], bus: Bus
) -> None:
    service, database = process
    async with channels.channel(service.address) as channel:
        rig = connect(service, bus, channel)
        upload = await rig.upload(big_archive(300))
        dataset = await rig.create(upload.name)
        request = dataset_pb2.WatchDatasetRequest(name=dataset.name)
        async for response in rig.datasets.WatchDataset(request):
            if response.progress.num_done:
                break
        await service.end(signal.SIGKILL)
    await service.start()
    async with channels.channel(service.address) as channel:
        rig = connect(service, bus, channel)
        ready = (await rig.watch_dataset(dataset.name))[-1].dataset
    assert ready.state == DatasetState.READY
    assert (ready.num_images, ready.num_boxes) == (300, 300)
    (rows,) = await fetch(
        database, "select count(*) as num, count(distinct path) as paths from image"
    )
    assert (rows["num"], rows["paths"]) == (300, 300)
    events = await fetch(database, "select subject from outbox where resource like 'dataset.%'")
    assert sorted(e["subject"].rsplit(".", 1)[1] for e in events) == ["created", "imported"]


async def test_a_drain_gives_the_work_back_at_once(
    process: tuple[Process, Database], bus: Bus
) -> None:
    service, database = process
    async with channels.channel(service.address) as channel:
        rig = connect(service, bus, channel)
        dataset = await rig.import_archive(big_archive())
        await rig.tell("created", version_of(dataset.name))
        await wait_for_shards(database, 1)
        await service.end(signal.SIGTERM)
    (row,) = await fetch(
        database, "select state, claim, lease_expires <= now() as free from preprocessing"
    )
    assert (row["state"], row["claim"], row["free"]) in [
        ("RUNNING", None, True),
        ("SUCCEEDED", None, None),
    ]


async def test_two_claimers_race_and_one_wins(
    make_database: Callable[[str], Awaitable[Database]],
) -> None:
    database = await make_database("preprocess")
    async with database.transaction() as conn:
        await store.insert_dataset(
            conn,
            dataset_id="d",
            project_id="p",
            display_name="d",
            request_id="",
            upload_id=None,
            source_url="s3://bucket/archive.zip",
            skip_invalid=False,
            wanted_format=None,
        )
        await bundle_store.insert_preprocessing(
            conn,
            version_name="projects/p/versions/v",
            version_deleted=False,
            version_revision=1,
            dataset_id="d",
            recipe=b"",
        )

    async def claim(number: int) -> tuple[bool, bool]:
        async with database.transaction() as conn:
            dataset = await store.claim_dataset(conn, f"c{number}")
            preprocessing = await bundle_store.claim_preprocessing(conn, f"c{number}")
        return dataset is not None, preprocessing is not None

    won = await asyncio.gather(*map(claim, range(8)))
    assert [sum(kind) for kind in zip(*won, strict=True)] == [1, 1]


async def test_a_stale_claim_can_change_nothing(
    make_database: Callable[[str], Awaitable[Database]],
) -> None:
    database = await make_database("preprocess")
    async with database.transaction() as conn:
        await bundle_store.insert_preprocessing(
            conn,
            version_name="projects/p/versions/v",
            version_deleted=False,
            version_revision=1,
            dataset_id="d",
            recipe=b"",
        )
        await bundle_store.claim_preprocessing(conn, "old")
        await conn.execute("update preprocessing set lease_expires = now() - interval '1 second'")
        taken_over = await bundle_store.claim_preprocessing(conn, "new")
        assert taken_over is not None and not taken_over[1]
        assert not await bundle_store.renew_preprocessing(conn, "v", "old")
        assert await bundle_store.fail_preprocessing(conn, "v", "old", b"") is None
        assert await bundle_store.renew_preprocessing(conn, "v", "new")
        assert await bundle_store.cancel_preprocessing(conn, "v") is not None
        assert not await bundle_store.renew_preprocessing(conn, "v", "new")
        assert await bundle_store.fail_preprocessing(conn, "v", "new", b"") is None
        assert await bundle_store.cancel_preprocessing(conn, "v") is None


async def test_a_killed_worker_is_told_and_replaced() -> None:
    pool = WorkerPool(1)

    async def jobs() -> AsyncIterator[int]:
        yield signal.SIGKILL

    async def numbers() -> AsyncIterator[int]:
        for i in range(5):
            yield i

    with pytest.raises(WorkerDied):
        async for _ in pool.map(signal.raise_signal, jobs()):
            pass
    assert sorted([r async for _, r in pool.map(abs, numbers())]) == [0, 1, 2, 3, 4]
    await pool.close()


def test_scratch_of_dead_processes_is_removed_and_that_of_living_ones_kept(tmp_path: Path) -> None:
    living = Scratch(tmp_path)
    dead = tmp_path / "dead"
    dead.mkdir()
    (dead / ".held").touch()
    (dead / "upload-x").write_bytes(b"x")
    another = Scratch(tmp_path)
    assert not dead.exists()
    assert living.path.exists()
    another.close()
    living.close()
    assert list(tmp_path.iterdir()) == []
