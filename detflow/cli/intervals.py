"""Intervals drawn in the terminal, one a line, around a common 0."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from detflow.cli.output import printable

_MIN_CELLS = 20
_MAX_CELLS = 72


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """One line of the drawing.

    Attributes:
        name: What it is the interval of.
        value: The value in it.
        low: Its lower end.
        high: Its upper end.
    """

    name: str
    value: float
    low: float
    high: float


def drawn(intervals: Sequence[Interval], width: int) -> Text:
    """Draws intervals on one axis, green where they are above 0 and red where they are below.

    Args:
        intervals: At least one.
        width: Cells of the terminal.
    """
    names = [printable(one.name) for one in intervals]
    margin = max(cell_len(name) for name in names) + 2
    cells = min(max(width - margin - 1, _MIN_CELLS), _MAX_CELLS)
    ends = [0.0, *(end for one in intervals for end in (one.low, one.high, one.value))]
    low, high = min(ends), max(ends)
    step = (high - low) / (cells - 1) or 1.0

    def cell(value: float) -> int:
        return round((value - low) / step)

    text = Text()
    for name, one in zip(names, intervals, strict=True):
        row = [" "] * cells
        row[cell(0.0)] = "┊"
        for index in range(cell(one.low), cell(one.high) + 1):
            row[index] = "─"
        row[cell(one.low)], row[cell(one.high)] = "├", "┤"
        row[cell(one.value)] = "●"
        style = "green" if one.low > 0 else "red" if one.high < 0 else ""
        text.append(name + " " * (margin - cell_len(name)))
        text.append("".join(row).rstrip() + "\n", style)
    marks = [" "] * (cells + 8)
    for value in sorted({low, high, 0.0}, key=lambda value: value == 0):
        label = "0" if value == 0 else f"{value:+.3f}"
        start = max(0, min(cell(value) - len(label) // 2, cells - len(label)))
        if value == 0 and any(mark != " " for mark in marks[max(0, start - 1) : start + 2]):
            continue
        marks[start : start + len(label)] = label
    text.append(" " * margin + "".join(marks).rstrip())
    return text
