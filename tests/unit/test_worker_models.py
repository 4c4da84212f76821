"""The training loop and its networks, without the process around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detflow.errors import FailedPrecondition, InvalidArgument
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.trainer.worker.bundle import Bundle, Image, fetch_bundle
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library
from tests.shapes_bundle import write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

IMAGE_SIZE = 64


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("models")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": 4, "val": 2, "test": 0})
    return fetch_bundle(store, manifest, folder / "bundles", check=lambda: None)


def spec(folder: Path, model: str = "yolov8n", **hyperparameters: float | bool | str) -> Spec:
    return Spec(
        training="projects/p/versions/v/trainings/t1",
        attempt=1,
        model=model,
        batch_size=4,
        step_batch_size=4,
        epochs=3,
        hyperparameters={
            "image_size": IMAGE_SIZE,
            "warmup_epochs": 0,
            "mosaic": 0,
            **hyperparameters,
        },
        manifest=StoredObject(),
        checkpoint=None,
        folder=folder,
    )


@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize("family", ["yolov5", "yolov8"])
def test_every_model_computes_finite_losses(
    family: str, scale: str, bundle: Bundle, tmp_path: Path
) -> None:
    from services.trainer.worker.evaluation import forward
    from services.trainer.worker.loop import Trainer

    trainer = Trainer(spec(tmp_path, family + scale), bundle)
    (batch,) = trainer.evaluation_set(bundle.splits["val"])
    predictions, raw = forward(trainer.ema.network, batch, trainer.device)
    height, width = batch.pixels.shape[2:]
    anchors = sum(height * width // stride**2 for stride in (8, 16, 32))
    assert predictions.shape == (2, 4 + len(bundle.class_names), anchors)
    losses = trainer.ema.network.loss(batch.targets(), raw)[1]
    assert set(losses) == {"box_loss", "cls_loss", "dfl_loss"}
    assert all(np.isfinite(float(value)) for value in losses.values())


def test_diverged_training_is_refused_with_the_remedy(bundle: Bundle, tmp_path: Path) -> None:
    import torch

    from services.trainer.worker.loop import Trainer

    trainer = Trainer(spec(tmp_path, lr0=0.5), bundle)
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(float("nan"))
    trainer.start(1)
    try:
        with pytest.raises(FailedPrecondition, match="lower lr0") as caught:
            trainer.train_epoch(1, lambda step: None)
    finally:
        trainer.close()
    assert caught.value.reason == "LOSS_NOT_FINITE"


def test_unknown_hyperparameter_is_named(bundle: Bundle, tmp_path: Path) -> None:
    from services.trainer.worker.loop import Trainer

    with pytest.raises(InvalidArgument, match="'learning_rate'"):
        Trainer(spec(tmp_path, learning_rate=0.1), bundle)


def test_perfect_detections_score_one_and_a_wrong_class_scores_less() -> None:
    from services.trainer.worker.evaluation import Detections, Score

    boxes = np.array([[10, 10, 20, 20], [50, 40, 20, 10]], dtype=np.float64)
    image = Image(1, Path("x.jpg"), 100, 80, np.array([0, 1]), boxes)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    confidences = np.array([0.9, 0.8], dtype=np.float32)
    for classes, low, high in ((np.array([0, 1]), 0.99, 1.0), (np.array([0, 0]), 0.3, 0.6)):
        score = Score()
        score.add(image, Detections(corners.astype(np.float32), confidences, classes))
        assert low <= score.values()["val/map50_95"] <= high
