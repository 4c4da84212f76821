"""ONNX Runtime finds in a user's image what the evaluation of the training finds with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from detflow import images
from detflow.resize import Resize
from detflow.store import ObjectStore
from services.metrics.prediction.onnx_model import OnnxModel
from services.metrics.prediction.predict import predict
from services.metrics.prediction.task import Task
from services.preprocess import domain as preprocess
from services.preprocess.bundle import Transform, make_copies
from services.trainer.worker.bundle import Image
from tests import shapes_bundle
from tests.export_player import lively
from tests.quiet_library import quiet_library

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

SIZE = 128
SIZES = [(160, 120), (97, 211), (333, 50), (128, 128), (40, 31), (501, 499)]
RECIPES = {
    "as they are": (Resize(), False),
    "gray, at most 90 px": (Resize(max_side_px=90), True),
    "with a border": (Resize(exact_size=(96, 64)), False),
    "stretched": (Resize(exact_size=(96, 64), stretch=True), False),
}
Rows = NDArray[np.float64]
"""Class, confidence, x1, y1, x2, y2 of each detection, shape (n, 6)."""


def jpegs() -> list[bytes]:
    rng = np.random.default_rng(5)
    pictures = [cv2.resize(shapes_bundle.draw(rng)[0], size) for size in SIZES]
    return [images.encode_jpeg(np.asarray(picture, np.uint8)) for picture in pictures]


def worker_finds(network: Any, data: bytes, recipe: tuple[Resize, bool], folder: Path) -> Rows:
    """What the worker finds in what the recipe makes of an image; boxes in pixels of the image."""
    import torch

    from services.trainer.worker.evaluation import EvaluationSet, forward, select

    header = images.header_of(data)
    width, height = header.upright_size
    resize, grayscale = recipe
    source = preprocess.Image("a.jpg", "", width, height, "", 0, len(data), (), ())
    transform = Transform(resize=resize, grayscale=grayscale)
    (picture,) = make_copies(source, data, header, transform)
    placement = resize.place(width, height)
    path = folder / "picture.png"  # so that what JPEG changes does not count
    cv2.imwrite(str(path), picture)
    none = np.zeros(0, np.int64), np.zeros((0, 4))
    image = Image(1, path, picture.shape[1], picture.shape[0], *none)
    (batch,) = EvaluationSet([image], image_size=SIZE, batch_size=1, stride=network.stride)
    with torch.no_grad():
        (found,) = select(forward(network, batch, torch.device("cpu"))[0], batch)
    shift = np.tile((placement.left, placement.top), 2)
    scale = np.tile((width / placement.width, height / placement.height), 2)
    boxes = ((found.boxes - shift) * scale).clip(0, np.tile((width, height), 2))
    return np.column_stack((found.classes, found.confidences, boxes))


def service_finds(model: OnnxModel, data: bytes, recipe: tuple[Resize, bool]) -> Rows:
    task = Task(model_sha256="", resize=recipe[0], grayscale=recipe[1], confidence_threshold=0.001)
    return np.array(
        [
            (one.class_id, one.confidence, one.box.x1, one.box.y1, one.box.x2, one.box.y2)
            for one in predict(model, task, data).detections
        ]
    )


def differences(ours: Rows, theirs: Rows) -> NDArray[np.float64]:
    """How far each detection is from the other side's nearest: pixels and confidence, (n, 2)."""
    apart = np.abs(ours[:, None] - theirs[None])
    apart[..., 0] *= 1e9  # of another class it is another thing
    nearest = (apart[..., 2:].max(axis=2) + 100 * apart[..., 1] + apart[..., 0]).argmin(axis=1)
    best = apart[np.arange(len(ours)), nearest]
    return np.column_stack((best[:, 2:].max(axis=1) + best[:, 0], best[:, 1]))


@pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "efficientdet-d0"])
def test_every_family_finds_the_same_with_onnx_as_with_torch(name: str, tmp_path: Path) -> None:
    from services.trainer.worker.export import onnx_file
    from services.trainer.worker.export.weights import load_weights

    samples = np.random.default_rng(3).random((2, 3, SIZE, SIZE), np.float32)
    store = ObjectStore(f"file://{tmp_path}/store")
    network, stored = lively(name, SIZE, samples, store, spread=1.5)
    weights = load_weights(store, stored, tmp_path)
    path = tmp_path / "model.onnx"
    about = weights.describe(training="t", image_size=SIZE, precision="FP32")
    onnx_file.write(weights.build(), onnx_file.Options(image_size=SIZE, dynamic=True), about, path)
    model = OnnxModel(path, num_threads=1)
    num_found, num_alone, worst = 0, 0, np.zeros(2)
    for data in jpegs():
        for recipe in RECIPES.values():
            ours = service_finds(model, data, recipe)
            theirs = worker_finds(network, data, recipe, tmp_path)
            assert len(ours) > 5
            num_found += len(ours)
            num_alone += abs(len(ours) - len(theirs))
            apart = differences(ours, theirs)
            same = (apart[:, 0] < 1.0) & (apart[:, 1] < 0.01)
            num_alone += int((~same).sum())  # only one of the two keeps them
            worst = np.maximum(worst, apart[same].max(axis=0))

    assert worst[0] < 0.01 and worst[1] < 1e-4
    # Two boxes that overlap by the limit to the last digit may go either way.
    assert num_alone <= num_found / 1000
