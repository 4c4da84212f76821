"""From raw predictions to detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.trainer.worker.bundle import Image
from tests.quiet_library import quiet_library

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

NUM_CLASSES = 3


def batch_of(size: int) -> Any:
    import torch

    from services.trainer.worker.evaluation import Batch

    image = Image(1, Path("x.jpg"), size, size, np.zeros(0, np.int64), np.zeros((0, 4)))
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    return Batch((image,), pixels, np.ones(1), np.zeros((1, 2)))


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0], ids=["crowded", "in heaps", "apart"])
def test_best_candidates_tell_what_all_would(spread: float) -> None:
    import torch

    from services.trainer.worker.evaluation import MAX_DETECTIONS, NMS_IOU, select

    torch.manual_seed(0)
    num_anchors, size = 7000, 512
    centre = size / 2 + (torch.rand(2, num_anchors) - 0.5) * size * spread
    boxes = torch.cat((centre, torch.rand(2, num_anchors) * 20 + 20))
    scores = torch.rand(NUM_CLASSES, num_anchors) ** 3
    (found,) = select(torch.cat((boxes, scores))[None], batch_of(size))
    corners = torch.cat((boxes[:2] - boxes[2:] / 2, boxes[:2] + boxes[2:] / 2)).T
    expected = []
    for label in range(NUM_CLASSES):
        sure = scores[label] >= 0.001
        nms = torch.ops.torchvision.nms
        best = nms(corners[sure], scores[label][sure], NMS_IOU)
        expected += [(float(one), label) for one in scores[label][sure][best]]
    expected = sorted(expected, reverse=True)[:MAX_DETECTIONS]
    assert list(zip(found.confidences.tolist(), found.classes.tolist(), strict=True)) == expected


def test_nothing_above_the_threshold_is_no_detection() -> None:
    import torch

    from services.trainer.worker.evaluation import select

    (found,) = select(torch.zeros(1, 4 + NUM_CLASSES, 10), batch_of(64))
    assert len(found.boxes) == len(found.confidences) == len(found.classes) == 0
