"""Twenty kill -9 over every process while versions are made and one training runs."""

import asyncio
import random
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from detflow import channels
from detflow.errors import DetflowError, Unavailable
from detflow.events import Bus
from detflow.local import postgres
from detflow.local.demo_data import write_dataset
from detflow.local.process import is_free
from detflow.local.running import owner_token
from detflow.local.stack import stack
from detflow.store import ObjectStore
from detflow.v1 import (
    dataset_pb2,
    metrics_pb2,
    trainer_pb2,
    training_pb2,
    version_pb2,
)
from tests.background import running
from tests.chaos import invariants
from tests.deployment_rig import Deployment

T = TypeVar("T")
SEED = 20
KILLS = 20
EPOCHS = 40
PROJECT = "projects/default"
TARGETS = ["version", "preprocess", "trainer", "metrics", "gateway", "postgres", "nats", "worker"]
TRANSIENT = (Unavailable,)


async def upload(deployment: Deployment, archive: Path) -> str:
    async def requests() -> Any:
        yield dataset_pb2.UploadArchiveRequest(parent=PROJECT)
        with archive.open("rb") as file:
            while chunk := file.read(1 << 20):
                yield dataset_pb2.UploadArchiveRequest(chunk=chunk)
            yield dataset_pb2.UploadArchiveRequest(size_bytes=file.tell())

    name: str = (await deployment.datasets.UploadArchive(requests(), timeout=30)).name
    return name


async def follow_versions(deployment: Deployment, seen: dict[str, list[int]]) -> None:
    """Watches through every kill with the cursor; records the revisions it was told of."""
    cursor = ""
    while True:
        try:
            with channels.translate():
                request = version_pb2.WatchVersionsRequest(parent=PROJECT, cursor=cursor)
                async for message in deployment.versions.WatchVersions(request):
                    cursor = message.cursor
                    match message.WhichOneof("what"):
                        case "snapshot":
                            for version in message.snapshot.versions:
                                seen.setdefault(version.name, []).append(version.revision)
                        case "version":
                            found = message.version
                            seen.setdefault(found.name, []).append(found.revision)
        except TRANSIENT:
            await asyncio.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    archive = tmp_path / "shapes.zip"
    write_dataset(tmp_path / "shapes", num_images=48, seed=SEED)
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((tmp_path / "shapes").rglob("*")):
            file.write(path, path.relative_to(tmp_path / "shapes"))
    data_dir = tmp_path / "data"
    port = next(p for p in range(23000, 33000, 5) if all(is_free(p + k) for k in range(5)))
    async with stack(data_dir, port=port) as supervisor:
        deployment = Deployment(supervisor, port, token=owner_token(data_dir))
        try:
            await _cause_trouble(deployment, chance, archive, data_dir)
        finally:
            await deployment.close()
    invariants.check_no_leftovers(data_dir)


async def _cause_trouble(
    deployment: Deployment, chance: random.Random, archive: Path, data_dir: Path
) -> None:
    source = await deployment.patiently(lambda: upload(deployment, archive))
    dataset = await deployment.patiently(
        lambda: deployment.datasets.CreateDataset(
            dataset_pb2.CreateDatasetRequest(
                parent=PROJECT,
                dataset=dataset_pb2.Dataset(display_name="shapes"),
                upload=source,
                request_id="shapes",
            )
        )
    )
    dataset = await wait_for(
        deployment,
        lambda: deployment.datasets.GetDataset(dataset_pb2.GetDatasetRequest(name=dataset.name)),
        lambda d: d.state != dataset_pb2.Dataset.IMPORTING,
    )
    assert dataset.state == dataset_pb2.Dataset.READY, dataset.failure

    acknowledged: dict[str, str] = {}
    await create_version(deployment, dataset.name, "trained", acknowledged)
    trained = next(iter(acknowledged))
    await wait_for_version(deployment, trained)
    training = await deployment.patiently(lambda: start(deployment, trained))

    seen: dict[str, list[int]] = {}
    schedule = [*(TARGETS * KILLS)[: KILLS - 2], "worker", "trainer"]
    chance.shuffle(schedule)
    async with running(follow_versions(deployment, seen)):
        for number, target in enumerate(schedule):
            training = await kill_during(deployment, target, training)
            await create_version(deployment, dataset.name, f"during kill {number}", acknowledged)
            await asyncio.sleep(chance.uniform(0.0, 1.5))  # moves the next kill to another moment
        for name in acknowledged:
            await wait_for_version(deployment, name)
        async with asyncio.timeout(420):
            while training.state != training_pb2.Training.SUCCEEDED:
                training = await keep_going(deployment, training)
                await asyncio.sleep(0.3)
        final = await wait_for(
            deployment,
            lambda: deployment.versions.GetVersion(version_pb2.GetVersionRequest(name=trained)),
            lambda v: v.state == version_pb2.Version.COMPLETED,
        )
        await check_everything(deployment, data_dir, acknowledged, training, final, seen)


