"""What is tried before the first step: what it finds, and that it leaves no trace."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detflow.errors import DetflowError, FailedPrecondition, ResourceExhausted
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import Preflight
from detflow.v1.worker_pb2 import JobMessage, WorkerSpec
from services.trainer.worker.bundle import Bundle, Image, fetch_bundle
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library
from tests.shapes_bundle import write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

COUNTS = {"train": 9, "val": 4, "test": 2}


@dataclasses.dataclass(frozen=True)
class Shared:
    """A bundle in a store."""

    folder: Path
    store: ObjectStore
    manifest: StoredObject
    bundle: Bundle

    @property
    def settings(self) -> Settings:
        return Settings(store_url=self.store.url, data_dir=self.folder / "data")

    def spec(self, folder: Path, **more: Any) -> Spec:
        fields: dict[str, Any] = {
            "training": "projects/p/versions/v/trainings/t1",
            "attempt": 1,
            "model": "yolov8n",
            "batch_size": 4,
            "step_batch_size": 4,
            "epochs": 2,
            "hyperparameters": {"image_size": 64, "warmup_epochs": 1, "lr0": 0.01},
            "manifest": self.manifest,
            "checkpoint": None,
            "folder": folder,
        }
        return Spec(**(fields | more))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("preflight")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, COUNTS)
    bundle = fetch_bundle(store, manifest, folder / "data" / "bundles", check=lambda: None)
    return Shared(folder, store, manifest, bundle)


@pytest.fixture
def own(shared: Shared, tmp_path: Path) -> Shared:
    """The bundle in a folder of the test's own, to be damaged."""
    folder = tmp_path / "bundle"
    shutil.copytree(next(iter(shared.bundle.splits["train"])).path.parent.parent, folder)
    splits = {
        split: tuple(
            dataclasses.replace(image, path=folder / split / image.path.name) for image in images
        )
        for split, images in shared.bundle.splits.items()
    }
    return dataclasses.replace(
        shared, bundle=Bundle(class_names=shared.bundle.class_names, splits=splits)
    )


def try_out(
    shared: Shared, spec: Spec, on_check: Callable[[str, int], None] = lambda name, done: None
) -> Preflight:
    from services.trainer.worker import preflight
    from services.trainer.worker.loop import Trainer

    trainer = Trainer(spec, shared.bundle)
    return preflight.try_out(trainer, shared.bundle, spec, shared.store, shared.settings, on_check)


def refused(shared: Shared, spec: Spec) -> DetflowError:
    with pytest.raises(DetflowError) as caught:
        try_out(shared, spec)
    return caught.value


def with_image(shared: Shared, split: str, number: int, **changed: Any) -> Shared:
    """Returns the bundle with one image's labels changed."""
    images = list(shared.bundle.splits[split])
    images[number] = dataclasses.replace(images[number], **changed)
    splits = {**shared.bundle.splits, split: tuple(images)}
    bundle = Bundle(class_names=shared.bundle.class_names, splits=splits)
    return dataclasses.replace(shared, bundle=bundle)


def test_everything_is_tried_in_order_and_nothing_is_left_in_the_store(
    shared: Shared, tmp_path: Path
) -> None:
    before = sorted(shared.store.list(""))
    told: list[tuple[str, int]] = []
    found = try_out(shared, shared.spec(tmp_path), lambda name, done: told.append((name, done)))
    names = ["labels", "images", "train_step", "validation", "checkpoint", "memory", "disk"]
    assert told == [(name, number) for number, name in enumerate(names)]
    assert [check.name for check in found.checks] == names
    assert all(check.detail and check.seconds >= 0 for check in found.checks)
    assert found.device == "cpu"
    assert 0 < found.step_seconds < 60
    assert found.total_seconds > 2 * 2 * found.step_seconds  # 2 epochs of 2 steps, and more
    assert found.memory_bytes > 100 << 20
    assert found.disk_bytes > 3 << 20
    assert "of all 15 images" in found.checks[1].detail and "15 of them" in found.checks[1].detail
    assert sorted(shared.store.list("")) == before


