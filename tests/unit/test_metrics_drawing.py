"""Boxes and names on pictures: where they are, that they can be told apart and read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from services.metrics import fonts
from services.metrics.drawing import DrawnBox, Pixels, Style, color_of, draw, line_width_px

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def blank(width: int, height: int) -> Pixels:
    return np.full((height, width, 3), 128, np.uint8)


def changed(pixels: Pixels, boxes: Sequence[DrawnBox]) -> Mask:
    return np.asarray((draw(pixels, boxes) != pixels).any(axis=2))


def label_of(text: str, width: int = 400) -> Pixels:
    """The part of a picture where the label of a box at its lower edge is."""
    pixels = draw(blank(width, 60), [DrawnBox(0, 40, 20, 60, text)])
    return np.ascontiguousarray(pixels[:39])


def test_nothing_to_draw_changes_nothing_and_the_picture_itself_stays() -> None:
    pixels = blank(64, 48)
    before = pixels.copy()
    assert not changed(pixels, []).any()
    draw(pixels, [DrawnBox(10, 10, 40, 40, "x")])
    np.testing.assert_array_equal(pixels, before)


def test_line_lies_on_the_edge_in_the_colour_of_the_class() -> None:
    pixels = draw(blank(200, 200), [DrawnBox(50, 60, 150, 160, class_id=3)])
    color = color_of(3)[::-1]  # BGR
    for x, y in ((50, 100), (149, 100), (100, 60), (100, 159)):
        assert tuple(pixels[y, x]) == color
    assert tuple(pixels[100, 100]) == (128, 128, 128)
    assert len({color_of(index) for index in range(16)}) == 16


def test_lines_grow_with_the_picture() -> None:
    assert [line_width_px(width, 100) for width in (64, 640, 1920, 4000)] == [1, 2, 5, 10]
    pixels = draw(blank(1920, 1080), [DrawnBox(500, 500, 900, 900)])
    assert (pixels[700, 500:505] == color_of(0)[::-1]).all()


@pytest.mark.parametrize(
    "edges",
    [
        (-50, -50, 20, 20),
        (90, 90, 400, 400),
        (-50, -50, 400, 400),
        (60, 0, 100, 5),
        (0, 96, 5, 100),
        (40, 40, 40, 40),
        (300, 300, 400, 400),
    ],
)
@pytest.mark.parametrize("style", Style)
def test_boxes_over_the_edge_are_drawn_within(
    edges: tuple[int, int, int, int], style: Style
) -> None:
    for width, height in ((100, 100), (12, 9)):
        pixels = blank(width, height)
        x1, y1, x2, y2 = edges
        drawn = draw(pixels, [DrawnBox(x1, y1, x2, y2, "a long name 0.50", 1, style)])
        assert drawn.shape == pixels.shape
        assert (drawn != pixels).any()


def test_styles_can_be_told_apart() -> None:
    pictures = [
        draw(blank(120, 120), [DrawnBox(20, 40, 100, 110, class_id=1, style=style)])
        for style in Style
    ]
    for number, one in enumerate(pictures):
        for other in pictures[number + 1 :]:
            assert (one != other).any(axis=2).sum() > 50


def test_found_boxes_are_solid_and_ground_truth_is_dashed() -> None:
    def gaps(style: Style) -> int:
        pixels = draw(blank(120, 120), [DrawnBox(20, 20, 100, 100, style=style)])
        on_line = (pixels[20, 20:100] == color_of(0)[::-1]).all(axis=1)
        return int((~on_line).sum())

    assert [gaps(style) for style in (Style.FOUND, Style.WRONG)] == [0, 0]
    assert all(30 < gaps(style) < 50 for style in (Style.TRUTH, Style.MISSED))


def test_labels_do_not_cover_each_other_where_there_is_room() -> None:
    boxes = [DrawnBox(100, 100, 300, 250, f"number {n}", n) for n in range(3)]
    each = [
        changed(blank(640, 480), [box]) & ~changed(blank(640, 480), [DrawnBox(100, 100, 300, 250)])
        for box in boxes
    ]
    together = changed(blank(640, 480), boxes)
    assert together.sum() > changed(blank(640, 480), boxes[:1]).sum() + 0.9 * each[1].sum()


@pytest.mark.parametrize(
    "text", ["세포 백혈구", "赤血球", "あいう", "Ärger", "клетка", "✗ ø", "سلام"]
)
def test_letters_of_any_script_are_drawn(text: str) -> None:
    last = fonts.font_files()[-1]
    assert all(Path(str(font.path)) != last for _, font in fonts.runs(text, 12))
    assert (label_of(text) != label_of(text[::-1])).any()


def test_unknown_letters_are_shown_as_boxes_and_joiners_stay_with_them() -> None:
    parts = [part for part, _ in fonts.runs("a ไทย 한\u200d글", 12)]
    assert "".join(parts) == "a ไทย 한\u200d글"
    assert len(parts) == 3
    assert (label_of("ไ") != label_of("")).any()


def test_long_name_is_cut_to_the_picture() -> None:
    def ink(text: str) -> int:
        gray = cv2.cvtColor(label_of(text, 100), cv2.COLOR_BGR2GRAY)
        return int((gray < 60).sum())

    assert ink("한글 이름이 아주 길다 " * 20) < 2 * ink("한글 이름이 아주 길")


def test_the_smallest_pictures_have_no_labels() -> None:
    for width, height, is_named in ((99, 40, False), (100, 40, True)):
        named = changed(blank(width, height), [DrawnBox(10, 25, 30, 38, "세포")])
        plain = changed(blank(width, height), [DrawnBox(10, 25, 30, 38)])
        assert (named != plain).any() == is_named


def test_control_characters_do_no_harm() -> None:
    assert label_of("a\nb\x00\u202ec\ud83d\u2029").shape == (39, 400, 3)
