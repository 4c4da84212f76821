"""Every model of the catalogue with the real loop: train, checkpoint, resume, predict, reload.

Exports of every model are in test_worker_export.py.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.models import MODELS, Model
from services.trainer.worker.bundle import Bundle, fetch_bundle
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library
from tests.shapes_bundle import CLASS_NAMES, SIZE_PX, write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

BATCH_SIZE = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    return ObjectStore(f"file://{tmp_path_factory.mktemp('every-model')}")


@pytest.fixture(scope="module")
def bundle(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    manifest = write_bundle(store, {"train": BATCH_SIZE, "val": 1, "test": 0})
    folder = tmp_path_factory.mktemp("bundles")
    return fetch_bundle(store, manifest, folder, check=lambda: None)


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    """Networks are full of cycles: the next one needs the memory at once."""
    yield
    gc.collect()


def spec(model: Model, folder: Path) -> Spec:
    return Spec(
        training="projects/p/versions/v/trainings/t1",
        attempt=1,
        model=model.id,
        batch_size=BATCH_SIZE,
        step_batch_size=BATCH_SIZE,
        epochs=2,
        hyperparameters={
            "image_size": 128.0 if model.family == "efficientdet" else 64.0,
            # Without moments, which would double what is written.
            "optimizer": "SGD",
            "momentum": 0.0,
            "lr0": 0.001,
            "warmup_epochs": 0.0,
            "mosaic": 0.0,
        },
        manifest=StoredObject(),
        checkpoint=None,
        folder=folder,
    )


def train_epoch(trainer: Any, epoch: int) -> dict[str, float]:
    """Trains an epoch, which is one step, and measures."""
    trainer.start(epoch)
    try:
        values: dict[str, float] = trainer.train_epoch(epoch, lambda step: None)
    finally:
        trainer.close()
    return {**values, **trainer.measure(epoch, lambda: None)}


def save(trainer: Any, store: ObjectStore, key: str) -> Checkpoint:
    from services.trainer.worker.checkpoint import save_snapshot, snapshot_of

    stored = save_snapshot(store, key, snapshot_of(1, trainer.state(1)))
    return Checkpoint(epoch=1, object=stored)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_model_trains_resumes_predicts_and_loads_again(
    model: Model, bundle: Bundle, store: ObjectStore, tmp_path: Path
) -> None:
    import torch

    from services.trainer.worker import networks
    from services.trainer.worker.checkpoint import load_checkpoint
    from services.trainer.worker.loop import Trainer
    from services.trainer.worker.predict import predict

    trainer = Trainer(spec(model, tmp_path), bundle)
    before = next(trainer.network.parameters()).detach().clone()
    values = train_epoch(trainer, 1)
    names = {"box_loss", "cls_loss"} | ({"dfl_loss"} if model.family != "efficientdet" else set())
    losses = {name: value for name, value in values.items() if name.endswith("_loss")}
    assert losses.keys() == {f"{split}/{name}" for split in ("train", "val") for name in names}
    # One step in, on two images, the losses may be anything that is a number.
    assert all(0 <= value < float("inf") for value in losses.values()), losses
    trained = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    assert not torch.equal(next(trainer.network.parameters()), before)
    checkpoint = save(trainer, store, f"{model.id}.pt")
    del trainer, before
    gc.collect()

    trainer = Trainer(spec(model, tmp_path), bundle)
    trainer.restore(load_checkpoint(store, checkpoint, tmp_path))
    store.delete(checkpoint.object.key)
    assert all(
        torch.equal(value, trained[name]) for name, value in trainer.network.state_dict().items()
    )
    del trained
    assert trainer.best_epoch == 1
    train_epoch(trainer, 2)
    weights = trainer.weights()
    images = trainer.evaluation_set(bundle.splits["val"])
    table = pq.read_table(
        io.BytesIO(predict(trainer.best_network(), images, trainer.device, lambda: None))
    )
    for row in table.to_pylist():
        assert 0 <= row["class_id"] < len(CLASS_NAMES) and 0.001 <= row["confidence"] <= 1
        assert 0 <= row["x1"] <= row["x2"] <= SIZE_PX[0]
        assert 0 <= row["y1"] <= row["y2"] <= SIZE_PX[1]

    network = networks.build(
        weights["model"],
        num_classes=len(weights["class_names"]),
        image_size=weights["image_size"],
        hyperparameters={},
    )
    network.load_state_dict(weights["state_dict"], strict=True, assign=True)
