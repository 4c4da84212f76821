"""What happens to pixels and boxes on their way into a training batch."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from services.trainer.worker.augment import PADDING_GREY, Draw, Labels, Picture, paint
from services.trainer.worker.hyperparameters import Hyperparameters

SIDE = 160
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
SIZES = ((160, 90), (120, 160), (50, 40), (33, 80))
"""Some smaller than they will be shown."""


def picture(quarter: int) -> Picture:
    """Draws a box of the quarter's colour on black."""
    width, height = SIZES[quarter]
    x1, y1, x2, y2 = width // 5, height // 4, width * 3 // 4, height * 4 // 5
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y1:y2, x1:x2] = COLOURS[quarter]
    corners = np.array([[x1 / width, y1 / height, x2 / width, y2 / height]])
    return Picture(pixels, corners, np.array([quarter]))


PICTURES = [picture(quarter) for quarter in range(4)]


def painted(pictures: list[Picture], draw: Draw) -> tuple[NDArray[np.uint8], Labels]:
    square = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    return square, paint(pictures, draw, square)


def labelled(labels: Labels, label: int) -> NDArray[np.float64] | None:
    """Returns x1, y1, x2, y2 of a class's box in pixels, if it is there."""
    rows = labels.boxes[labels.classes == label] * SIDE
    if not len(rows):
        return None
    ((x, y, width, height),) = rows
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def seen(square: NDArray[np.uint8], label: int) -> NDArray[np.int64] | None:
    """Returns x1, y1, x2, y2 around the pixels of a class's colour."""
    ys, xs = np.nonzero(((square > 127) == (np.array(COLOURS[label]) > 127)).all(axis=2))
    if not len(xs):
        return None
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.parametrize("mosaic", [True, False])
def test_boxes_are_where_their_pixels_are(mosaic: bool) -> None:
    values, num_seen = Hyperparameters(hsv_h=0, hsv_s=0, hsv_v=0), 0
    for seed in range(300):
        draw = Draw.by(random.Random(seed), values, mosaic=mosaic)
        pictures = PICTURES if mosaic else [PICTURES[seed % 4]]
        square, labels = painted(pictures, draw)
        for (label,) in (one.classes for one in pictures):
            box, there = labelled(labels, label), seen(square, label)
            if box is not None:
                assert there is not None
                assert np.abs(box - there).max() <= 0.6, (seed, label, box, there)
                num_seen += 1
            elif there is not None:  # too little was left of it
                x1, y1, x2, y2 = there
                whole = np.prod(SIZES[label]) * 0.3 * (SIDE / max(SIZES[label]) * draw.scale) ** 2
                little = (x2 - x1) * (y2 - y1) < 0.15 * whole
                assert little or min(x2 - x1, y2 - y1) <= 3, (seed, label, there)
    assert num_seen > 300 * (2 if mosaic else 0.95)


def test_four_images_meet_where_they_should_and_grey_is_around_them() -> None:
    shades = [
        Picture(np.full((90, 160, 3), shade, np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64))
        for shade in (10, 20, 30, 40)
    ]
    # The canvas is twice the square and shown at half its size: here just so, then moved.
    for meeting, shift, (x, y), across, down in (
        ((0.75, 1.25), (0.5, 0.5), (60, 100), (0, 140), (55, 145)),
        ((0.5, 1.5), (0.6, 0.4), (56, 104), (16, 136), (59, 144)),  # its edges cut the images
    ):
        square, labels = painted(shades, Draw(meeting=meeting, scale=0.5, shift=shift))
        assert not len(labels.classes) and labels.boxes.shape == (0, 4)
        expected = np.full((SIDE, SIDE), PADDING_GREY)
        expected[down[0] : y, across[0] : x] = 10
        expected[down[0] : y, x : across[1]] = 20
        expected[y : down[1], across[0] : x] = 30
        expected[y : down[1], x : across[1]] = 40
        assert (square == expected[..., None]).all()


def test_one_image_lies_in_the_middle_as_it_is() -> None:
    square, labels = painted([PICTURES[0]], Draw())
    assert (square[35:125] == PICTURES[0].pixels).all()
    assert (square[:35] == PADDING_GREY).all() and (square[125:] == PADDING_GREY).all()
    assert labelled(labels, 0) == pytest.approx([32, 35 + 22, 120, 35 + 72])


def test_boxes_of_which_too_little_is_left_are_dropped() -> None:
    for shift, is_left in ((-32 - 80, False), (-32 - 79, True)):  # 8 and 9 of 88 px
        _, labels = painted([PICTURES[0]], Draw(shift=(0.5 + shift / SIDE, 0.5)))
        assert (labelled(labels, 0) is not None) == is_left


def test_colours_change_by_their_gains() -> None:
    shade = Picture(
        np.full((160, 160, 3), (150, 90, 60), np.uint8), np.zeros((0, 4)), np.zeros(0, int)
    )
    before = colorsys.rgb_to_hsv(150, 90, 60)

    def after(*gains: float) -> tuple[float, float, float]:
        square, _ = painted([shade], Draw(gains=(gains[0], gains[1], gains[2])))
        assert (square == square[0, 0]).all()
        return colorsys.rgb_to_hsv(*square[0, 0].tolist())

    hue, saturation, value = before
    assert after(0.25, 0, 0) == pytest.approx((hue + 0.25, saturation, value), abs=0.01)
    assert after(-0.25, 0, 0) == pytest.approx((hue + 0.75, saturation, value), abs=0.01)
    assert after(0, -0.5, 0) == pytest.approx((hue, saturation / 2, value), abs=0.02)
    assert after(0, 0.9, 0) == pytest.approx((hue, 1.0, value), abs=0.02)
    assert after(0, 0, 0.4) == pytest.approx((hue, saturation, 210), abs=1)
    assert after(0, 0, 1.0)[2] == 255


def test_draws_stay_within_the_hyperparameters_and_do_not_depend_on_each_other() -> None:
    draws = [Draw.by(random.Random(seed), Hyperparameters(), mosaic=True) for seed in range(500)]
    for values, low, high in (
        ([draw.scale for draw in draws], 0.5, 1.5),
        ([shift for draw in draws for shift in draw.shift], 0.4, 0.6),
        ([one for draw in draws for one in draw.meeting or ()], 0.5, 1.5),
        ([draw.gains[0] for draw in draws], -0.015, 0.015),
        ([draw.gains[1] for draw in draws], -0.7, 0.7),
        ([draw.gains[2] for draw in draws], -0.4, 0.4),
    ):
        margin = (high - low) / 20
        assert low <= min(values) < low + margin and high - margin < max(values) <= high
    assert 200 < sum(draw.flip for draw in draws) < 300
    plain = Hyperparameters(mosaic=0.5, flip_lr=0, hsv_s=0)
    others = [Draw.by(random.Random(seed), plain, mosaic=True) for seed in range(500)]
    assert 200 < sum(draw.meeting is None for draw in others) < 300
    assert [draw.scale for draw in others] == [draw.scale for draw in draws]
    assert [draw.gains[2] for draw in others] == [draw.gains[2] for draw in draws]
