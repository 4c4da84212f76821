"""What resizing and augmentation do to pixels and boxes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detflow import boxes as geometry
from detflow.boxes import Boxes
from detflow.resize import BORDER_VALUE, Placement, Resize, place_boxes, place_pixels
from services.preprocess.augment import (
    ORIGINAL,
    Augmentation,
    Copy,
    transform_boxes,
    transform_pixels,
    transform_size,
)
from tests.preprocess_samples import boxed_images, picture

COPIES = (
    *(Copy(kind) for kind in list(Augmentation)[:-2]),
    Copy(Augmentation.BRIGHTNESS, 90),
    Copy(Augmentation.CONTRAST, 0.5),
)
MOVES = COPIES[:6]


@given(boxed_images(), st.sampled_from(COPIES))
def test_augmented_boxes_stay_inside_and_keep_their_area(
    sample: tuple[Boxes, int, int], copy: Copy
) -> None:
    boxes, width, height = sample
    moved = transform_boxes(boxes, width, height, copy)
    np.testing.assert_array_equal(moved, geometry.clip(moved, *transform_size(width, height, copy)))
    np.testing.assert_array_equal(geometry.areas(moved), geometry.areas(boxes))
    assert (moved[:, 2:] > moved[:, :2]).all()


@pytest.mark.parametrize("copy", MOVES, ids=lambda copy: copy.name)
def test_a_box_covers_the_same_pixels_after_augmentation(copy: Copy) -> None:
    pixels = np.zeros((7, 11, 3), np.uint8)
    pixels[1:4, 2:8] = 255
    moved_box = transform_boxes(geometry.as_boxes([2, 1, 8, 4]), 11, 7, copy)[0]
    x1, y1, x2, y2 = moved_box.astype(int)
    moved = transform_pixels(pixels, copy)
    assert moved.shape[1::-1] == transform_size(11, 7, copy)
    assert (moved[y1:y2, x1:x2] == 255).all()
    assert moved.sum() == pixels.sum()


def test_rotation_is_clockwise() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 9  # the top left corner goes to the top right
    assert transform_pixels(pixels, Copy(Augmentation.ROTATE_90))[0, 1, 0] == 9


@pytest.mark.parametrize(
    ("copy", "before", "after"),
    [
        (Copy(Augmentation.BRIGHTNESS, 20), [0, 100, 204, 205, 255], [51, 151, 255, 255, 255]),
        (Copy(Augmentation.BRIGHTNESS, -90), [0, 229, 230, 255], [0, 0, 1, 26]),
        (Copy(Augmentation.CONTRAST, 0), [0, 127, 255], [128, 128, 128]),
        (Copy(Augmentation.CONTRAST, 0.5), [0, 127, 128, 255], [64, 127, 128, 191]),
        (Copy(Augmentation.CONTRAST, 3), [84, 85, 127, 128, 170, 171], [0, 0, 126, 129, 255, 255]),
    ],
    ids=lambda value: value.name if isinstance(value, Copy) else "",
)
def test_brightness_and_contrast_follow_their_formula(
    copy: Copy, before: list[int], after: list[int]
) -> None:
    pixels = np.array([[[value] * 3 for value in before]], np.uint8)
    assert transform_pixels(pixels, copy)[0, :, 1].tolist() == after


@given(st.floats(0, 3), st.integers(-90, 90))
def test_brighter_and_harder_never_change_the_order_of_samples(factor: float, added: int) -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    for copy in (Copy(Augmentation.CONTRAST, factor), Copy(Augmentation.BRIGHTNESS, added)):
        values = transform_pixels(ramp, copy)[0, :, 0].astype(int).tolist()
        assert all(a <= b for a, b in pairwise(values))


def test_every_copy_has_a_name_of_its_own() -> None:
    assert ORIGINAL.name == "none"
    assert Copy(Augmentation.BRIGHTNESS, 30).name == "brightness_+30"
    assert Copy(Augmentation.CONTRAST, 1.25).name == "contrast_1.25"
    assert len({copy.name for copy in COPIES}) == len(COPIES)


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((640, 480), 0, (640, 480)),
        ((640, 480), 640, (640, 480)),
        ((640, 480), 8192, (640, 480)),
        ((640, 480), 320, (320, 240)),
        ((480, 640), 320, (240, 320)),
        ((1000, 3), 100, (100, 1)),
        ((10_000, 1), 32, (32, 1)),
    ],
)
def test_longest_side(size: tuple[int, int], max_side: int, expected: tuple[int, int]) -> None:
    assert Resize(max_side).place(*size) == Placement(*expected, *expected)


@pytest.mark.parametrize(
    ("size", "exact", "inner"),
    [
        ((1920, 1080), (640, 640), (640, 360)),
        ((1080, 1920), (640, 640), (360, 640)),
        ((320, 320), (640, 480), (480, 480)),
        ((64, 48), (640, 480), (640, 480)),
        ((1, 5000), (32, 32), (1, 32)),
    ],
)
def test_a_letterbox_keeps_the_shape_and_enlarges(
    size: tuple[int, int], exact: tuple[int, int], inner: tuple[int, int]
) -> None:
    assert Resize(exact_size=exact).place(*size) == Placement(*inner, *exact)


def test_the_border_of_a_letterbox_is_gray_and_the_image_is_in_its_middle() -> None:
    white = np.full((20, 40, 3), 255, np.uint8)
    placed = place_pixels(white, Resize(exact_size=(64, 64)).place(40, 20))
    assert placed.shape == (64, 64, 3)
    assert (placed[16:48] == 255).all()
    assert (placed[:16] == BORDER_VALUE).all()
    assert (placed[48:] == BORDER_VALUE).all()


def test_stretching_fills_the_size_also_where_one_side_shrinks_and_the_other_grows() -> None:
    resize = Resize(exact_size=(64, 96), stretch=True)
    placed = place_pixels(picture(200, 30), resize.place(200, 30))
    assert placed.shape == (96, 64, 3)
    boxes = place_boxes(geometry.as_boxes([0, 0, 200, 30]), 200, 30, resize.place(200, 30))
    assert boxes.tolist() == [[0, 0, 64, 96]]


@given(
    boxed_images(),
    st.tuples(st.integers(32, 2000), st.integers(32, 2000)),
    st.booleans(),
    st.sampled_from(COPIES),
)
def test_boxes_of_an_exact_size_stay_inside_and_keep_their_share_of_the_image(
    sample: tuple[Boxes, int, int], exact: tuple[int, int], stretch: bool, copy: Copy
) -> None:
    boxes, width, height = sample
    place = Resize(exact_size=exact, stretch=stretch).place(width, height, turned=copy.is_turned)
    canvas = (place.canvas_width, place.canvas_height)
    placed = place_boxes(boxes, width, height, place)
    moved = transform_boxes(placed, *canvas, copy)
    assert transform_size(*canvas, copy) == exact
    np.testing.assert_allclose(moved, geometry.clip(moved, *exact), atol=1e-9)
    shares = geometry.areas(boxes) / (width * height)
    np.testing.assert_allclose(geometry.areas(moved) / (place.width * place.height), shares)


def test_a_marker_is_found_in_its_box_after_resize_and_turn() -> None:
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[12:24, 40:70] = 255
    resize = Resize(exact_size=(80, 120))
    for copy in MOVES:
        place = resize.place(100, 60, turned=copy.is_turned)
        canvas = (place.canvas_width, place.canvas_height)
        box = place_boxes(geometry.as_boxes([40, 12, 70, 24]), 100, 60, place)
        x1, y1, x2, y2 = np.rint(transform_boxes(box, *canvas, copy)[0]).astype(int)
        moved = transform_pixels(place_pixels(pixels, place), copy)
        assert moved.shape == (120, 80, 3)
        assert moved[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200
        rest = moved.astype(int).copy()
        rest[y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] = 0
        assert rest.max() <= BORDER_VALUE
