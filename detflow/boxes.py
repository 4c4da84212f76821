"""Boxes in pixels and what happens to them when their image is flipped, turned or resized.

One convention everywhere: an array of shape (n, 4), float64, rows `x1, y1, x2, y2` in pixels of
the upright image, as continuous edges: x from 0 (left edge of the first pixel) to the width (right
edge of the last), y likewise from the top. A box that covers the whole image is `0, 0, width,
height`; its area is `(x2 - x1) * (y2 - y1)`, without "+ 1".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Boxes: TypeAlias = NDArray[np.float64]
"""Shape (n, 4), rows x1, y1, x2, y2 in pixels."""


def as_boxes(values: Sequence[float] | Sequence[Sequence[float]] | Boxes) -> Boxes:
    """Makes an (n, 4) array of nested rows or of 4 n flat numbers; n may be 0."""
    return np.asarray(values, dtype=np.float64).reshape(-1, 4)


def areas(boxes: Boxes) -> NDArray[np.float64]:
    """Returns the area of each box in square pixels, shape (n,)."""
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def to_xywh(boxes: Boxes) -> Boxes:
    """Turns x1, y1, x2, y2 into COCO's x, y, width, height (pixels)."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def from_xywh(boxes: Boxes) -> Boxes:
    """Turns COCO's x, y, width, height into x1, y1, x2, y2 (pixels)."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def to_normalized_cxcywh(boxes: Boxes, width: int, height: int) -> Boxes:
    """Turns pixel boxes into YOLO's centre x, centre y, width, height (shares of the image)."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.concatenate([centre, size], axis=1) / np.array(
        [width, height, width, height], dtype=np.float64
    )


def from_normalized_cxcywh(boxes: Boxes, width: int, height: int) -> Boxes:
    """Turns YOLO's centre x, centre y, width, height (shares of the image) into pixel boxes."""
    half = boxes[:, 2:] / 2
    corners = np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)
    return np.asarray(corners * np.array([width, height, width, height], dtype=np.float64))


def scale(boxes: Boxes, factor_x: float, factor_y: float) -> Boxes:
    """Follows a resize of the image by `factor_x` and `factor_y`."""
    return np.asarray(boxes * np.array([factor_x, factor_y, factor_x, factor_y], dtype=np.float64))


def shift(boxes: Boxes, right: float, down: float) -> Boxes:
    """Moves boxes by `right` and `down` pixels."""
    return np.asarray(boxes + np.array([right, down, right, down], dtype=np.float64))


def clip(boxes: Boxes, width: int, height: int) -> Boxes:
    """Cuts boxes at the edges of the image; a box outside it becomes one of area zero."""
    limit = np.array([width, height, width, height], dtype=np.float64)
    return np.asarray(np.clip(boxes, 0.0, limit))


def flip_left_right(boxes: Boxes, width: int) -> Boxes:
    """Follows a left-right flip of an image `width` pixels wide."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def flip_up_down(boxes: Boxes, height: int) -> Boxes:
    """Follows an up-down flip of an image `height` pixels high."""
    return np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], axis=1)


def rotate(boxes: Boxes, width: int, height: int, quarter_turns: int) -> Boxes:
    """Follows a clockwise rotation by `quarter_turns` times 90 degrees.

    Args:
        boxes: Boxes in the image before the rotation.
        width: Width of the image before the rotation.
        height: Height of the image before the rotation.
        quarter_turns: Any whole number; negative turns anticlockwise.
    """
    x1, y1, x2, y2 = boxes.T
    match quarter_turns % 4:
        case 1:  # (x, y) -> (height - y, x)
            return np.stack([height - y2, x1, height - y1, x2], axis=1)
        case 2:  # (x, y) -> (width - x, height - y)
            return np.stack([width - x2, height - y2, width - x1, height - y1], axis=1)
        case 3:  # (x, y) -> (y, width - x)
            return np.stack([y1, width - x2, y2, width - x1], axis=1)
        case _:
            return boxes.copy()
