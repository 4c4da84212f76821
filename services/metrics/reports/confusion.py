"""The confusion matrix as a chart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from detflow.v1.analysis_pb2 import EvaluationAnalysis
from services.metrics.reports.content import MAX_CHART_CLASSES
from services.metrics.reports.style import BRAND, INK, INK_2, LINE, SURFACE, figure, label, styled
from services.metrics.reports.texts import text

_RIGHT = LinearSegmentedColormap.from_list("right", [SURFACE, "#9fd3cc", BRAND])
_WRONG = LinearSegmentedColormap.from_list("wrong", [SURFACE, "#f6c9a0", "#b45309"])
_MAX_CLASSES_WITH_NUMBERS = 20


def confusion(analysis: EvaluationAnalysis, language: str) -> Figure | None:
    """Which class was taken for which: rows are the ground truth; None where nothing was found out.

    A cell's colour is its share of its row, right ones green and wrong ones orange. The last row
    and column are background: detections of nothing, and boxes not found.
    """
    cells = {(one.actual_class, one.predicted_class): one.count for one in analysis.confusion}
    if not cells:
        return None
    num_boxes = {
        one.class_name: one.num_true_positives + one.num_false_negatives for one in analysis.classes
    }
    most = sorted(num_boxes, key=lambda name: -num_boxes[name])[:MAX_CHART_CLASSES]
    names = [name for name in num_boxes if name in set(most)]
    keys = [*names, ""]
    counts_KK = np.array([[cells.get((row, column), 0) for column in keys] for row in keys])
    shares_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    with styled():
        side = min(7.2, max(3.2, 1.5 + 0.4 * len(keys)))
        drawing = figure(side, width=max(side, 3.8))
        area = drawing.add_subplot()
        area.set_title(text("confusion", language))
        _paint(area, shares_KK)
        if len(keys) <= _MAX_CLASSES_WITH_NUMBERS + 1:
            _write(area, counts_KK, shares_KK)
        _name(area, [*map(label, names), text("background", language)], language)
        if len(num_boxes) > len(names):
            note = text("left_out", language).format(shown=len(names), all=len(num_boxes))
            drawing.text(0.01, 0.005, note, fontsize=8.5, color=INK_2)
    return drawing


def _paint(area: Axes, shares_KK: npt.NDArray[np.float64]) -> None:
    """Colours the cells that hold something, the diagonal by another scale than the rest."""
    rows, columns = np.nonzero(shares_KK)
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    area.add_collection(
        PolyCollection(
            [corners + place for place in zip(columns, rows, strict=True)],
            facecolors=[
                (_RIGHT if row == column else _WRONG)(shares_KK[row, column])
                for row, column in zip(rows, columns, strict=True)
            ],
        )
    )
    for edge in np.arange(len(shares_KK) + 1) - 0.5:
        area.axhline(edge, color=LINE, linewidth=0.5)
        area.axvline(edge, color=LINE, linewidth=0.5)
    area.set_xlim(-0.5, len(shares_KK) - 0.5)
    area.set_ylim(len(shares_KK) - 0.5, -0.5)
    area.set_aspect("equal")
    area.grid(visible=False)


def _write(
    area: Axes, counts_KK: npt.NDArray[np.int64], shares_KK: npt.NDArray[np.float64]
) -> None:
    small = len(counts_KK) > 12
    for (row, column), count in np.ndenumerate(counts_KK):
        if count:
            area.text(
                column,
                row,
                f"{count:,}" if count < 10_000 else f"{count / 1000:.0f}k",
                ha="center",
                va="center",
                fontsize=6.5 if small else 9,
                color=SURFACE if shares_KK[row, column] > 0.55 else INK,
            )


def _name(area: Axes, names: list[str], language: str) -> None:
    places = range(len(names))
    size = 9 if len(names) <= 12 else 6.5
    is_long = len(names) > 6 or any(len(name) > 8 for name in names)
    area.set_xticks(
        places,
        names,
        fontsize=size,
        rotation=45 if is_long else 0,
        ha="right" if is_long else "center",
        rotation_mode="anchor" if is_long else "default",
    )
    area.set_yticks(places, names, fontsize=size)
    area.tick_params(length=0)
    area.set_xlabel(text("found_as", language))
    area.set_ylabel(text("ground_truth", language))
    for spine in area.spines.values():
        spine.set_visible(False)
