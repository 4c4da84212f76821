"""The training worker as a process of its own, against a real NATS and a store in a folder."""

from __future__ import annotations

import asyncio
import io
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet as pq
import pytest
from google.protobuf import json_format

from detflow.errors import from_status
from detflow.events import Bus
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import StopMode
from detflow.v1.worker_pb2 import Checkpoint, LeaseResponse
from tests.shapes_bundle import CLASS_NAMES, SIZE_PX, spec_json, write_bundle
from tests.worker_rig import Worker, running_worker

COUNTS = {"train": 21, "val": 8, "test": 3}
TINY = {"image_size": 64, "warmup_epochs": 0, "close_mosaic": 1, "nominal_batch_size": 10}


@dataclass(frozen=True)
class Shared:
    """A bundle and one finished training on it: made once, it takes a while."""

    folder: Path
    store: ObjectStore
    manifest: StoredObject
    done: Worker
    exit_code: int


def spec(manifest: StoredObject, *, epochs: int = 2, **more: Any) -> str:
    return spec_json(manifest, epochs=epochs, hyperparameters=TINY, batchSize=10, **more)


def attempt_after(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"attempt": 2, "checkpoint": json_format.MessageToDict(checkpoint)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("worker")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, COUNTS)

    async def train() -> tuple[Worker, int]:
        bus = await Bus.connect(nats_url, "test")
        await bus.ensure_streams()
        await bus.close()
        async with running_worker(
            spec(manifest), folder / "done", nats_url=nats_url, store=store
        ) as worker:
            exit_code = await worker.exit_code()
        return worker, exit_code

    done, exit_code = asyncio.run(train())
    assert exit_code == 0, done.errors()
    yield Shared(folder, store, manifest, done, exit_code)


def last_state(shared: Shared, worker: Worker) -> dict[str, Any]:
    """Reads what a training ended with: values and, for tensors, their bytes, by place."""
    import torch

    def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, torch.Tensor):
            yield where, (value.dtype, value.shape, value.contiguous().numpy().tobytes())
        elif isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in pairs:
                yield from flat(item, f"{where}/{key}")
        else:
            yield where, value

    stored = worker.parts("epoch")[-1].epoch.checkpoint.object
    return dict(flat(torch.load(io.BytesIO(shared.store.get(stored)), weights_only=True)))


def failure_of(worker: Worker) -> Exception:
    (record,) = worker.parts("failed")
    return from_status(record.failed.failure.status)


def test_records_are_numbered_without_holes_in_the_order_of_the_training(shared: Shared) -> None:
    records = shared.done.records
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert shared.done.message_ids == [f"t1/1/{record.seq}" for record in records]
    assert {(record.training, record.attempt) for record in records} == {
        ("projects/p/versions/v/trainings/t1", 1)
    }
    kinds = [record.WhichOneof("what") for record in records]
    assert [kind for kind in kinds if kind not in ("log", "steps")] == [
        "started",
        "epoch",
        "epoch",
        "evaluating",
        "finished",
    ]
    assert records[kinds.index("started")].started.first_epoch == 1
    assert records[kinds.index("started")].started.device == "cpu"


def test_epochs_carry_every_promised_value_and_a_stored_checkpoint(shared: Shared) -> None:
    for number, record in enumerate(shared.done.parts("epoch"), start=1):
        metrics, checkpoint = record.epoch.metrics, record.epoch.checkpoint
        losses = {f"{s}/{n}_loss" for s in ("train", "val") for n in ("box", "cls", "dfl")}
        scores = {f"val/{name}" for name in ("map50", "map50_95", "precision", "recall")}
        assert set(metrics.values) == losses | scores | {
            "lr",
            "data_wait_share",
            "images_per_second",
            "memory_bytes",
            "epoch_seconds",
        }
        assert all(metrics.values[name] > 0 for name in losses)
        assert metrics.epoch == checkpoint.epoch == number
        assert metrics.HasField("measure_time")
        assert checkpoint.object.key == f"trainings/t1/1/checkpoint-{number:06d}.pt"
        shared.store.get(checkpoint.object)


