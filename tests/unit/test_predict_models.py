"""How many models a predicting process keeps, and what it does with numbers of a network."""

from pathlib import Path

import numpy as np
import pytest

from services.metrics.prediction import __main__ as process
from services.metrics.prediction.suppression import Found, suppress
from tests.prediction_rig import probe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(probe())
    return path


def test_model_used_least_recently_makes_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = iter(range(0, 10**12, 100_000_000))  # each model takes 100 MB
    monkeypatch.setattr(process, "_memory_bytes", lambda: next(memory))
    models = process.Models(250_000_000, 1)
    for name in "ab":
        models.load(name, model)
    assert models.get("a") is not None
    models.load("c", model)
    assert models.get("b") is None
    assert models.get("a") is not None and models.get("c") is not None
    alone = process.Models(1, 1)  # one there must be
    alone.load("a", model)
    assert alone.get("a") is not None


def rounded(found: Found) -> list[float]:
    return [round(one, 2) for one in found.confidences.tolist()]


def test_each_class_is_suppressed_alone_and_limits_include_themselves() -> None:
    boxes = [(50, 50, 20, 20), (52, 50, 20, 20), (90, 50, 20, 20), (50, 50, 0, 0)]
    scores = [(0.9, 0.8, 0.25, 0.3), (0.1, 0.7, 0.0, 0.2)]
    predictions = np.concatenate((np.array(boxes).T, scores)).astype(np.float32)
    overlap = (18 * 20) / (2 * 400 - 18 * 20)
    found = suppress(predictions, threshold=0.25, nms_iou=0.7, max_detections=10)
    kept = list(zip(found.classes.tolist(), rounded(found), strict=True))
    assert kept == [(0, 0.9), (1, 0.7), (0, 0.3), (0, 0.25)]
    assert found.boxes[0].tolist() == [40, 40, 60, 60]
    loose = suppress(predictions, threshold=0.5, nms_iou=overlap + 1e-6, max_detections=10)
    assert rounded(loose) == [0.9, 0.8, 0.7]
    one = suppress(predictions, threshold=0.25, nms_iou=0.7, max_detections=1)
    assert rounded(one) == [0.9]
    none = suppress(predictions, threshold=1.0, nms_iou=0.7, max_detections=10)
    assert none.boxes.shape == (0, 4)
