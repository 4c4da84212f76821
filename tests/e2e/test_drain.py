"""SIGTERM to one service while it works, and trainings that are paused or lose their version."""

import asyncio
import contextlib
import io
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import psutil
import pytest
import pytest_asyncio

from detflow import channels
from detflow.errors import Unavailable
from detflow.names import last_segment
from detflow.v1 import (
    dataset_pb2,
    metrics_pb2,
    preprocess_pb2,
    trainer_pb2,
    training_pb2,
    version_pb2,
)
from services.preprocess.uploads import PART_BYTES
from tests.chaos import invariants
from tests.deployment_rig import (
    PROJECT,
    Deployment,
    Gates,
    create_version,
    deployed,
    eventually,
    import_dataset,
    ready_version,
    start_training,
    until_gone,
    write_archive,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]
State = training_pb2.Training.State
DRAIN_SECONDS = 4.0
EXIT_SECONDS = 2.0  # from the end of the drain to that of the process, on a busy machine
BACK_SECONDS = 5.0
RESUMED_SECONDS = 30.0
WORKER_SECONDS = 8.0  # a worker's grace, and its last records


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def gates() -> Gates:
    return Gates()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(data_dir: Path, gates: Gates) -> AsyncIterator[Deployment]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETFLOW_DRAIN_SECONDS", str(DRAIN_SECONDS))
        async with deployed(data_dir, gates=gates) as deployment:
            yield deployment
    invariants.check_no_leftovers(data_dir)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("images"), 300)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dataset(deployment: Deployment, archive: Path) -> str:
    return await import_dataset(deployment, archive, "shapes")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small_dataset(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> str:
    small = await asyncio.to_thread(write_archive, tmp_path_factory.mktemp("few"), 24)
    return await import_dataset(deployment, small, "few shapes")


@contextlib.asynccontextmanager
async def drained(
    deployment: Deployment, gates: Gates, name: str, seconds: float = DRAIN_SECONDS
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Sends SIGTERM, and lets the service start again after the body.

    Yields what waits until the process has ended, and checks that it did so well and in time and
    took its children along; it is awaited after the body at the latest.
    """
    process = deployment.process(name)
    everything = [process, *process.children(recursive=True)]
    begin = time.monotonic()

    async def ended() -> None:
        left = begin + seconds + EXIT_SECONDS - time.monotonic()
        await until_gone(everything, left)
        said = await eventually(lambda: last_word(deployment, name), bool, seconds=5)
        assert said.startswith(f"{name} ended (exit code 0)")

    with gates.closed(name):
        process.terminate()
        yield ended
        await ended()
    back = time.monotonic()
    await eventually(lambda: deployment.health(name), bool)
    assert time.monotonic() - back < BACK_SECONDS


async def last_word(deployment: Deployment, name: str) -> str:
    return next((word for word in deployment.told[::-1] if word.startswith(name)), "")


async def test_watch_is_told_to_come_back_and_resumes_exactly(
    deployment: Deployment, gates: Gates, small_dataset: str
) -> None:
    await ready_version(deployment, small_dataset, "before")
    request = version_pb2.WatchVersionsRequest(parent=PROJECT)
    with channels.translate():
        watch = deployment.versions.WatchVersions(request)
        first = await watch.read()
    assert first.HasField("snapshot")
    async with drained(deployment, gates, "version"):
        with pytest.raises(Unavailable), channels.translate():
            await watch.read()
    version = await deployment.patiently(
        lambda: create_version(deployment, small_dataset, "meanwhile")
    )
    await deployment.until_version(version.name, version_pb2.Version.READY)
    request.cursor = first.cursor
    missed = []
    async for message in deployment.versions.WatchVersions(request):
        assert message.HasField("version")
        missed.append((message.version.name, message.version.revision, message.version.state))
        if message.version.state == version_pb2.Version.READY:
            break
    assert missed == [
        (version.name, 1, version_pb2.Version.PREPROCESSING),
        (version.name, 2, version_pb2.Version.READY),
    ]


async def test_upload_under_way_may_finish(
    deployment: Deployment, gates: Gates, archive: Path, data_dir: Path
) -> None:
    content = await asyncio.to_thread(larger_than_a_part, archive)
    draining = asyncio.Event()

    async def requests() -> AsyncIterator[dataset_pb2.UploadArchiveRequest]:
        yield dataset_pb2.UploadArchiveRequest(parent=PROJECT)
        for start in range(0, len(content), 1 << 20):
            if start > PART_BYTES:
                await draining.wait()
            yield dataset_pb2.UploadArchiveRequest(chunk=content[start : start + (1 << 20)])
        yield dataset_pb2.UploadArchiveRequest(size_bytes=len(content))

    stored = await parts_of_uploads(data_dir)
    call = deployment.datasets.UploadArchive(requests(), timeout=30)
    await eventually(lambda: parts_of_uploads(data_dir), lambda parts: parts != stored)
    async with drained(deployment, gates, "preprocess"):
        await eventually(lambda: deployment.health("preprocess"), lambda serving: not serving)
        draining.set()
        upload = await call
    assert upload.size_bytes == len(content)
    dataset = await deployment.patiently(
        lambda: deployment.datasets.CreateDataset(
            dataset_pb2.CreateDatasetRequest(
                parent=PROJECT,
                dataset=dataset_pb2.Dataset(display_name="uploaded while draining"),
                upload=upload.name,
            )
        )
    )
    assert dataset.state == dataset_pb2.Dataset.IMPORTING


async def test_upload_that_takes_too_long_is_refused_and_leaves_nothing(
    deployment: Deployment, gates: Gates, data_dir: Path
) -> None:
    never = asyncio.Event()

    async def requests() -> AsyncIterator[dataset_pb2.UploadArchiveRequest]:
        yield dataset_pb2.UploadArchiveRequest(parent=PROJECT)
        for _ in range(PART_BYTES // (1 << 20)):
            yield dataset_pb2.UploadArchiveRequest(chunk=b"x" * (1 << 20))
        await never.wait()

    stored = await parts_of_uploads(data_dir)
    call = deployment.datasets.UploadArchive(requests(), timeout=30)
    await eventually(lambda: parts_of_uploads(data_dir), lambda parts: parts != stored)
    async with drained(deployment, gates, "preprocess"):
        with pytest.raises(Unavailable), channels.translate():
            await call
    never.set()
    await eventually(lambda: parts_of_uploads(data_dir), lambda parts: parts <= stored)


async def test_preprocessing_is_given_back_and_goes_on(
    deployment: Deployment, gates: Gates, dataset: str
) -> None:
    version = await create_version(
        deployment, dataset, "large", augmentations=[1, 2, 3, 4, 5], max_side_px=128
    )
    watch = deployment.preprocess.WatchPreprocessing(
        preprocess_pb2.WatchPreprocessingRequest(version=version.name)
    )
    async for message in watch:
        assert message.preprocessing.state != preprocess_pb2.Preprocessing.SUCCEEDED
        if message.HasField("progress"):
            break
    async with drained(deployment, gates, "preprocess"):
        with pytest.raises(Unavailable), channels.translate():
            async for _ in watch:
                pass
    ready = await deployment.until_version(version.name, version_pb2.Version.READY)
    assert (ready.num_images.val, ready.num_images.test) == (60, 30)
    assert ready.num_images.train == 6 * 210


async def test_training_is_given_back_to_the_queue_and_goes_on_from_its_checkpoint(
    deployment: Deployment, gates: Gates, small_dataset: str, data_dir: Path
) -> None:
    version = await ready_version(deployment, small_dataset, "drained")
    training = await start_training(deployment, version)
    await deployment.until_epoch(training.name, 2)
    url = deployment.setting("trainer", "DETFLOW_DATABASE_URL")
    async with drained(deployment, gates, "trainer", WORKER_SECONDS) as ended:
        await ended()
        assert not list((data_dir / "work" / "trainer" / "trainings").rglob("spec.json"))
        conn = await asyncpg.connect(url, server_settings={"search_path": "trainer"})
        row = await conn.fetchrow(
            "select state, num_restarts, num_epochs_done from training where id = $1",
            last_segment(training.name),
        )
        await conn.close()
        assert row is not None
        assert (row["state"], row["num_restarts"]) == ("QUEUED", 0)
    back = time.monotonic()
    first = await deployment.until_attempt(training.name, 2)
    assert time.monotonic() - back < RESUMED_SECONDS
    assert first == row["num_epochs_done"] + 1
    await stop(deployment, training.name, training_pb2.STOP_MODE_DISCARD)


async def test_deleted_version_ends_its_training_and_comes_back_stopped(
    deployment: Deployment, small_dataset: str, data_dir: Path
) -> None:
    version = await ready_version(deployment, small_dataset, "deleted")
    training = await start_training(deployment, version)
    await deployment.until_epoch(training.name, 1)
    worker = deployment.worker()
    assert worker is not None
    with channels.translate():
        await deployment.versions.DeleteVersion(version_pb2.DeleteVersionRequest(name=version))
    await deployment.until_training(training.name, lambda t: t.state == State.STOPPED)
    await until_gone([worker])
    folder = data_dir / "work" / "trainer" / "trainings" / last_segment(training.name)
    await eventually(lambda: exists(folder), lambda there: not there, seconds=10)
    trash = await deployment.versions.ListVersions(
        version_pb2.ListVersionsRequest(parent=PROJECT, show_deleted=True)
    )
    assert [v.HasField("delete_time") for v in trash.versions if v.name == version] == [True]
    with channels.translate():
        await deployment.versions.UndeleteVersion(version_pb2.UndeleteVersionRequest(name=version))
    back = await deployment.until_version(version, version_pb2.Version.STOPPED)
    assert not back.HasField("delete_time")


async def test_paused_training_goes_on_counting_and_succeeds_though_metrics_drains(
    deployment: Deployment, gates: Gates, small_dataset: str
) -> None:
    version = await ready_version(deployment, small_dataset, "paused and resumed")
    training = await start_training(deployment, version, epochs=20, image_size=32)
    await deployment.until_epoch(training.name, 2)
    await stop(deployment, training.name, training_pb2.STOP_MODE_PAUSE)
    paused = await deployment.until_training(training.name, lambda t: t.state == State.PAUSED)
    await deployment.until_version(version, version_pb2.Version.PAUSED)
    with channels.translate():
        await deployment.trainer.ResumeTraining(
            trainer_pb2.ResumeTrainingRequest(name=training.name)
        )
    assert await deployment.until_attempt(training.name, 2) == paused.num_epochs_done + 1
    metrics = deployment.process("metrics")
    await eventually(lambda: children_of(metrics), lambda found: len(found) > 0)
    async with drained(deployment, gates, "metrics"):
        pass
    ended = await deployment.until_training(training.name, lambda t: t.state == State.SUCCEEDED)
    assert (ended.attempt, ended.num_epochs_done) == (2, 20)
    found = await deployment.patiently(
        lambda: deployment.metrics.ListMetricSeries(
            metrics_pb2.ListMetricSeriesRequest(training=training.name)
        )
    )
    for series in found.series:
        assert list(series.epochs) == list(range(1, 21)), series.name
    await deployment.until_version(version, version_pb2.Version.COMPLETED)


async def stop(
    deployment: Deployment, training: str, mode: "training_pb2.StopMode.ValueType"
) -> None:
    with channels.translate():
        await deployment.trainer.StopTraining(
            trainer_pb2.StopTrainingRequest(name=training, mode=mode)
        )
    final = (State.STOPPED, State.PAUSED)
    await deployment.until_training(training, lambda t: t.state in final)


async def parts_of_uploads(data_dir: Path) -> set[Path]:
    """Returns what the object store holds of uploads."""
    uploads = data_dir / "store" / "uploads"
    return await asyncio.to_thread(lambda: {path for path in uploads.rglob("*") if path.is_file()})


def larger_than_a_part(archive: Path) -> bytes:
    """Returns an archive with another file, so that its first part is stored before it ends."""
    content = io.BytesIO(archive.read_bytes())
    with zipfile.ZipFile(content, "a", zipfile.ZIP_STORED) as packed:
        packed.writestr("notes.bin", bytes(2 * PART_BYTES))
    return content.getvalue()


async def exists(path: Path) -> bool:
    return await asyncio.to_thread(path.exists)


async def children_of(process: psutil.Process) -> list[psutil.Process]:
    return process.children()
