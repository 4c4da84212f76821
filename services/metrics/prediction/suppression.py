"""Threshold and non-maximum suppression: what a network answers becomes detections.

The rules are those of the evaluation of a training: every class of an anchor is a candidate of its
own, and a candidate is dropped if a more confident one of its class overlaps it more than allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CANDIDATES = 30_000
"""Of more only the most confident are looked at."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in a picture, most confident first.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels, shape (n, 4).
        confidences: 0..1, shape (n,).
        classes: Class indices, shape (n,).
    """

    boxes: NDArray[np.float64]
    confidences: NDArray[np.float32]
    classes: NDArray[np.int64]


def suppress(
    predictions: NDArray[np.float32], *, threshold: float, nms_iou: float, max_detections: int
) -> Found:
    """Chooses detections.

    Args:
        predictions: Shape (4 + classes, anchors): centre x, centre y, width and height in pixels,
            then a confidence per class.
        threshold: Least confidence.
        nms_iou: Overlap beyond which the less confident of two is dropped, 0..1.
        max_detections: How many at most.
    """
    classes, anchors = np.nonzero(predictions[4:] >= np.float32(threshold))
    confidences = predictions[4:][classes, anchors]
    best = np.argsort(-confidences, kind="stable")[:MAX_CANDIDATES]
    classes, anchors, confidences = classes[best], anchors[best], confidences[best]
    centre, half = predictions[:2, anchors].T, predictions[2:4, anchors].T / 2
    boxes = np.concatenate((centre - half, centre + half), axis=1).astype(np.float64)
    kept = _keep(boxes, classes, nms_iou, max_detections)
    return Found(boxes[kept], confidences[kept], classes[kept].astype(np.int64))


def _keep(
    boxes: NDArray[np.float64], classes: NDArray[np.intp], nms_iou: float, number: int
) -> NDArray[np.intp]:
    """Returns the positions of the boxes that stay; they come by descending confidence."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    left = np.arange(len(boxes))
    kept: list[int] = []
    while len(left) and len(kept) < number:
        first, left = int(left[0]), left[1:]
        kept.append(first)
        corner = np.maximum(boxes[left, :2], boxes[first, :2])
        extent = (np.minimum(boxes[left, 2:], boxes[first, 2:]) - corner).clip(0)
        both = extent.prod(axis=1)
        # Multiplied out, so that boxes without an area need no division by zero.
        overlaps = both > nms_iou * (areas[first] + areas[left] - both)
        left = left[~(overlaps & (classes[left] == classes[first]))]
    return np.array(kept, dtype=np.intp)
