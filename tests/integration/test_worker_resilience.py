"""What a real worker says when memory, disk, a GPU or its data let it down."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from detflow.errors import DetflowError, from_status
from detflow.events import Bus
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from tests.shapes_bundle import spec_json, write_bundle
from tests.worker_rig import Worker, running_worker

pytestmark = pytest.mark.slow

LIMIT_BYTES = 1900 << 20
"""Enough for 4 images of 320 px at a time, by far too little for 16."""

# Mounts a small disk over the store that no other process sees, and copies it out at the end.
_ON_SMALL_DISK = """
mount -t tmpfs -o size="$1" tmpfs "$2" && cp -a "$3/bundles" "$2" || exit 99
small="$2" out="$4"; shift 4
"$@"; code=$?
cp -a "$small" "$out"; exit $code
"""

# Fakes a GPU's failure in the second step: there is none here.
_BREAK_SECOND_STEP = """
from services.trainer.worker import library

load_nms = library.load_nms

def load_and_break():
    load_nms()
    import torch
    from services.trainer.worker.loop import Trainer
    step, begun = Trainer.step, []

    def break_second(self, *arguments, **more):
        begun.append(self)
        if len(begun) == 2:
            raise {error}
        return step(self, *arguments, **more)

    Trainer.step = break_second

