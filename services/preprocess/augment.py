"""Offline augmentation: what is done to the copies of a training image and to their boxes.

Flips and quarter turns are exact. Brightness and contrast change each sample by a table:
brightness b adds b percent of the range, contrast c multiplies the difference from mid-gray
(127.5) by c; both are rounded and cut at 0 and 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detflow import boxes as geometry
from detflow.boxes import Boxes
from detflow.images import Pixels, to_gray

_MAX_SAMPLE = 255
_MID_GRAY = 127.5


class Augmentation(StrEnum):
    """What can be done to a copy."""

    NONE = "none"
    FLIP_LEFT_RIGHT = "flip_left_right"
    FLIP_UP_DOWN = "flip_up_down"
    ROTATE_90 = "rotate_90"
    ROTATE_180 = "rotate_180"
    ROTATE_270 = "rotate_270"
    GRAYSCALE = "grayscale"
    BRIGHTNESS = "brightness"
    CONTRAST = "contrast"


_QUARTER_TURNS = {
    Augmentation.ROTATE_90: 1,
    Augmentation.ROTATE_180: 2,
    Augmentation.ROTATE_270: 3,
}
_ROTATIONS = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of an image.

    Attributes:
        augmentation: What is done.
        amount: BRIGHTNESS: -90..90 percent; CONTRAST: 0..3; else 0.
    """

    augmentation: Augmentation = Augmentation.NONE
    amount: float = 0.0

    @property
    def name(self) -> str:
        """What was done, as ground truth files say it: "rotate_90", "brightness_+30"."""
        match self.augmentation:
            case Augmentation.BRIGHTNESS:
                return f"{self.augmentation}_{self.amount:+g}"
            case Augmentation.CONTRAST:
                return f"{self.augmentation}_{self.amount:g}"
            case _:
                return str(self.augmentation)

    @property
    def is_turned(self) -> bool:
        """Whether width and height are exchanged."""
        return self.augmentation in (Augmentation.ROTATE_90, Augmentation.ROTATE_270)


ORIGINAL = Copy()
"""The image itself."""


def transform_pixels(pixels: Pixels, copy: Copy) -> Pixels:
    """Makes a copy of an image; rotations are clockwise."""
    match copy.augmentation:
        case Augmentation.NONE:
            return pixels
        case Augmentation.FLIP_LEFT_RIGHT:
            return np.asarray(cv2.flip(pixels, 1), np.uint8)
        case Augmentation.FLIP_UP_DOWN:
            return np.asarray(cv2.flip(pixels, 0), np.uint8)
        case Augmentation.GRAYSCALE:
            return to_gray(pixels)
        case Augmentation.BRIGHTNESS:
            return _look_up(pixels, np.arange(256) + copy.amount / 100 * _MAX_SAMPLE)
        case Augmentation.CONTRAST:
            return _look_up(pixels, (np.arange(256) - _MID_GRAY) * copy.amount + _MID_GRAY)
        case _:
            rotation = _ROTATIONS[_QUARTER_TURNS[copy.augmentation]]
            return np.asarray(cv2.rotate(pixels, rotation), np.uint8)


def transform_boxes(boxes: Boxes, width: int, height: int, copy: Copy) -> Boxes:
    """Moves boxes as `transform_pixels` moves an image that has this width and height before."""
    match copy.augmentation:
        case Augmentation.FLIP_LEFT_RIGHT:
            return geometry.flip_left_right(boxes, width)
        case Augmentation.FLIP_UP_DOWN:
            return geometry.flip_up_down(boxes, height)
        case _:
            return geometry.rotate(boxes, width, height, _QUARTER_TURNS.get(copy.augmentation, 0))


def transform_size(width: int, height: int, copy: Copy) -> tuple[int, int]:
    """Returns width and height of a copy."""
    return (height, width) if copy.is_turned else (width, height)


def _look_up(pixels: Pixels, table: NDArray[np.floating[Any]]) -> Pixels:
    """Replaces each sample by its entry in a table of 256."""
    whole = np.clip(np.floor(table + 0.5), 0, _MAX_SAMPLE).astype(np.uint8)
    return np.asarray(cv2.LUT(pixels, whole), np.uint8)
