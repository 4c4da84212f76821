"""The trainer with real workers that are let down: by the disk, by memory, by their own code."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from detflow.events import Bus
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import Failure
from services.trainer.attempt import Deadlines
from services.trainer.executors.local import LocalExecutor
from services.trainer.stall import Patience
from tests import trainer_rig
from tests.shapes_bundle import write_bundle
from tests.trainer_players import PROJECT
from tests.trainer_rig import Rig, State

pytestmark = pytest.mark.slow

OTHER = f"{PROJECT}/versions/other"
QUICK = {"image_size": 64, "warmup_epochs": 0, "patience": 0}

# What the workers are made to suffer, while there is a file of this name beside the store:
# disk-{training}: no room for the third checkpoint; stuck-{training}: no end of the fifth step of
# the first attempt, while its other threads go on. All save a checkpoint after every epoch.
_FAULTS = """
import errno, os, sys, time
from pathlib import Path
from services.trainer.worker import library

folder = Path({folder!r})
spec = Path(sys.orig_argv[-1])
training, attempt = spec.parent.parent.name, spec.parent.name
load_nms = library.load_nms

def load_and_break():
    load_nms()
    from detflow.store import ObjectStore
    from services.trainer.worker import training as saving
    from services.trainer.worker.loop import Trainer
    put, step, begun = ObjectStore.put, Trainer.step, []

    def put_if_room(self, key, data):
        if key.endswith("checkpoint-000003.pt") and (folder / ("disk-" + training)).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(self, key, data)

    def step_or_hang(self, *arguments, **more):
        if "update" not in more:  # the steps that are tried beforehand say that they update
            begun.append(self)
        if len(begun) == 5 and attempt == "1" and (folder / ("stuck-" + training)).exists():
            while True:
                time.sleep(3600)
        return step(self, *arguments, **more)

    ObjectStore.put, Trainer.step = put_if_room, step_or_hang
    saving._CHECKPOINT_SHARE = float("inf")

library.load_nms = load_and_break
"""


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    manifest = write_bundle(
        ObjectStore(f"file://{tmp_path}/store"), {"train": 14, "val": 4, "test": 2}
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_FAULTS.format(folder=str(tmp_path)))
    paths = os.pathsep.join((str(tmp_path / "site"), str(Path(__file__).parents[2])))

    def executor(settings: Settings) -> LocalExecutor:
        return LocalExecutor(settings, environ={**os.environ, "PYTHONPATH": paths})

    async with trainer_rig.running(
        bus=bus,
        nats_url=nats_url,
        database_url=await make_database_url("trainer"),
        folder=tmp_path,
        deadlines=Deadlines(grace=1.0, patience=Patience(first_step=5.0, progress=5.0)),
        num_slots=2,
        make_executor=executor,
    ) as one:
        one.versions.put(OTHER)
        for version in one.versions.by_name.values():
            version.manifest.CopyFrom(manifest)
        yield one


def id_of(name: str) -> str:
    return name.rsplit("/", 1)[1]


def info(failure: Failure) -> error_details_pb2.ErrorInfo:
    found = error_details_pb2.ErrorInfo()
    detail: Message = failure.status.details[0]
    detail.Unpack(found)  # type: ignore[attr-defined]
    return found


async def checkpoints(rig: Rig, training_id: str) -> list[int]:
    async with rig.db.connection() as conn:
        rows = await conn.fetch(
            "select epoch from checkpoint where training_id = $1 order by epoch", training_id
        )
    return [row["epoch"] for row in rows]


async def test_training_without_room_fails_at_once_and_harms_no_other(
    rig: Rig, tmp_path: Path
) -> None:
    training = await rig.start(epochs=5, batch_size=7, hyperparameters=QUICK)
    full = tmp_path / f"disk-{id_of(training.name)}"
    full.touch()
    other = await rig.start(parent=OTHER, epochs=4, batch_size=7, hyperparameters=QUICK)
    failed = await rig.until_state(training.name, State.FAILED)
    assert info(failed.failure).reason == "DISK_FULL"
    assert "MiB free at DETFLOW_STORE_URL" in failed.failure.status.message
    assert (failed.attempt, failed.num_epochs_done) == (1, 2)  # a second attempt helps nobody
    assert await checkpoints(rig, id_of(training.name)) == [1, 2]
    await rig.evaluate_both(other.name)
    assert (await rig.until_state(other.name, State.SUCCEEDED)).attempt == 1

    full.unlink()  # there is room again
    await rig.resume(training.name)
    await rig.evaluate_both(training.name, attempt=2)
    done = await rig.until_state(training.name, State.SUCCEEDED)
    assert done.num_epochs_done == 5
    events = await rig.events(id_of(training.name))
    epochs = [
        (event.epoch.attempt, event.epoch.epoch) for event in events if event.HasField("epoch")
    ]
    assert epochs == [(1, 1), (1, 2), (2, 3), (2, 4), (2, 5)]


async def test_worker_stuck_in_a_step_is_killed_though_it_sends_its_heartbeats(
    rig: Rig, tmp_path: Path
) -> None:
    training = await rig.start(epochs=3, batch_size=7, hyperparameters=QUICK)
    (tmp_path / f"stuck-{id_of(training.name)}").touch()
    again = await rig.until(training.name, lambda found: found.attempt == 2)
    assert info(again.failure).reason == "STALLED"
    assert info(again.failure).metadata["stage"] in ("train", "validate")
    await rig.evaluate_both(training.name, attempt=2)
    done = await rig.until_state(training.name, State.SUCCEEDED)
    assert (done.attempt, done.num_epochs_done) == (2, 3)
    events = await rig.events(id_of(training.name))
    epochs = [
        (event.epoch.attempt, event.epoch.epoch) for event in events if event.HasField("epoch")
    ]
    assert epochs == [(1, 1), (1, 2), (2, 3)]
    assert await asyncio.to_thread(lambda: list(rig.settings.data_dir.glob("trainings/*/1"))) == []