def test_every_step_carries_what_it_measured_itself(shared: Shared) -> None:
    losses = {f"train/{name}_loss" for name in ("box", "cls", "dfl")}
    columns: dict[str, list[float]] = {}
    epochs: list[dict[str, list[float]]] = []
    for record in shared.done.records:
        if record.HasField("steps"):  # more than one an epoch where steps take seconds
            block = record.steps
            num_steps = len(columns.get("lr", ()))
            place = (block.attempt, block.epoch, block.first_step, block.num_steps)
            assert place == (1, len(epochs) + 1, num_steps + 1, 2)
            for column in block.columns:
                columns.setdefault(column.name, []).extend(column.values)
        elif record.HasField("epoch"):
            epoch = record.epoch.metrics.values
            rates = {"lr", "images_per_second", "data_wait_share", "memory_bytes"}
            assert columns.keys() == losses | rates
            assert {len(values) for values in columns.values()} == {2}
            for name in losses:
                assert columns[name][0] != columns[name][1]
                assert sum(columns[name]) / 2 == pytest.approx(epoch[name])
            assert max(columns["memory_bytes"]) == epoch["memory_bytes"] > 100 << 20
            assert columns["lr"][-1] == epoch["lr"]
            assert all(0 <= share <= 1 for share in columns["data_wait_share"])
            assert all(rate > 0 for rate in columns["images_per_second"])
            epochs.append(columns)
            columns = {}
    assert len(epochs) == 2


def test_predictions_cover_both_splits_in_pixels_of_the_bundle(shared: Shared) -> None:
    (finished,) = shared.done.parts("finished")
    predictions = finished.finished.predictions
    assert predictions.manifest == shared.manifest
    for split, stored in (("val", predictions.val), ("test", predictions.test)):
        assert stored.key == f"trainings/t1/1/predictions-{split}.parquet"
        table = pq.read_table(io.BytesIO(shared.store.get(stored)))
        assert [f"{field.name} {field.type}" for field in table.schema] == [
            "image_id int32",
            "class_id int32",
            *(f"{name} float" for name in ("confidence", "x1", "y1", "x2", "y2")),
        ]
        rows = table.to_pylist()
        assert rows, "an untrained model finds something in every image at this threshold"
        assert rows == sorted(rows, key=lambda row: (row["image_id"], -row["confidence"]))
        assert {row["image_id"] for row in rows} <= set(range(1, COUNTS[split] + 1))
        width, height = SIZE_PX
        for row in rows:
            assert row["confidence"] >= 0.001
            assert 0 <= row["class_id"] < len(CLASS_NAMES)
            assert 0 <= row["x1"] <= row["x2"] <= width and 0 <= row["y1"] <= row["y2"] <= height


def test_weights_load_without_running_code_and_fit_their_model(shared: Shared) -> None:
    import torch

    (record,) = shared.done.parts("evaluating")
    content = shared.store.get(record.evaluating.weights)
    weights = torch.load(io.BytesIO(content), weights_only=True)
    assert weights["format"] == "detflow-weights/1"
    assert (weights["model"], weights["image_size"]) == ("yolov8n", 64)
    assert weights["class_names"] == list(CLASS_NAMES)
    assert all(
        value.dtype in (torch.float32, torch.int64) for value in weights["state_dict"].values()
    )


def test_progress_rises_to_a_hundred_percent_and_says_how_long(shared: Shared) -> None:
    percents = [progress.percent for progress in shared.done.progress]
    assert percents == sorted(percents)
    assert 0 <= percents[0] and 99 < percents[-1] <= 100
    steps = [progress for progress in shared.done.progress if progress.stage == "train"]
    assert steps
    for progress in steps:
        assert progress.num_epochs == 2 and 1 <= progress.epoch <= 2
        assert progress.num_steps == 2 and 1 <= progress.step <= 2
        assert set(progress.losses) == {"box_loss", "cls_loss", "dfl_loss"}
        assert progress.eta_seconds >= 0 and progress.elapsed_seconds > 0
        assert progress.device == "cpu" and 0 <= progress.data_wait_share <= 1
    assert shared.done.leases and all(lease.attempt == 1 for lease in shared.done.leases)


def test_worker_connects_to_no_other_machine(shared: Shared) -> None:
    assert shared.done.connections() == ""


