"""Boxes and their names drawn on pictures, whatever the script of a class name."""

from __future__ import annotations

import enum
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from services.metrics import fonts

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""Shape (height, width, 3), BGR, 0..255."""
Color: TypeAlias = tuple[int, int, int]
"""Red, green, blue, 0..255."""

_CLASS_COLORS: tuple[Color, ...] = tuple(
    (value >> 16, value >> 8 & 255, value & 255)
    for value in (
        *(0x3FC9B5, 0xF0A94A, 0x9B95FF, 0xB8E04A, 0x4FB3FF, 0xFF9AD5, 0xFFE14D, 0x5FE08A),
        *(0xC8A27A, 0x7FE3FF, 0xD78CFF, 0xA3B86C, 0x6E8BFF, 0xFFC2A8, 0x2FA89A, 0xE6E6FA),
    )
)
"""Of class 0, 1, ...; none is red, which says that something is wrong."""
_DARK: Color = (22, 32, 43)
_WHITE: Color = (255, 255, 255)
_WRONG: Color = (217, 45, 32)
_CROSS = "✗ "
_ELLIPSIS = "…"
_JOINERS = "\u200c\u200d"
_NO_LETTERS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of Unicode
_REPLACEMENT = "\ufffd"
_MIN_NAMED_PX = 100  # a name would hide a smaller picture


class Style(enum.Enum):
    """What a box is."""

    FOUND = enum.auto()
    """A detection that is right, does not count or is not compared: a solid line."""
    WRONG = enum.auto()
    """A detection that is wrong: a solid line in a red border, its name crossed on red."""
    TRUTH = enum.auto()
    """A ground-truth box: a dashed line."""
    MISSED = enum.auto()
    """A ground-truth box that was not found: dashed on red, its name crossed on red."""


@dataclass(frozen=True, slots=True)
class DrawnBox:
    """A box to be drawn.

    Attributes:
        x1: Left edge in pixels of the picture.
        y1: Upper edge.
        x2: Right edge.
        y2: Lower edge.
        label: What is written at it; empty writes nothing.
        class_id: Index of its class, which says its colour.
        style: What it is.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""
    class_id: int = 0
    style: Style = Style.FOUND


_Rectangle: TypeAlias = tuple[int, int, int, int]  # x1, y1, x2, y2; the last pixel is inside


