"""Training images: scale, position, mosaic, flip and colours, made in one pass over the pixels.

The random changes are those of ultralytics' recipe (its `v8_transforms`): one image, or four that
meet at a point, are scaled and moved, what a square then shows of them may be mirrored, and hue,
saturation and brightness change. Nothing turns, so all of it is one scale and one shift per image
and axis: the part of each image that will be seen is resized straight to its place. Its edges come
to lie on whole pixels, and its boxes move exactly as its pixels do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from services.trainer.worker.hyperparameters import Hyperparameters

PADDING_GREY = 114
_SCALE = 0.5
"""Largest change of the scale, as a share."""
_TRANSLATE = 0.1
"""Largest shift, as a share of the square's side."""
# A box is dropped if no more is left of it, or if it is as elongated as that.
_LEAST_SIDE_PX = 2
_LEAST_AREA_SHARE = 0.1
_LARGEST_ASPECT_RATIO = 100

Pixels: TypeAlias = NDArray[np.uint8]
"""RGB, shape (height, width, 3), 0..255."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image with its labels.

    Attributes:
        pixels: The image.
        corners: x1, y1, x2, y2 of its boxes as shares of its sides, 0..1, shape (n, 4), float64.
        classes: Their class indices, shape (n,), int64.
    """

    pixels: Pixels
    corners: NDArray[np.float64]
    classes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Draw:
    """The random choices for one training image.

    Attributes:
        meeting: Where four images meet on a canvas of two sides, in sides; None for one image.
        scale: Of the canvas, about its middle.
        shift: Where the middle of the canvas comes to lie in the square, in sides.
        flip: Mirror left and right.
        gains: Change of hue, saturation and brightness, each -1..1.
    """

    meeting: tuple[float, float] | None = None
    scale: float = 1.0
    shift: tuple[float, float] = (0.5, 0.5)
    flip: bool = False
    gains: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def by(cls, numbers: random.Random, values: Hyperparameters, *, mosaic: bool) -> Self:
        """Draws the choices.

        Args:
            numbers: Where they come from. As many are taken whatever the values are, so that one
                choice does not change the others.
            values: How far the choices may go.
            mosaic: Whether there may be mosaics.
        """
        draws_mosaic = numbers.random() < values.mosaic
        meeting = numbers.uniform(0.5, 1.5), numbers.uniform(0.5, 1.5)
        low, high = 0.5 - _TRANSLATE, 0.5 + _TRANSLATE
        return cls(
            meeting=meeting if mosaic and draws_mosaic else None,
            scale=numbers.uniform(1 - _SCALE, 1 + _SCALE),
            shift=(numbers.uniform(low, high), numbers.uniform(low, high)),
            flip=numbers.random() < values.flip_lr,
            gains=(
                values.hsv_h * numbers.uniform(-1, 1),
                values.hsv_s * numbers.uniform(-1, 1),
                values.hsv_v * numbers.uniform(-1, 1),
            ),
        )


@dataclass(frozen=True, slots=True)
class Labels:
    """What there is to be found in a training image.

    Attributes:
        classes: Class indices, shape (n,), int64.
        boxes: Centre and size as shares of the square, shape (n, 4), float64.
    """

    classes: NDArray[np.int64]
    boxes: NDArray[np.float64]


def paint(pictures: Sequence[Picture], draw: Draw, square: Pixels) -> Labels:
    """Paints a training image.

    Args:
        pictures: Four for a mosaic (top left, top right, bottom left, bottom right), else one.
        draw: The random choices.
        square: Where it is painted, shape (side, side, 3).

    Returns:
        What can be seen of the labels.
    """
    side = len(square)
    square.fill(PADDING_GREY)
    corners, classes = [np.zeros((0, 4))], [np.zeros(0, dtype=np.int64)]
    for quarter, picture in enumerate(pictures):
        x, y = _place(picture, quarter, draw, side)
        if x.is_visible and y.is_visible:
            _paint_part(picture.pixels, x, y, square)
            moved, is_left = _move_corners(picture.corners, x, y, side)
            corners.append(moved[is_left])
            classes.append(picture.classes[is_left])
    painted = cv2.flip(square, 1) if draw.flip else square
    if any(draw.gains):
        _change_colours(painted, draw.gains, square)
    elif draw.flip:
        square[:] = painted
    return Labels(np.concatenate(classes), _as_shares(np.concatenate(corners), side, draw.flip))