async def test_training_killed_anywhere_ends_with_the_same_bits(
    shared: Shared, bus: Bus, nats_url: str
) -> None:
    # Killed after its so-many-th sign of life, of those before the predictions.
    num_signs = random.randint(1, len(shared.done.records) + len(shared.done.progress) - 10)
    print(f"killed after sign of life {num_signs}")
    async with running_worker(
        spec(shared.manifest, attempt=11),
        shared.folder / "killed",
        nats_url=nats_url,
        store=shared.store,
    ) as killed:
        await killed.until(lambda worker: len(worker.records) + len(worker.progress) >= num_signs)
        killed.process.send_signal(signal.SIGKILL)
        assert await killed.exit_code() == -signal.SIGKILL
    last = [record.epoch.checkpoint for record in killed.parts("epoch")][-1:]
    more = attempt_after(last[0]) if last else {}
    async with running_worker(
        spec(shared.manifest, **more | {"attempt": 12}),
        shared.folder / "resumed",
        nats_url=nats_url,
        store=shared.store,
    ) as resumed:
        assert await resumed.exit_code() == 0, resumed.errors()
    first = last[0].epoch + 1 if last else 1
    assert [record.started.first_epoch for record in resumed.parts("started")] == [first]
    epochs = [record.epoch.metrics.epoch for record in resumed.parts("epoch")]
    assert epochs == [*range(first, 3)]
    percents = [progress.percent for progress in resumed.progress]
    assert percents == sorted(percents) and percents[-1] <= 100
    assert percents[0] >= 97 * (first - 1) / 2
    state, expected = (last_state(shared, worker) for worker in (resumed, shared.done))
    assert state == expected


async def test_checkpoint_with_a_flipped_byte_is_refused(
    shared: Shared, bus: Bus, nats_url: str
) -> None:
    checkpoint = Checkpoint()
    checkpoint.CopyFrom(shared.done.parts("epoch")[0].epoch.checkpoint)
    content = bytearray(shared.store.get(checkpoint.object))
    content[len(content) // 2] ^= 1
    checkpoint.object.key = "trainings/t1/1/flipped.pt"
    shared.store.put(checkpoint.object.key, bytes(content))
    async with running_worker(
        spec(shared.manifest, **attempt_after(checkpoint)),
        shared.folder / "flipped",
        nats_url=nats_url,
        store=shared.store,
    ) as worker:
        assert await worker.exit_code() == 1
    failure = failure_of(worker)
    assert getattr(failure, "code", None) == grpc.StatusCode.DATA_LOSS
    assert "flipped.pt" in str(failure)
    assert not worker.parts("started")


async def test_fenced_worker_exits_and_writes_nothing_more(
    shared: Shared, bus: Bus, nats_url: str
) -> None:
    async with running_worker(
        spec(shared.manifest, epochs=500),
        shared.folder / "fenced",
        nats_url=nats_url,
        store=shared.store,
    ) as worker:
        await worker.until(lambda worker: bool(worker.parts("started")))
        worker.reply = LeaseResponse(fenced=True)
        assert await worker.exit_code(20) == 3
    assert not worker.parts("failed") and not worker.parts("evaluating")


@pytest.mark.parametrize("way", ["SIGTERM", "PAUSE"])
async def test_stopped_worker_exits_within_seconds_and_claims_no_failure(
    shared: Shared, bus: Bus, nats_url: str, way: str
) -> None:
    async with running_worker(
        spec(shared.manifest, epochs=500),
        shared.folder / f"stopped-{way}",
        nats_url=nats_url,
        store=shared.store,
    ) as worker:
        await worker.until(lambda worker: bool(worker.parts("started")))
        if way == "SIGTERM":
            worker.process.terminate()
        else:
            worker.reply = LeaseResponse(stop_mode=StopMode.STOP_MODE_PAUSE)
        assert await worker.exit_code(15) == 4
    assert not worker.parts("failed") and not worker.parts("evaluating")


async def test_finish_stops_after_the_epoch_and_evaluates(
    shared: Shared, bus: Bus, nats_url: str
) -> None:
    async with running_worker(
        spec(shared.manifest, epochs=500),
        shared.folder / "finish",
        nats_url=nats_url,
        store=shared.store,
        reply=LeaseResponse(stop_mode=StopMode.STOP_MODE_FINISH),
    ) as worker:
        assert await worker.exit_code() == 0, worker.errors()
    assert 1 <= len(worker.parts("epoch")) < 500
    assert worker.parts("evaluating") and worker.parts("finished")


async def test_version_without_validation_images_fails_with_the_remedy(
    shared: Shared, bus: Bus, nats_url: str
) -> None:
    manifest = write_bundle(shared.store, {"train": 4, "val": 0, "test": 1}, seed=1)
    async with running_worker(
        spec(manifest), shared.folder / "empty", nats_url=nats_url, store=shared.store
    ) as worker:
        assert await worker.exit_code() == 1
    failure = failure_of(worker)
    assert getattr(failure, "code", None) == grpc.StatusCode.FAILED_PRECONDITION
    assert "larger share" in str(failure)
