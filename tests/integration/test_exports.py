"""What becomes of an export when its job or its trainer goes: real jobs, real processes die."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import onnx
import pytest

from detflow import channels
from detflow.errors import Aborted
from detflow.events import Bus
from detflow.postgres import Database
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1 import export_pb2, export_pb2_grpc
from tests import export_rig
from tests.export_rig import Jobs, Rig
from tests.shapes_bundle import write_bundle
from tests.trainer_rig import eventually

Export = export_pb2.Export

_WEIGHTS = """
import sys
from pathlib import Path
from services.trainer.worker import library
library.prepare(Path("ultralytics"))
import torch
from services.trainer.worker import networks
network = networks.build("yolov8n", num_classes=3, image_size=64, hyperparameters={})
torch.save({
    "format": "detflow-weights/1", "model": "yolov8n", "image_size": 64, "epoch": 1,
    "class_names": ["circle", "square", "triangle"], "state_dict": network.state_dict(),
}, "best.pt")
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("weights")
    root = str(Path(__file__).parent.parent.parent)
    environ = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", _WEIGHTS], cwd=folder, env=environ, check=True)
    return (folder / "best.pt").read_bytes()


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    url = await make_database_url("trainer")
    async with export_rig.running(
        nats_url=nats_url, database_url=url, folder=tmp_path, real_jobs=True
    ) as one:
        yield one


async def put_training(rig: Rig, weights: bytes) -> str:
    return await rig.training(
        image_size=64,
        weights=rig.store.put("trainings/t1/1/best.pt", weights),
        manifest=write_bundle(rig.store, {"train": 2, "val": 1, "test": 0}),
    )


