"""Boxes follow their image exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detflow import boxes as geometry
from detflow.boxes import Boxes
from services.preprocess.domain import InvalidData, Reason, check_box
from tests.preprocess_samples import boxed_images


@given(boxed_images())
def test_four_quarter_turns_are_the_identity(sample: tuple[Boxes, int, int]) -> None:
    boxes, width, height = sample
    turned = boxes
    for _ in range(4):
        turned = geometry.rotate(turned, width, height, 1)
        width, height = height, width
    np.testing.assert_array_equal(turned, boxes)


@given(boxed_images(), st.integers(-9, 9))
def test_one_rotation_equals_its_quarter_turns(
    sample: tuple[Boxes, int, int], quarter_turns: int
) -> None:
    boxes, width, height = sample
    turned, w, h = boxes, width, height
    for _ in range(quarter_turns % 4):
        turned, w, h = geometry.rotate(turned, w, h, 1), h, w
    np.testing.assert_array_equal(geometry.rotate(boxes, width, height, quarter_turns), turned)


@given(boxed_images())
def test_flips_undo_themselves(sample: tuple[Boxes, int, int]) -> None:
    boxes, width, height = sample
    twice = geometry.flip_left_right(geometry.flip_left_right(boxes, width), width)
    np.testing.assert_array_equal(twice, boxes)
    twice = geometry.flip_up_down(geometry.flip_up_down(boxes, height), height)
    np.testing.assert_array_equal(twice, boxes)


@given(boxed_images())
def test_coordinate_forms_convert_there_and_back(sample: tuple[Boxes, int, int]) -> None:
    boxes, width, height = sample
    np.testing.assert_array_equal(geometry.from_xywh(geometry.to_xywh(boxes)), boxes)
    normalized = geometry.to_normalized_cxcywh(boxes, width, height)
    back = geometry.from_normalized_cxcywh(normalized, width, height)
    np.testing.assert_allclose(back, boxes, atol=1e-9 * max(width, height))


@pytest.mark.parametrize(
    "box",
    [
        (float("nan"), 0, 5, 5),
        (0, 0, float("inf"), 5),
        (3, 3, 3, 8),
        (8, 3, 3, 8),
        (-1.01, 0, 5, 5),
        (0, 0, 101.5, 5),
        (0, 40, 5, 51.2),
        (100.5, 0, 100.9, 5),
    ],
)
def test_bad_boxes_are_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(InvalidData) as caught:
        check_box("a.txt:3", *box, 100, 50)
    assert caught.value.problem.reason is Reason.BAD_BOX
    assert caught.value.problem.where == "a.txt:3"


def test_a_box_up_to_one_pixel_over_the_edge_is_clipped_with_a_warning() -> None:
    box, warning = check_box("a.txt:1", -1.0, 0.0, 100.4, 50.0, 100, 50)
    assert box == (0.0, 0.0, 100.0, 50.0)
    assert warning is not None
    assert warning.reason is Reason.BOX_CLIPPED
    assert warning.num_left_out == 0


def test_rounding_at_the_edge_is_no_warning() -> None:
    box, warning = check_box("a.txt:1", 0.0, -1e-6, 100.0001, 50.0, 100, 50)
    assert box == (0.0, 0.0, 100.0, 50.0)
    assert warning is None