library.load_nms = load_and_break
"""


@dataclass(frozen=True)
class Shared:
    """A bundle in a store."""

    folder: Path
    store: ObjectStore
    manifest: StoredObject
    nats_url: str

    def worker(
        self, name: str, *, image_size: int = 64, **more: Any
    ) -> AbstractAsyncContextManager[Worker]:
        rig = {key: more.pop(key) for key in ("variables", "on_start", "wrapper") if key in more}
        store = more.pop("store", self.store)
        spec = {"epochs": 2, "batchSize": 10, **more}
        values = {"image_size": image_size, "warmup_epochs": 0, "close_mosaic": 1}
        return running_worker(
            spec_json(self.manifest, hyperparameters=values, **spec),
            self.folder / name,
            nats_url=self.nats_url,
            store=store,
            **rig,
        )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("resilience")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": 21, "val": 8, "test": 3})

    async def make_streams() -> None:
        bus = await Bus.connect(nats_url, "test")
        await bus.ensure_streams()
        await bus.close()

    asyncio.run(make_streams())
    yield Shared(folder, store, manifest, nats_url)


def kinds(worker: Worker) -> list[str]:
    found = [str(record.WhichOneof("what")) for record in worker.records]
    return [kind for kind in found if kind not in ("log", "steps")]


async def failure_of(worker: Worker) -> DetflowError:
    assert await worker.exit_code() == 1, worker.errors()
    (record,) = worker.parts("failed")
    return from_status(record.failed.failure.status)


async def test_everything_is_tried_before_the_first_step_and_shown(
    shared: Shared, bus: Bus
) -> None:
    async with shared.worker("tried", preflight=True, epochs=1) as worker:
        assert await worker.exit_code() == 0, worker.errors()
    assert kinds(worker) == ["preflight", "started", "epoch", "evaluating", "finished"]
    found = worker.parts("preflight")[0].preflight
    assert [check.name for check in found.checks] == [
        *("labels", "images", "train_step", "validation", "checkpoint", "memory", "disk")
    ]
    stages = [progress.stage for progress in worker.progress]
    assert "check" in stages[: stages.index("train")]
    assert all(progress.num_steps == 7 for progress in worker.progress if progress.stage == "check")
    percents = [progress.percent for progress in worker.progress]
    assert percents == sorted(percents)
    trained = [progress for progress in worker.progress if progress.stage == "train"]
    assert all(progress.memory_bytes > 100 << 20 for progress in trained)
    assert set(trained[-1].loader_shares) == {"read", "decode", "augment", "batch"}
    assert not list(shared.store.list("preflight"))


async def test_image_that_went_bad_on_the_machine_is_named_before_the_first_step(
    shared: Shared, bus: Bus
) -> None:
    async with shared.worker("filled", preflight=True, epochs=1) as worker:
        await worker.until(lambda worker: bool(worker.parts("preflight")))
    image = shared.folder / "data" / "bundles" / shared.manifest.sha256 / "val" / "00000003.jpg"
    content = image.read_bytes()
    try:
        image.write_bytes(content[:300] + b"\xff\xd9" * ((len(content) - 300) // 2))
        size = len(content)
        image.write_bytes(image.read_bytes().ljust(size, b"\xd9")[:size])
        async with shared.worker("bad-image", preflight=True) as worker:
            failure = await failure_of(worker)
    finally:
        image.write_bytes(content)
    assert failure.reason == "BAD_IMAGES"
    assert [violation.field for violation in failure.violations] == ["val/00000003.jpg"]
    assert kinds(worker) == ["failed"]


@pytest.mark.parametrize("preflight", [True, False])
async def test_memory_limit_ends_in_an_error_that_names_the_batch_size(
    shared: Shared, bus: Bus, preflight: bool
) -> None:
    async with shared.worker(
        f"memory-{preflight}",
        image_size=320,
        batchSize=16,
        preflight=preflight,
        variables={"DETFLOW_WORKER_MEMORY_BYTES": str(LIMIT_BYTES)},
    ) as worker:
        failure = await failure_of(worker)
    assert failure.reason == "OUT_OF_MEMORY"
    assert failure.metadata["field"] == "batch_size"
    assert "batch_size=16" in failure.message
    assert kinds(worker) == (["failed"] if preflight else ["started", "failed"])


async def test_smaller_steps_fit_into_the_same_memory(shared: Shared, bus: Bus) -> None:
    async with shared.worker(
        "memory-parts",
        image_size=320,
        batchSize=16,
        stepBatchSize=4,
        epochs=1,
        preflight=True,
        variables={"DETFLOW_WORKER_MEMORY_BYTES": str(LIMIT_BYTES)},
    ) as worker:
        assert await worker.exit_code() == 0, worker.errors()
    steps = [progress.num_steps for progress in worker.progress if progress.stage == "train"]
    assert set(steps) == {2}  # as many as with whole batches


async def test_limit_below_what_the_libraries_take_names_the_setting(
    shared: Shared, bus: Bus
) -> None:
    async with shared.worker(
        "memory-none", variables={"DETFLOW_WORKER_MEMORY_BYTES": str(400 << 20)}
    ) as worker:
        failure = await failure_of(worker)
    assert failure.reason == "BAD_SETTING" and "DETFLOW_WORKER_MEMORY_BYTES" in failure.message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ('torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")', "OUT_OF_MEMORY"),
        ('RuntimeError("CUDA error: device-side assert triggered")', "DEVICE_ASSERT"),
    ],
)
async def test_failure_of_a_gpu_in_the_middle_is_told_after_the_epochs_before(
    shared: Shared, bus: Bus, error: str, reason: str
) -> None:
    async with shared.worker(
        f"gpu-{reason}", on_start=_BREAK_SECOND_STEP.format(error=error)
    ) as worker:
        failure = await failure_of(worker)
    assert failure.reason == reason
    assert kinds(worker) == ["started", "failed"]
    assert "break_second" in "\n".join(
        line for record in worker.parts("log") for line in record.log.lines
    )


def small_disk(shared: Shared, megabytes: int, out: Path) -> tuple[ObjectStore, list[str]]:
    """Returns a store on a disk of its own, and what runs the worker so that it sees that disk."""
    small = out.parent / f"{out.name}-small"
    small.mkdir()
    isolated = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount a disk for a single process")
    script = ["sh", "-c", _ON_SMALL_DISK, "sh", f"{megabytes}m"]
    folders = [str(small), str(shared.folder / "store"), str(out)]
    return ObjectStore(f"file://{small}"), [*isolated, *script, *folders]


async def test_disk_that_runs_full_leaves_the_checkpoints_before(
    shared: Shared, bus: Bus, tmp_path: Path
) -> None:
    store, wrapper = small_disk(shared, 80, tmp_path / "out")
    async with shared.worker("full", store=store, wrapper=wrapper) as worker:
        failure = await failure_of(worker)
    assert failure.reason == "DISK_FULL"
    assert "MiB free at DETFLOW_STORE_URL" in failure.message and "resume" in failure.message
    checkpoints = [record.epoch.checkpoint for record in worker.parts("epoch")]
    assert len(checkpoints) == 1
    left = ObjectStore(f"file://{tmp_path / 'out'}")
    for checkpoint in checkpoints:
        left.get(checkpoint.object)
    stored = [path for path in (tmp_path / "out" / "trainings").rglob("*") if path.is_file()]
    assert [path.name for path in stored] == ["checkpoint-000001.pt"]


async def test_disk_too_small_for_the_training_is_found_before_it(
    shared: Shared, bus: Bus, tmp_path: Path
) -> None:
    store, wrapper = small_disk(shared, 130, tmp_path / "out")
    async with shared.worker("small", preflight=True, store=store, wrapper=wrapper) as worker:
        failure = await failure_of(worker)
    assert failure.reason == "DISK_FULL" and "3 checkpoints" in failure.message
    assert kinds(worker) == ["failed"]
    assert not list((tmp_path / "out").rglob("*.pt*"))  # the one that was tried is deleted


async def test_stopped_while_everything_is_tried_leaves_nothing_behind(
    shared: Shared, bus: Bus
) -> None:
    async with shared.worker("stopped", preflight=True) as worker:
        await worker.until(lambda worker: "check" in [one.stage for one in worker.progress])
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.exit_code(15) in (0, 4)
    assert not list(shared.store.list("preflight"))