def trained(shared: Shared, spec: Spec, *, preflight: bool) -> Mapping[str, Any]:
    """Trains to the end in this process; returns the last state."""
    from services.trainer.worker import preflight as checks
    from services.trainer.worker.loop import Trainer

    random.seed(5)
    np.random.seed(5)
    trainer = Trainer(spec, shared.bundle)
    if preflight:
        checks.try_out(
            trainer, shared.bundle, spec, shared.store, shared.settings, lambda name, done: None
        )
    trainer.start(1)
    try:
        for epoch in (1, 2):
            trainer.train_epoch(epoch, lambda step: None)
            trainer.measure(epoch, lambda: None)
        return trainer.state(2)
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("model", "image_size", "optimizer"),
    [("yolov8n", 64, "AdamW"), ("yolov8n", 64, "SGD"), ("efficientdet-d0", 128, "AdamW")],
)
def test_training_ends_with_the_same_bits_with_and_without(
    shared: Shared, tmp_path: Path, model: str, image_size: int, optimizer: str
) -> None:
    values = {"image_size": image_size, "warmup_epochs": 1, "optimizer": optimizer, "lr0": 0.01}
    values |= {"box": 7.5, "cls": 0.5}
    spec = shared.spec(tmp_path, model=model, hyperparameters=values)
    plain = flat(trained(shared, spec, preflight=False))
    tried = flat(trained(shared, spec, preflight=True))
    assert plain.keys() == tried.keys()
    assert [name for name, value in plain.items() if not np.array_equal(value, tried[name])] == []


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every tensor and number of a state by its path."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value)).items()
    else:
        return {prefix: np.asarray(value)}
    return {
        path: leaf for key, item in items for path, leaf in flat(item, f"{prefix}/{key}").items()
    }


@pytest.mark.parametrize(
    ("box", "label", "problem"),
    [
        ([float("nan"), 0, 10, 10], 0, "not finite"),
        ([5, 5, 0, 10], 0, "no area"),
        ([5, 5, 10, -2], 0, "no area"),
        ([150, 5, 40, 10], 0, "not inside the image of 160x120 px"),
        ([5, 5, 10, 10], 3, "none of the 3"),
    ],
)
def test_unusable_box_is_named_with_its_file(
    shared: Shared, tmp_path: Path, box: list[float], label: int, problem: str
) -> None:
    boxes = np.array([[1, 1, 5, 5], box], dtype=np.float64)
    bad = with_image(shared, "val", 2, boxes=boxes, classes=np.array([0, label]))
    error = refused(bad, shared.spec(tmp_path))
    assert (type(error), error.reason) == (FailedPrecondition, "BAD_LABELS")
    (violation,) = error.violations
    assert violation.field == "val/00000003.jpg, box 2"
    assert problem in violation.description and "create the version again" in error.message


def test_more_bad_boxes_than_are_told_are_counted(shared: Shared, tmp_path: Path) -> None:
    bad = with_image(shared, "train", 0, boxes=np.zeros((150, 4)), classes=np.zeros(150, int))
    error = refused(bad, shared.spec(tmp_path))
    assert (len(error.violations), error.total) == (100, 150)


def cut_off(image: Image) -> None:
    image.path.write_bytes(image.path.read_bytes()[:-200])


def replace_by_text(image: Image) -> None:
    image.path.write_bytes(b"no image")


def remove(image: Image) -> None:
    image.path.unlink()


def overwrite_middle(image: Image) -> None:
    content = bytearray(image.path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"\xff\xd9" * 32
    image.path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_off, replace_by_text, remove, overwrite_middle])
def test_damaged_image_of_any_split_is_named(
    own: Shared, tmp_path: Path, damage: Callable[[Image], None]
) -> None:
    damage(own.bundle.splits["test"][1])
    error = refused(own, own.spec(tmp_path))
    assert (type(error), error.reason) == (FailedPrecondition, "BAD_IMAGES")
    assert [violation.field for violation in error.violations] == ["test/00000002.jpg"]


def test_image_of_another_size_than_its_labels_say_is_named(own: Shared, tmp_path: Path) -> None:
    bad = with_image(own, "train", 4, width=161)
    error = refused(bad, own.spec(tmp_path))
    assert "train/00000005.jpg" in error.message and "160x120" in error.message