async def kill_during(
    deployment: Deployment, target: str, training: training_pb2.Training
) -> training_pb2.Training:
    """Kills a process as soon as there is one, while the training is under way."""
    async with asyncio.timeout(90):
        while True:
            training = await keep_going(deployment, training)
            assert training.state != training_pb2.Training.SUCCEEDED, f"no time to kill {target}"
            if deployment.kill(target):
                return training
            await asyncio.sleep(0.05)


async def check_everything(
    deployment: Deployment,
    data_dir: Path,
    acknowledged: dict[str, str],
    training: training_pb2.Training,
    final: version_pb2.Version,
    seen: dict[str, list[int]],
) -> None:
    manifests = []
    for name, display_name in acknowledged.items():  # I1
        version = await deployment.versions.GetVersion(version_pb2.GetVersionRequest(name=name))
        assert version.display_name == display_name
        manifests.append(version.manifest)
        async with asyncio.timeout(20):
            while seen.get(name, [0])[-1] < version.revision:  # noqa: ASYNC110  # an RPC away
                await asyncio.sleep(0.1)
    for name, revisions in seen.items():  # the watcher's view has no gap and no duplicate
        first = revisions[0]
        assert revisions == list(range(first, first + len(revisions))), name

    series = await deployment.metrics.ListMetricSeries(  # I8
        metrics_pb2.ListMetricSeriesRequest(training=training.name)
    )
    assert series.series
    for one in series.series:
        assert list(one.epochs) == list(range(1, EPOCHS + 1)), one.name
    evaluations = await deployment.metrics.ListEvaluations(
        metrics_pb2.ListEvaluationsRequest(parent=training.name)
    )
    assert len(evaluations.evaluations) == 2

    bus = await Bus.connect(deployment.setting("version", "DETFLOW_NATS_URL"), "chaos")
    events = await invariants.read_events(bus)
    await bus.close()
    invariants.check_histories(events)  # I2
    invariants.check_attempts(events)  # I3
    urls = {name: deployment.setting(name, "DETFLOW_DATABASE_URL") for name in postgres.SERVICES}
    await invariants.check_outboxes(urls, events)  # I4
    invariants.check_objects(  # I5
        ObjectStore((data_dir / "store").as_uri()), manifests, [training.weights]
    )
    live = await deployment.trainer.ListTrainings(  # I7
        trainer_pb2.ListTrainingsRequest(parent=f"{PROJECT}/versions/-")
    )
    assert [t.state for t in live.trainings] == [training_pb2.Training.SUCCEEDED]
    assert final.training == training.name


async def wait_for(
    deployment: Deployment, get: Callable[[], Awaitable[T]], done: Callable[[T], bool]
) -> T:
    async with asyncio.timeout(90):
        while True:
            found = await deployment.patiently(get)
            if done(found):
                return found
            await asyncio.sleep(0.1)


async def wait_for_version(deployment: Deployment, name: str) -> None:
    version = await wait_for(
        deployment,
        lambda: deployment.versions.GetVersion(version_pb2.GetVersionRequest(name=name)),
        lambda v: v.state != version_pb2.Version.PREPROCESSING,
    )
    assert version.state != version_pb2.Version.FAILED or version.training, version.failure


async def create_version(
    deployment: Deployment, dataset: str, display_name: str, acknowledged: dict[str, str]
) -> None:
    """Creates a version with a request id, so that a retry after a lost reply is safe."""
    version = await deployment.patiently(
        lambda: deployment.versions.CreateVersion(
            version_pb2.CreateVersionRequest(
                parent=PROJECT,
                version=version_pb2.Version(display_name=display_name, dataset=dataset),
                request_id=display_name,
            )
        )
    )
    acknowledged[version.name] = version.display_name


async def start(deployment: Deployment, version: str) -> training_pb2.Training:
    training = training_pb2.Training(model="yolov8n", batch_size=8, epochs=EPOCHS)
    training.hyperparameters.update({"image_size": 64, "seed": SEED})
    started: training_pb2.Training = await deployment.trainer.StartTraining(
        trainer_pb2.StartTrainingRequest(parent=version, training=training, request_id="one")
    )
    return started


async def keep_going(
    deployment: Deployment, training: training_pb2.Training
) -> training_pb2.Training:
    """Reads the training; resumes it as a user would once its automatic restarts are used up."""
    training = await deployment.patiently(
        lambda: deployment.trainer.GetTraining(trainer_pb2.GetTrainingRequest(name=training.name))
    )
    if training.state == training_pb2.Training.FAILED:
        try:
            training = await deployment.patiently(
                lambda: deployment.trainer.ResumeTraining(
                    trainer_pb2.ResumeTrainingRequest(name=training.name)
                )
            )
        except DetflowError as error:
            # The reply of an earlier try was lost: the training is queued already.
            assert error.reason in ("TRAINING_NOT_RESUMABLE", "TRAINING_RUNS"), error
    return training
