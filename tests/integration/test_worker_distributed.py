"""Workers on several devices of one machine; without GPUs a device is a process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.protobuf import json_format

from detflow.errors import Unavailable, from_status
from detflow.events import Bus
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import StopMode
from detflow.v1.worker_pb2 import Checkpoint, LeaseResponse
from tests.shapes_bundle import spec_json, write_bundle
from tests.worker_rig import Worker, running_worker

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent.parent
TINY = {"image_size": 64, "warmup_epochs": 0, "nominal_batch_size": 8}
LONG = 1000


@dataclass(frozen=True)
class Shared:
    """A bundle."""

    folder: Path
    store: ObjectStore
    manifest: StoredObject

    def spec(self, *, num_devices: int, epochs: int = 3, **more: Any) -> str:
        resources = {"numDevicesPerNode": num_devices}
        return spec_json(
            self.manifest,
            epochs=epochs,
            hyperparameters=TINY,
            **{"batchSize": 8, "resources": resources, **more},
        )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("ranks")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": 35, "val": 6, "test": 3})

    async def make_streams() -> None:
        bus = await Bus.connect(nats_url, "test")
        await bus.ensure_streams()
        await bus.close()

    asyncio.run(make_streams())
    yield Shared(folder, store, manifest)


@pytest.fixture
def start(shared: Shared, nats_url: str, tmp_path: Path) -> Callable[..., Any]:
    def start(spec: str, name: str = "attempt", reply: LeaseResponse | None = None) -> Any:
        return running_worker(
            spec, tmp_path / name, nats_url=nats_url, store=shared.store, reply=reply
        )

    return start


def play(shared: Shared, folder: Path, num_devices: int, **more: Any) -> list[Any]:
    """Lets the player learn; returns what each rank has seen."""
    folder.mkdir()
    path = folder / "spec.json"
    path.write_text(shared.spec(num_devices=num_devices, **more))
    settings = {
        "DETFLOW_STORE_URL": shared.store.url,
        "DETFLOW_DATA_DIR": str(shared.folder / "bundles"),
    }
    subprocess.run(
        [sys.executable, "-m", "tests.rank_player", str(path)],
        cwd=REPOSITORY,
        env={**os.environ, **settings},
        timeout=120,
        check=True,
    )
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def played(shared: Shared) -> list[Any]:
    """What each of two ranks has seen: a given batch, two epochs, resumes, an error."""
    return play(shared, shared.folder / "two", 2, epochs=2)


def processes_of(folder: Path) -> dict[int, psutil.Process]:
    """Finds the processes of an attempt by its folder: process by rank."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
        if "services.trainer.worker" in command and str(folder / "spec.json") in command:
            ranks = [part for part in command if part.startswith("--rank=")]
            found[int(ranks[0].removeprefix("--rank=")) if ranks else 0] = process
    return found


def until_gone(processes: dict[int, psutil.Process]) -> None:
    _, alive = psutil.wait_procs(list(processes.values()), timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_two_ranks_learn_what_one_learns_from_the_same_batch_in_two_parts(
    shared: Shared, played: list[Any]
) -> None:
    first, second = played
    [alone] = play(shared, shared.folder / "one", 1, epochs=1, stepBatchSize=4)
    assert first[0]["state"] == second[0]["state"]
    assert first[0]["values"] == pytest.approx(alone[0]["values"], rel=1e-5)
    for loss in ("train/box_loss", "train/cls_loss", "train/dfl_loss"):  # other augmentations
        assert first[1]["values"][loss] == pytest.approx(alone[1]["values"][loss], rel=0.3)


def test_both_ranks_have_the_same_weights_after_every_epoch(played: list[Any]) -> None:
    states = [[seen["state"] for seen in rank[:3]] for rank in played]
    assert states[0] == states[1]
    assert len(set(states[0])) == 3


def test_training_resumed_among_accumulated_batches_ends_as_one_that_was_not_interrupted(
    played: list[Any],
) -> None:
    for rank in played:
        uninterrupted, *resumed = rank[3]["resumed"]
        assert resumed == [uninterrupted] * 2
    assert played[0][3] == played[1][3]


def test_what_a_rank_fails_with_is_what_the_attempt_fails_with(played: list[Any]) -> None:
    assert played[0][4]["reason"] == "OUT_OF_MEMORY"


async def test_finished_training_can_go_on_with_another_number_of_devices(
    shared: Shared, start: Callable[..., Any], tmp_path: Path
) -> None:
    async with start(shared.spec(num_devices=2, epochs=LONG)) as worker:
        await worker.until(lambda w: bool(w.parts("epoch")))
        ranks = processes_of(tmp_path / "attempt")
        assert set(ranks) == {0, 1}
        worker.reply = LeaseResponse(stop_mode=StopMode.STOP_MODE_FINISH)
        assert await worker.exit_code() == 0, worker.errors()
    until_gone(ranks)
    epochs = worker.parts("epoch")
    assert len(worker.parts("evaluating")) == len(worker.parts("finished")) == 1
    last: Checkpoint = epochs[-1].epoch.checkpoint
    then = {"attempt": 2, "checkpoint": json_format.MessageToDict(last)}
    async with start(shared.spec(num_devices=3, epochs=LONG, **then), "next") as worker:
        await worker.until(lambda w: bool(w.parts("epoch")))
        ranks = processes_of(tmp_path / "next")
        assert set(ranks) == {0, 1, 2}
    until_gone(ranks)  # the first was killed
    [started], epoch = worker.parts("started"), worker.parts("epoch")[0]
    assert started.started.first_epoch == epoch.epoch.metrics.epoch == last.epoch + 1
    before, after = epochs[-1].epoch.metrics.values, epoch.epoch.metrics.values
    assert after["val/cls_loss"] == pytest.approx(before["val/cls_loss"], rel=0.3)


async def test_paused_worker_ends_all_its_processes(
    shared: Shared, start: Callable[..., Any], tmp_path: Path
) -> None:
    async with start(shared.spec(num_devices=2, epochs=LONG)) as worker:
        await worker.until(lambda w: any(p.stage == "train" and p.step > 1 for p in w.progress))
        ranks = processes_of(tmp_path / "attempt")
        worker.reply = LeaseResponse(stop_mode=StopMode.STOP_MODE_PAUSE)
        assert await worker.exit_code(10) == 4, worker.errors()
        until_gone(ranks)
    assert not worker.parts("failed")


async def test_killed_rank_ends_the_attempt_so_that_another_can_help(
    shared: Shared, start: Callable[..., Any], tmp_path: Path
) -> None:
    async with start(shared.spec(num_devices=2, epochs=LONG)) as worker:
        await worker.until(lambda w: any(p.stage == "train" and p.step > 1 for p in w.progress))
        ranks = processes_of(tmp_path / "attempt")
        ranks[1].kill()
        assert await worker.exit_code(20) == 1
        until_gone(ranks)
    error = failure_of(worker)
    assert isinstance(error, Unavailable) and error.reason == "RANK_LOST"
    assert "rank 1 (killed by signal 9)" in error.message


async def test_more_devices_than_images_in_a_batch_are_refused(
    shared: Shared, start: Callable[..., Any]
) -> None:
    async with start(shared.spec(num_devices=4, batchSize=2)) as worker:
        assert await worker.exit_code() == 1
    assert "raise batch_size" in str(failure_of(worker))


def failure_of(worker: Worker) -> Any:
    [record] = worker.parts("failed")
    return from_status(record.failed.failure.status)
