"""Sizes of images after preprocessing: a longest side, or an exact size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import cv2
import numpy as np

from detflow import boxes as geometry
from detflow.boxes import Boxes
from detflow.images import Pixels
from detflow.v1 import version_pb2

BORDER_VALUE = 114
"""Gray of a letterbox's border, in all channels: that of the networks' own."""


_MAX_LINEAR = 1.3
"""Times an image may shrink without being averaged; what decoders of JPEGs leave is mostly less."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an image comes to lie in the picture that is made of it; all in pixels.

    Attributes:
        width: Width of the resized image.
        height: Height of the resized image.
        canvas_width: Width of the picture.
        canvas_height: Height of the picture.
    """

    width: int
    height: int
    canvas_width: int
    canvas_height: int

    @property
    def left(self) -> int:
        """Border on the left of the image."""
        return (self.canvas_width - self.width) // 2

    @property
    def top(self) -> int:
        """Border above the image."""
        return (self.canvas_height - self.height) // 2


@dataclass(frozen=True, slots=True)
class Resize:
    """What a recipe says about sizes; at most one of the first two.

    Attributes:
        max_side_px: Longest side; smaller images stay as they are. 0 says nothing.
        exact_size: Width and height; smaller images are enlarged.
        stretch: Whether an image of another shape is stretched to the exact size; else it keeps
            its shape and gets a border.
    """

    max_side_px: int = 0
    exact_size: tuple[int, int] | None = None
    stretch: bool = False

    @classmethod
    def of(cls, recipe: version_pb2.Recipe) -> Self:
        """Reads what a recipe says."""
        size = recipe.exact_size
        return cls(
            max_side_px=recipe.max_side_px,
            exact_size=(size.width_px, size.height_px) if recipe.HasField("exact_size") else None,
            stretch=size.fit == version_pb2.ExactSize.FIT_STRETCH,
        )

    def place(self, width: int, height: int, *, turned: bool = False) -> Placement:
        """Says where an image comes to lie.

        Args:
            width: Pixels before.
            height: Pixels before.
            turned: Whether a quarter turn follows, after which the size must be right.
        """
        if self.exact_size is None:
            longest = max(width, height)
            if self.max_side_px and longest > self.max_side_px:
                width, height = _shares(width, height, self.max_side_px, longest)
            return Placement(width, height, width, height)
        canvas_width, canvas_height = self.exact_size[::-1] if turned else self.exact_size
        if self.stretch:
            return Placement(canvas_width, canvas_height, canvas_width, canvas_height)
        if canvas_width * height <= canvas_height * width:
            width, height = _shares(width, height, canvas_width, width)
        else:
            width, height = _shares(width, height, canvas_height, height)
        return Placement(width, height, canvas_width, canvas_height)


def place_pixels(pixels: Pixels, placement: Placement) -> Pixels:
    """Resizes an image and adds the border.

    Linearly where it grows or shrinks by a little, else by areas: up to `_MAX_LINEAR` the two
    differ by at most 0.6 dB, and four times in what they cost.

    Args:
        pixels: The image, of any size: the decoder may have shrunk it already.
        placement: Where it comes to lie.
    """
    size = (placement.width, placement.height)
    width, height = pixels.shape[1::-1]
    if max(width / size[0], height / size[1]) > _MAX_LINEAR:
        smaller = (min(width, size[0]), min(height, size[1]))
        pixels = np.asarray(cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA), np.uint8)
    if pixels.shape[1::-1] != size:
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    if size == (placement.canvas_width, placement.canvas_height):
        return pixels
    canvas = np.full((placement.canvas_height, placement.canvas_width, 3), BORDER_VALUE, np.uint8)
    left, top = placement.left, placement.top
    canvas[top : top + placement.height, left : left + placement.width] = pixels
    return canvas


def place_boxes(boxes: Boxes, width: int, height: int, placement: Placement) -> Boxes:
    """Moves boxes as an image of this width and height is placed."""
    resized = geometry.scale(boxes, placement.width / width, placement.height / height)
    return geometry.shift(resized, placement.left, placement.top)


def _shares(width: int, height: int, numerator: int, denominator: int) -> tuple[int, int]:
    """Multiplies sides by a fraction, rounding half up in whole numbers; at least 1 each."""
    return (
        max(1, (2 * width * numerator + denominator) // (2 * denominator)),
        max(1, (2 * height * numerator + denominator) // (2 * denominator)),
    )


KEEP_SIZE = Resize()
"""Leaves all sizes as they are."""