def draw(pixels: Pixels, boxes: Sequence[DrawnBox]) -> Pixels:
    """Draws boxes on a copy of a picture; labels lie within it, above all lines.

    Lines and letters grow with the picture; one of less than 100 pixels a side gets no labels.
    Where there is room a label stands on its box or under it, and not on another label.

    Args:
        pixels: The picture.
        boxes: In the order they are drawn in; where labels compete the first has the first choice.

    Returns:
        Another picture of the same shape.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
    canvas = ImageDraw.Draw(image)
    for box in boxes:
        _draw_lines(canvas, box, image.size)
    taken: list[_Rectangle] = []
    for box in boxes if max(image.size) >= _MIN_NAMED_PX else ():
        if box.label:
            taken.append(_draw_label(canvas, box, image.size, taken))
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def color_of(class_id: int) -> Color:
    """Returns the colour of a class."""
    return _CLASS_COLORS[class_id % len(_CLASS_COLORS)]


def line_width_px(width: int, height: int) -> int:
    """Returns how wide lines are on a picture of this size."""
    return max(1, round(max(width, height) / 400))


def letter_size_px(width: int, height: int) -> int:
    """Returns how high letters are on a picture of this size."""
    return max(10, round(math.sqrt(max(width, height)) / 2))


def _draw_lines(canvas: ImageDraw.ImageDraw, box: DrawnBox, size: tuple[int, int]) -> None:
    line = line_width_px(*size)
    edges = _edges(box, size)
    dash = 4 * line if box.style in (Style.TRUTH, Style.MISSED) else 0
    border = _DARK if box.style in (Style.FOUND, Style.TRUTH) else _WRONG
    # Red shows between the dashes of what was missed, and is as wide as the line of what is wrong.
    beside = line if box.style is Style.WRONG else 1
    for x1, y1, x2, y2 in _sides(edges, line, dash if box.style is Style.TRUTH else 0):
        canvas.rectangle((x1 - beside, y1 - beside, x2 + beside, y2 + beside), fill=border)
    for side in _sides(edges, line, dash):
        canvas.rectangle(side, fill=color_of(box.class_id))


def _edges(box: DrawnBox, size: tuple[int, int]) -> _Rectangle:
    width, height = size
    # The right and the lower edge are where the next pixel begins.
    x1, x2 = (min(max(round(x), 0), width - 1) for x in (box.x1, box.x2 - 1))
    y1, y2 = (min(max(round(y), 0), height - 1) for y in (box.y1, box.y2 - 1))
    return x1, y1, max(x1, x2), max(y1, y2)


def _sides(edges: _Rectangle, line: int, dash: int) -> Iterator[_Rectangle]:
    """Yields the lines of a box, inside its edges, as filled rectangles; `dash` 0 is solid."""
    x1, y1, x2, y2 = edges
    inside = line - 1
    for a, b in _dashes(x1, x2, dash):
        yield a, y1, b, min(y1 + inside, y2)
        yield a, max(y2 - inside, y1), b, y2
    for a, b in _dashes(y1, y2, dash):
        yield x1, a, min(x1 + inside, x2), b
        yield max(x2 - inside, x1), a, x2, b


def _dashes(first: int, last: int, dash: int) -> Iterator[tuple[int, int]]:
    if not dash:
        yield first, last
        return
    for start in range(first, last + 1, 2 * dash):
        yield start, min(start + dash - 1, last)


def _draw_label(
    canvas: ImageDraw.ImageDraw, box: DrawnBox, size: tuple[int, int], taken: list[_Rectangle]
) -> _Rectangle:
    letters = letter_size_px(*size)
    padding = max(1, letters // 5)
    wrong = box.style in (Style.WRONG, Style.MISSED)
    text = _fit(_CROSS * wrong + _plain(box.label), letters, size[0] - 2 * padding)
    # Ascent and descent of the tallest letters, of Hangul and accents too.
    ascent, descent = round(0.95 * letters), round(0.27 * letters)
    place = _place(
        _edges(box, size),
        (round(_width(text, letters)) + 2 * padding, ascent + descent + padding),
        size,
        taken,
    )
    background = _WRONG if wrong else color_of(box.class_id)
    canvas.rectangle(place, fill=background)
    x = float(place[0] + padding)
    for part, font in fonts.runs(text, letters):
        canvas.text(
            (x, place[1] + padding // 2 + ascent),
            part,
            fill=_WHITE if wrong else _DARK,
            font=font,
            anchor="ls",
        )
        x += font.getlength(part)
    return place


def _place(
    edges: _Rectangle, label: tuple[int, int], size: tuple[int, int], taken: list[_Rectangle]
) -> _Rectangle:
    """Chooses where a label lies: on its box, under it or in it, all within the picture."""
    x1, y1, x2, y2 = edges
    width, height = min(label[0], size[0]), min(label[1], size[1])
    places: list[_Rectangle] = []
    for x, y in ((x1, y1 - height), (x1, y2 + 1), (x1, y1), (x2 - width + 1, y1 - height)):
        if 0 <= y <= size[1] - height:
            x = min(max(x, 0), size[0] - width)
            places.append((x, y, x + width - 1, y + height - 1))
    if not places:
        x = min(x1, size[0] - width)
        places.append((x, 0, x + width - 1, height - 1))
    return next((one for one in places if not _overlaps(one, taken)), places[0])


def _overlaps(place: _Rectangle, taken: list[_Rectangle]) -> bool:
    x1, y1, x2, y2 = place
    return any(x1 <= c and a <= x2 and y1 <= d and b <= y2 for a, b, c, d in taken)


def _plain(text: str) -> str:
    """Replaces what is no letter: controls, ends of lines, marks of direction, half characters."""
    return "".join(
        _REPLACEMENT if unicodedata.category(one) in _NO_LETTERS and one not in _JOINERS else one
        for one in text
    )


def _fit(text: str, letters: int, width: int) -> str:
    """Shortens a text to a width, with an ellipsis."""
    if _width(text, letters) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _width(text[:middle] + _ELLIPSIS, letters) <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low] + _ELLIPSIS


def _width(text: str, letters: int) -> float:
    return sum(font.getlength(part) for part, font in fonts.runs(text, letters))
