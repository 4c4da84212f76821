"""Charts of a comparison: differences to the first training, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detflow.v1.comparison_pb2 import Comparison
from services.metrics.reports.style import BAD, INK_2, OK, axes, figure, label, styled
from services.metrics.reports.texts import text

METRICS = {
    "map50_95": "mAP50-95",
    "map50": "mAP50",
    "map75": "mAP75",
    "precision": "precision",
    "recall": "recall",
    "f1": "f1",
}
"""Key of the text that names each figure of a delta."""

_MAX_CLASSES = 20
_Delta = Comparison.Delta | Comparison.ClassDelta


def side(place: int) -> str:
    """Names a training of a comparison: A is the first, the baseline."""
    return chr(ord("A") + place)


def deltas(comparison: Comparison, language: str) -> Figure | None:
    """Differences of the figures; None without any."""
    sides = _sides(comparison)
    rows = [
        (f"{text(METRICS.get(one.metric, 'mAP50'), language)} · {sides[one.training]}", one)
        for one in comparison.deltas
    ]
    return _forest(text("deltas", language), rows) if rows else None


def class_deltas(comparison: Comparison, language: str) -> Figure | None:
    """Differences in AP of single classes, the 20 largest; None without any."""
    sides = _sides(comparison)
    known = [one for one in comparison.class_deltas if one.num_ground_truths]
    largest = sorted(known, key=lambda one: -abs(one.delta))[:_MAX_CLASSES]
    is_pair = len(sides) == 2
    rows = [
        (label(one.class_name) + ("" if is_pair else f" · {sides[one.training]}"), one)
        for one in sorted(largest, key=lambda one: -one.delta)
    ]
    return _forest(text("class_deltas", language), rows) if rows else None


def _sides(comparison: Comparison) -> dict[str, str]:
    return {one.training: side(place) for place, one in enumerate(comparison.sides)}


def _forest(title: str, rows: Sequence[tuple[str, _Delta]]) -> Figure:
    """Draws a point and its interval for each row, the first on top."""
    with styled():
        drawing = figure(1.0 + 0.27 * len(rows), width=7.6)
        area = axes(drawing, title)
        for place, (_, one) in enumerate(reversed(rows)):
            _interval(area, place, one)
        area.axvline(0.0, color=INK_2, linewidth=1.0)
        area.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        area.set_ylim(-0.7, len(rows) - 0.3)
        area.grid(axis="y", visible=False)
        area.margins(x=0.08)
        area.xaxis.set_major_formatter(lambda value, _: f"{value:+.3f}" if value else "0")
    return drawing


def _interval(area: Axes, place: int, one: _Delta) -> None:
    colour = (OK if one.delta > 0 else BAD) if one.significant else "#868f9b"
    area.plot([one.low, one.high], [place, place], color=colour, linewidth=2.4)
    area.plot([one.delta], [place], color=colour, marker="o", markersize=6)