def jobs_in(settings: Settings) -> list[int]:
    """Process ids of the jobs whose folder is in a trainer's scratch space."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_job = Path(os.readlink(path / "cwd")).is_relative_to(settings.data_dir / "jobs")
            if is_job and ") Z " not in (path / "stat").read_text():
                found.append(int(path.name))
        except OSError:  # it has ended, or is none of ours
            continue
    return found


def folders_of_jobs(settings: Settings) -> list[Path]:
    return list((settings.data_dir / "jobs").glob("*"))


async def until_stage(rig: Rig, name: str) -> str:
    """Waits for progress; returns the stage."""
    async with asyncio.timeout(60):
        async for item in rig.watch(name):
            if item.HasField("progress"):
                return item.progress.stage
    raise AssertionError("the watch ended without progress")


def check_file(rig: Rig, export: export_pb2.Export, content: bytes, folder: Path) -> None:
    path = folder / export.file_name
    path.write_bytes(content)
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert about["training"] == export.name.split("/exports/")[0]
    assert list(rig.store.list("exports")) == [export.object.key]


async def test_export_is_made_and_comes_back(rig: Rig, weights: bytes, tmp_path: Path) -> None:
    export = await rig.create(await put_training(rig, weights), simplify=True)
    assert await until_stage(rig, export.name) == "load"
    done = await rig.until(export.name, Export.SUCCEEDED, seconds=60)
    content = b"".join(chunk.data for chunk in await rig.download(export.name))
    assert len(content) == done.object.size_bytes
    assert 0 <= done.max_box_difference_px < 0.01
    check_file(rig, done, content, tmp_path)
    assert not folders_of_jobs(rig.settings)


async def test_lost_weights_fail_the_export_with_their_key(rig: Rig, weights: bytes) -> None:
    training = await put_training(rig, weights)
    rig.store.put("trainings/t1/1/best.pt", weights[:-1] + b"?")
    export = await rig.create(training)
    failed = await rig.until(export.name, Export.FAILED, seconds=60)
    assert "trainings/t1/1/best.pt" in failed.failure.status.message
    assert await rig.history(export.name) == ["QUEUED", "RUNNING", "FAILED"]


async def test_killed_job_is_begun_again(rig: Rig, weights: bytes, tmp_path: Path) -> None:
    export = await rig.create(await put_training(rig, weights))
    await until_stage(rig, export.name)
    (job,) = jobs_in(rig.settings)
    os.kill(job, signal.SIGKILL)
    done = await rig.until(export.name, Export.SUCCEEDED, seconds=60)
    states = await rig.history(export.name)
    assert states == ["QUEUED", "RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]
    content = b"".join(chunk.data for chunk in await rig.download(export.name))
    check_file(rig, done, content, tmp_path)


async def test_cancel_kills_the_job_within_seconds(rig: Rig, weights: bytes) -> None:
    export = await rig.create(await put_training(rig, weights))
    await until_stage(rig, export.name)
    await rig.cancel(export.name)

    async def nothing_is_left() -> bool:
        return not jobs_in(rig.settings) and not folders_of_jobs(rig.settings)

    await eventually(nothing_is_left, seconds=10)
    assert (await rig.get(export.name)).state == Export.CANCELLED


async def test_killed_trainer_takes_its_job_along_and_another_makes_the_export(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    weights: bytes,
    tmp_path: Path,
) -> None:
    url = await make_database_url("trainer")
    environ = {
        **os.environ,
        "DETFLOW_DATABASE_URL": url,
        "DETFLOW_NATS_URL": nats_url,
        "DETFLOW_STORE_URL": f"file://{tmp_path}/store",
        "DETFLOW_DATA_DIR": str(tmp_path / "data"),
        "DETFLOW_ACCESS": "open",
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
    }
    trainer = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.export_rig", env=environ, stdout=asyncio.subprocess.PIPE
    )
    assert trainer.stdout is not None
    address = (await trainer.stdout.readline()).decode().strip()
    settings = Settings(data_dir=tmp_path / "data", store_url=environ["DETFLOW_STORE_URL"])
    async with channels.channel(address) as channel:
        db = await Database.connect(url, "trainer", max_size=1)
        stub = export_pb2_grpc.ExportServiceStub(channel)
        doomed = Rig(db, ObjectStore(settings.store_url), settings, stub, Jobs())
        export = await doomed.create(await put_training(doomed, weights))
        await until_stage(doomed, export.name)
        await db.close()
    (job,) = jobs_in(settings)
    trainer.kill()
    await trainer.wait()

    async def job_is_gone() -> bool:
        return job not in jobs_in(settings)

    await eventually(job_is_gone)
    async with export_rig.running(
        nats_url=nats_url, database_url=url, folder=tmp_path, real_jobs=True
    ) as rig:
        done = await rig.until(export.name, Export.SUCCEEDED, seconds=60)
        states = await rig.history(export.name)
        assert states == ["QUEUED", "RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]
        content = b"".join(chunk.data for chunk in await rig.download(export.name))
        check_file(rig, done, content, tmp_path)
    assert not folders_of_jobs(settings)


async def test_trainer_that_shuts_down_gives_its_export_back_without_counting_it(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> None:
    url = await make_database_url("trainer")
    keys: list[str] = []
    for _ in range(4):  # one more than an export may be begun
        async with export_rig.running(nats_url=nats_url, database_url=url, folder=tmp_path) as rig:
            if not keys:
                name = (await rig.create(await rig.training())).name
            job = await rig.jobs.next()
            keys.append(job.spec.export.key)
        assert job.ended.is_set()
    async with export_rig.running(nats_url=nats_url, database_url=url, folder=tmp_path) as rig:
        (await rig.jobs.next()).result.set_exception(Aborted("killed", reason="JOB_DIED"))
        (await rig.jobs.next()).succeed(rig.store, b"model")
        await rig.until(name, Export.SUCCEEDED)
    assert len(set(keys)) == len(keys)


async def test_replicas_share_the_queue_and_make_each_export_once(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> None:
    url = await make_database_url("trainer")
    async with (
        export_rig.running(nats_url=nats_url, database_url=url, folder=tmp_path) as first,
        export_rig.running(nats_url=nats_url, database_url=url, folder=tmp_path) as second,
    ):
        training = await first.training()
        exports = [(await first.create(training)).name for _ in range(6)]
        made = []
        for _ in range(3):
            for rig in (first, second):
                job = await rig.jobs.next()
                made.append(job.spec.export.export.name)
                job.succeed(rig.store, b"model")
        assert sorted(made) == exports
        for name in exports:
            await second.until(name, Export.SUCCEEDED)
            assert await first.history(name) == ["QUEUED", "RUNNING", "SUCCEEDED"]
