"""Offline augmentation: exact flips and quarter turns of an image and its boxes."""

from __future__ import annotations

from enum import StrEnum

import cv2
import numpy as np

from detflow import boxes as geometry
from detflow.boxes import Boxes
from services.preprocess.images import Pixels


class Augmentation(StrEnum):
    """One transformed copy; the values are written into ground truth files."""

    NONE = "none"
    FLIP_LEFT_RIGHT = "flip_left_right"
    FLIP_UP_DOWN = "flip_up_down"
    ROTATE_90 = "rotate_90"
    ROTATE_180 = "rotate_180"
    ROTATE_270 = "rotate_270"


_QUARTER_TURNS = {
    Augmentation.ROTATE_90: 1,
    Augmentation.ROTATE_180: 2,
    Augmentation.ROTATE_270: 3,
}
_ROTATIONS = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}


def transform_pixels(pixels: Pixels, augmentation: Augmentation) -> Pixels:
    """Flips or turns an image; rotations are clockwise."""
    match augmentation:
        case Augmentation.NONE:
            return pixels
        case Augmentation.FLIP_LEFT_RIGHT:
            return np.asarray(cv2.flip(pixels, 1), np.uint8)
        case Augmentation.FLIP_UP_DOWN:
            return np.asarray(cv2.flip(pixels, 0), np.uint8)
        case _:
            rotation = _ROTATIONS[_QUARTER_TURNS[augmentation]]
            return np.asarray(cv2.rotate(pixels, rotation), np.uint8)


def transform_boxes(boxes: Boxes, width: int, height: int, augmentation: Augmentation) -> Boxes:
    """Moves boxes as `transform_pixels` moves an image that has this width and height before."""
    match augmentation:
        case Augmentation.NONE:
            return boxes
        case Augmentation.FLIP_LEFT_RIGHT:
            return geometry.flip_left_right(boxes, width)
        case Augmentation.FLIP_UP_DOWN:
            return geometry.flip_up_down(boxes, height)
        case _:
            return geometry.rotate(boxes, width, height, _QUARTER_TURNS[augmentation])


def transform_size(width: int, height: int, augmentation: Augmentation) -> tuple[int, int]:
    """Returns width and height after the transformation."""
    if augmentation in (Augmentation.ROTATE_90, Augmentation.ROTATE_270):
        return height, width
    return width, height
