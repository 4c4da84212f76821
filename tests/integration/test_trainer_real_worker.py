"""The trainer with the real worker: a whole small training, and one whose worker is killed."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from detflow import channels
from detflow.events import Bus
from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.tasks import Bell
from detflow.v1 import trainer_pb2, training_pb2
from services.metrics import store
from services.metrics.consumer import TrainingEvents
from services.metrics.series_reader import read_step_series
from services.trainer.attempt import Deadlines
from services.trainer.executors.local import LocalExecutor
from tests import trainer_rig
from tests.integration.test_metrics_events import delivered
from tests.shapes_bundle import write_bundle
from tests.trainer_players import VERSION
from tests.trainer_rig import Rig, State, eventually

pytestmark = pytest.mark.slow


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    manifest = write_bundle(
        ObjectStore(f"file://{tmp_path}/store"), {"train": 21, "val": 8, "test": 3}
    )
    async with trainer_rig.running(
        bus=bus,
        nats_url=nats_url,
        database_url=await make_database_url("trainer"),
        folder=tmp_path,
        deadlines=Deadlines(),
        make_executor=LocalExecutor,
    ) as one:
        one.versions.by_name[VERSION].manifest.CopyFrom(manifest)
        yield one


def worker_pid(rig: Rig) -> int:
    """Finds the worker by its folder, as an operator would."""
    folder = str(rig.settings.data_dir)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "services.trainer.worker" in command and any(
            part.startswith(folder) for part in command
        ):
            return int(path.parent.name)
    raise AssertionError("no worker runs")


async def test_worker_killed_in_the_middle_goes_on_and_every_epoch_and_step_is_told_once(
    rig: Rig, make_database: Callable[[str], Awaitable[Database]]
) -> None:
    training = await rig.start(
        epochs=4, batch_size=7, hyperparameters={"image_size": 64, "warmup_epochs": 0}
    )
    await rig.until_epochs(training.name, 1)
    os.kill(worker_pid(rig), signal.SIGKILL)
    async with asyncio.timeout(120):
        await rig.predictions[training.name.rsplit("/", 1)[1], 2].wait()
    await rig.evaluate_both(training.name, attempt=2)
    done = await rig.until_state(training.name, State.SUCCEEDED)
    assert (done.num_epochs_done, done.attempt) == (4, 2)
    assert ObjectStore(rig.settings.store_url).get(done.weights)
    events = await rig.events(training.name.rsplit("/", 1)[1])
    epochs = [event.epoch.epoch for event in events if event.HasField("epoch")]
    assert sorted(set(epochs)) == [1, 2, 3, 4] and len(epochs) <= 5
    attempts = {event.steps.attempt for event in events if event.HasField("steps")}
    assert attempts == {1, 2}
    metrics = await make_database("metrics")
    async with metrics.transaction() as conn:
        for number, event in enumerate(events, start=1):
            await TrainingEvents(Bell(), Bell()).handle(conn, delivered("t", number, event))
        known = await store.get_training(conn, "t")
        assert known is not None
        series = await read_step_series(conn, known, max_points=1000)
    assert {one.name for one in series} == {
        *(f"train/{name}_loss" for name in ("box", "cls", "dfl")),
        *("lr", "images_per_second", "data_wait_share", "memory_bytes"),
    }
    for one in series:
        assert one.steps_N is not None
        places = list(zip(one.epochs_N.tolist(), one.steps_N.tolist(), strict=True))
        assert places == [(epoch, step) for epoch in range(1, 5) for step in (1, 2, 3)]

    async def folders_are_gone() -> bool:
        return not list((rig.settings.data_dir / "trainings").glob("*/*"))

    await eventually(folders_are_gone)


async def test_training_is_tried_on_the_real_data_without_being_started(rig: Rig) -> None:
    asked = training_pb2.Training(model="yolov8n", epochs=4, batch_size=4)
    asked.hyperparameters.update({"image_size": 64})
    request = trainer_pb2.StartTrainingRequest(parent=VERSION, training=asked, validate_only=True)
    with channels.translate():
        would_be = await rig.stub.StartTraining(request, timeout=120)
    found = would_be.preflight
    names = ["labels", "images", "train_step", "validation", "checkpoint", "memory", "disk"]
    assert [check.name for check in found.checks] == names
    assert found.step_seconds > 0 and found.memory_bytes > 0 and found.disk_bytes > 0
    assert not (await rig.list_trainings()).trainings
    assert not list((rig.settings.data_dir / "jobs").glob("*"))