def test_learning_rate_without_a_chance_is_found_before_the_first_step(
    shared: Shared, tmp_path: Path
) -> None:
    values = {"image_size": 64, "warmup_epochs": 0, "optimizer": "SGD", "lr0": 1e30}
    error = refused(shared, shared.spec(tmp_path, hyperparameters=values))
    assert error.reason == "LOSS_NOT_FINITE" and "lr0" in error.message


def test_memory_that_does_not_suffice_names_the_batch_size(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import memory

    free = iter([1 << 30, 0])  # as if another program had taken it in the meantime
    monkeypatch.setattr(memory, "free_bytes", lambda: next(free, 0))
    error = refused(shared, shared.spec(tmp_path))
    assert (type(error), error.reason) == (ResourceExhausted, "OUT_OF_MEMORY")
    assert "batch_size=4" in error.message


def test_disk_too_small_for_the_checkpoints_names_the_setting(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20 << 20))
    error = refused(shared, shared.spec(tmp_path))
    assert (type(error), error.reason) == (FailedPrecondition, "DISK_FULL")
    assert "3 checkpoints" in error.message and "20 MiB free at DETFLOW_STORE_URL" in error.message


def test_object_store_that_cannot_be_written_is_found(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ObjectStore, key: str, data: bytes | Path) -> StoredObject:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ObjectStore, "put", refuse)
    with pytest.raises(PermissionError):
        try_out(shared, shared.spec(tmp_path))


def message(shared: Shared, **more: Any) -> WorkerSpec:
    """What a job is told of a training that there is not."""
    spec = WorkerSpec(model="yolov8n", batch_size=4, epochs=2, manifest=shared.manifest, **more)
    spec.hyperparameters.update({"image_size": 64})
    return spec


def test_job_tells_its_progress_and_then_what_it_found(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import preflight

    monkeypatch.chdir(tmp_path)
    said: list[JobMessage] = []
    preflight.run(message(shared), shared.settings, said.append)
    assert [one.WhichOneof("what") for one in said] == ["progress"] * 7 + ["preflight"]
    assert [one.progress.stage for one in said[:7]] == list(preflight.CHECKS)
    assert [one.progress.num_done for one in said[:7]] == list(range(7))
    assert said[-1].preflight.step_seconds > 0


def test_job_without_memory_names_the_batch_size(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import preflight
    from services.trainer.worker.loop import Trainer

    def run_out(self: Trainer, *arguments: Any, **more: Any) -> None:
        raise MemoryError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "step", run_out)
    with pytest.raises(ResourceExhausted, match="batch_size=4"):
        preflight.run(message(shared), shared.settings, lambda said: None)


def stored_weights(shared: Shared, model: str) -> StoredObject:
    """Stores the weights of a new network."""
    import safetensors.torch

    from services.trainer.worker import networks

    made = networks.build(model, num_classes=3, image_size=64, hyperparameters={})
    return shared.store.put(f"weights/{model}", safetensors.torch.save(made.state_dict()))


def test_job_takes_over_the_weights_to_begin_with(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import preflight

    monkeypatch.chdir(tmp_path)
    said: list[JobMessage] = []
    spec = message(shared, warm_start_weights=stored_weights(shared, "yolov8n"))
    preflight.run(spec, shared.settings, said.append)
    first, *others = said[-1].preflight.checks
    assert first.name == "weights" and "355 of 355 tensors fit" in first.detail
    assert [check.name for check in others] == list(preflight.CHECKS)


@pytest.mark.parametrize("problem", ["WEIGHTS_DO_NOT_FIT", "UNSAFE_WEIGHTS", "OBJECT_LOST"])
def test_job_finds_that_a_training_cannot_begin_with_its_weights(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    from services.trainer.worker import preflight

    monkeypatch.chdir(tmp_path)
    if problem == "WEIGHTS_DO_NOT_FIT":
        weights = stored_weights(shared, "yolov8s")
    else:
        weights = shared.store.put("weights/text", b"no weights")
    if problem == "OBJECT_LOST":
        shared.store.delete(weights.key)
    with pytest.raises(DetflowError) as caught:
        preflight.run(message(shared, warm_start_weights=weights), shared.settings, lambda _: None)
    assert caught.value.reason == problem