@dataclass(frozen=True, slots=True)
class _Span:
    """Where an image comes to lie along one axis.

    Attributes:
        num_pixels: Pixels of the image.
        source: First pixel of it that is seen, and the one after the last.
        target: Where these begin and end, in whole pixels of the square or outside.
        cut: Where the canvas cuts the image, as shares of it, 0..1.
        length: Pixels that the image would take, were its edges not on whole pixels.
    """

    num_pixels: int
    source: tuple[int, int]
    target: tuple[int, int]
    cut: tuple[float, float]
    length: float

    @property
    def is_visible(self) -> bool:
        return self.source[0] < self.source[1] and self.target[0] < self.target[1]

    @property
    def mapping(self) -> tuple[float, float]:
        """Factor and summand that turn a share of the image into pixels of the square."""
        scale = (self.target[1] - self.target[0]) / (self.source[1] - self.source[0])
        return scale * self.num_pixels, self.target[0] - scale * self.source[0]


def _place(picture: Picture, quarter: int, draw: Draw, side: int) -> tuple[_Span, _Span]:
    """Returns where an image comes to lie, along x and y."""
    height, width = picture.pixels.shape[:2]
    enlarged = side / max(height, width)  # on the canvas its longest side is that of the square
    spans = []
    for axis, num_pixels in enumerate((width, height)):
        on_canvas = max(1, round(num_pixels * enlarged))
        begin, canvas = 0, on_canvas
        if draw.meeting is not None:
            is_second = quarter >> axis & 1
            begin, canvas = int(draw.meeting[axis] * side) - (1 - is_second) * on_canvas, 2 * side
        length = draw.scale * on_canvas
        offset = draw.scale * (begin - canvas / 2) + draw.shift[axis] * side
        # Whole pixels of the image: those on the canvas, and of them as few as hold all that is
        # seen.
        per_canvas, per_target = num_pixels / on_canvas, num_pixels / length
        cut = (
            max(0, math.floor(-begin * per_canvas)),
            min(num_pixels, math.ceil((canvas - begin) * per_canvas)),
        )
        first = max(cut[0], math.floor(-offset * per_target))
        end = min(cut[1], math.ceil((side - offset) * per_target))
        edges = [round(pixel / per_target + offset) for pixel in (first, end)]
        cut_shares = cut[0] / num_pixels, cut[1] / num_pixels
        spans.append(_Span(num_pixels, (first, end), (edges[0], edges[1]), cut_shares, length))
    return spans[0], spans[1]


def _paint_part(pixels: Pixels, x: _Span, y: _Span, square: Pixels) -> None:
    """Paints what is seen of an image."""
    side, (left, right), (top, bottom) = len(square), x.target, y.target
    part = pixels[slice(*y.source), slice(*x.source)]
    size = right - left, bottom - top
    resized = cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)
    inside = resized[max(0, -top) : side - top, max(0, -left) : side - left]
    square[max(0, top) : bottom, max(0, left) : right] = inside


def _move_corners(
    corners: NDArray[np.float64], x: _Span, y: _Span, side: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Moves boxes as the pixels under them move; says which are still worth finding.

    Returns:
        x1, y1, x2, y2 in pixels of the square, inside it, shape (n, 4); and shape (n,).
    """
    cut = corners.clip((x.cut[0], y.cut[0]) * 2, (x.cut[1], y.cut[1]) * 2)
    areas = (cut[:, 2] - cut[:, 0]) * x.length * (cut[:, 3] - cut[:, 1]) * y.length
    factor, summand = zip(x.mapping, y.mapping, strict=True)
    moved = (cut * (factor * 2) + summand * 2).clip(0, side)
    widths, heights = moved[:, 2] - moved[:, 0], moved[:, 3] - moved[:, 1]
    shortest = np.minimum(widths, heights)
    is_left = (
        (shortest > _LEAST_SIDE_PX)
        & (widths * heights > _LEAST_AREA_SHARE * areas)
        & (np.maximum(widths, heights) < _LARGEST_ASPECT_RATIO * shortest)
    )
    return moved, is_left


def _as_shares(corners: NDArray[np.float64], side: int, flip: bool) -> NDArray[np.float64]:
    """Turns x1, y1, x2, y2 in pixels into centre and size as shares of the square."""
    centres = (corners[:, :2] + corners[:, 2:]) / (2 * side)
    if flip:
        centres[:, 0] = 1 - centres[:, 0]
    return np.concatenate((centres, (corners[:, 2:] - corners[:, :2]) / side), axis=1)


def _change_colours(
    pixels: NDArray[Any], gains: tuple[float, float, float], changed: Pixels
) -> None:
    """Shifts the hue and scales saturation and brightness.

    Args:
        pixels: RGB, shape (height, width, 3), uint8.
        gains: Change of hue, saturation and brightness, each -1..1.
        changed: Where the result is written; may be `pixels`.
    """
    hue, saturation, brightness = gains
    # Here the circle of hues has 256 steps, so that adding to an 8-bit hue goes round it.
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)
    rows += np.tile(np.array((int(hue * 256) % 256, 0, 0), dtype=np.uint8), hsv.shape[1])
    factors = np.diag((1.0, 1 + saturation, 1 + brightness))
    cv2.cvtColor(cv2.transform(hsv, factors), cv2.COLOR_HSV2RGB_FULL, dst=changed)
