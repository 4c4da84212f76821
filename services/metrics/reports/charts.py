"""Charts of one training: each takes what it draws and a language, and returns a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from detflow.v1.analysis_pb2 import EvaluationAnalysis, EvaluationCurves, PrecisionRecallCurve
from detflow.v1.metrics_pb2 import ClassMetrics
from services.metrics.reports.content import MAX_CHART_CLASSES
from services.metrics.reports.style import (
    BRAND,
    INK_2,
    LINE,
    SERIES,
    SOFT,
    axes,
    figure,
    label,
    legend,
    styled,
)
from services.metrics.reports.texts import error_kind, text
from services.metrics.series import Series

_QUALITY = {
    "val/map50": "mAP50",
    "val/map50_95": "mAP50-95",
    "val/precision": "precision",
    "val/recall": "recall",
}
_FAINT = "#c9d1d9"
_GIB = float(1 << 30)


def losses(series: Sequence[Series], language: str) -> Figure | None:
    """Losses by epoch: training drawn through, validation dashed; None without any."""
    found = {one.name: one for one in series if one.name.endswith("loss") and len(one.values_N)}
    parts = sorted({name.split("/", 1)[-1] for name in found})
    if not parts:
        return None
    with styled():
        drawing = figure(3.3)
        area = _by_epoch(drawing, text("losses", language), language)
        for part, colour in zip(parts, _colours(len(parts)), strict=True):
            for split, line in (("train", "-"), ("val", "--")):
                if one := found.get(f"{split}/{part}"):
                    name = f"{part.replace('_', ' ')} · {text(split, language)}"
                    _line(area, one, name, colour, line)
        area.set_ylim(bottom=min(0.0, area.get_ylim()[0]))
        legend(area, 3)
    return drawing


def quality(series: Sequence[Series], language: str) -> Figure | None:
    """mAP, precision and recall on the validation split by epoch; None without any."""
    found = {one.name: one for one in series if one.name in _QUALITY and len(one.values_N)}
    if not found:
        return None
    with styled():
        drawing = figure(3.3)
        area = _by_epoch(drawing, text("quality", language), language)
        for (name, short), colour in zip(_QUALITY.items(), SERIES, strict=False):
            if name in found:
                _line(area, found[name], text(short, language), colour, "-")
        area.set_ylim(-0.02, 1.02)
        legend(area)
    return drawing


def learning_rate(series: Sequence[Series], language: str) -> Figure | None:
    """Learning rate by epoch; None without any."""
    found = [one for one in series if one.name.split("/")[0] == "lr" and len(one.values_N)]
    if not found:
        return None
    with styled():
        drawing = figure(2.6)
        area = _by_epoch(drawing, text("learning_rate", language), language)
        for one, colour in zip(found, _colours(len(found)), strict=True):
            _line(area, one, one.name, colour, "-")
        area.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        area.set_ylim(bottom=0.0)
        if len(found) > 1:
            legend(area)
    return drawing


def performance(series: Sequence[Series], language: str) -> Figure | None:
    """Throughput, share of time that waits for data, and memory by epoch; None without any."""
    panels: tuple[tuple[str, float], ...] = (
        ("images_per_second", 1.0),
        ("data_wait_share", 100.0),
        ("memory_bytes", 1.0 / _GIB),
    )
    found = {one.name.split("/")[-1]: one for one in series if len(one.values_N)}
    shown = [(name, scale) for name, scale in panels if name in found]
    if not shown:
        return None
    with styled():
        drawing = figure(2.6)
        for place, ((name, scale), colour) in enumerate(zip(shown, SERIES, strict=False), 1):
            area = drawing.add_subplot(1, len(shown), place)
            area.set_title(text(name, language), fontsize=9)
            area.set_xlabel(text("epoch", language))
            _line(area, found[name], name, colour, "-", scale)
            area.set_ylim(bottom=0.0, top=max(area.get_ylim()[1] * 1.1, 1e-3))
            area.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            area.yaxis.set_major_locator(MaxNLocator(4))
    return drawing


def precision_recall(curves: EvaluationCurves, language: str) -> Figure | None:
    """Precision by recall; None without ground truth."""
    pooled = [one for one in curves.precision_recall if not one.class_name and one.precisions]
    if not pooled:
        return None
    of_classes = [
        one
        for one in curves.precision_recall
        if one.class_name and one.precisions and math.isclose(one.iou, 0.5)
    ]
    with styled():
        drawing = figure(3.9)
        area = _square(drawing, "precision_recall", "recall", "precision", language)
        if 1 < len(of_classes) <= MAX_CHART_CLASSES:
            for one in of_classes:
                area.plot(curves.recalls, one.precisions, color=_FAINT, linewidth=0.9, zorder=1)
            area.plot([], [], color=_FAINT, label=text("each_class", language))
        for one, colour in zip(sorted(pooled, key=_by_iou), SERIES, strict=False):
            name = f"IoU {one.iou:.2f}" if one.iou else "IoU 0.50:0.95"
            area.plot(
                curves.recalls, one.precisions, color=colour, label=f"{name} · AP {one.ap:.3f}"
            )
        legend(area, 2)
    return drawing


def confidence(curves: EvaluationCurves, language: str) -> Figure | None:
    """Precision, recall and F1 by confidence threshold; None without ground truth."""
    pooled = [one for one in curves.confidence if not one.class_name and one.recalls]
    if not pooled:
        return None
    with styled():
        drawing = figure(3.9)
        area = _square(drawing, "confidence", "threshold", "", language)
        for name, values, colour in zip(
            ("precision", "recall", "f1"),
            (pooled[0].precisions, pooled[0].recalls, pooled[0].f1s),
            SERIES,
            strict=False,
        ):
            area.plot(curves.thresholds, values, color=colour, label=text(name, language))
        if pooled[0].HasField("best_f1"):
            best = pooled[0].best_f1
            area.axvline(best.confidence_threshold, color=INK_2, linewidth=1.0, linestyle=":")
            is_left = best.confidence_threshold > 0.5
            area.annotate(
                f"{text('best_f1', language)} {best.f1:.3f}\n≥ {best.confidence_threshold:.2f}",
                (best.confidence_threshold, 0.04),
                xytext=(-6 if is_left else 6, 0),
                textcoords="offset points",
                ha="right" if is_left else "left",
                fontsize=8.5,
                color=INK_2,
            )
        legend(area)
    return drawing


def calibration(curves: EvaluationCurves, language: str) -> Figure | None:
    """Confidence against precision, and how many detections there are; None without any."""
    bins = [one for one in curves.calibration.bins if one.num_detections]
    if not bins:
        return None
    with styled():
        drawing = figure(4.4)
        grid = drawing.add_gridspec(2, 1, height_ratios=[3, 1])
        area = drawing.add_subplot(grid[0])
        area.set_title(text("calibration", language))
        area.set_ylabel(text("share_right", language))
        lefts = np.array([one.min_confidence for one in bins])
        widths = np.array([one.max_confidence for one in bins]) - lefts
        area.bar(
            lefts,
            [one.precision for one in bins],
            widths * 0.9,
            align="edge",
            color=SERIES[0],
            label=text("share_right", language),
        )
        area.plot([0, 1], [0, 1], color=INK_2, linestyle="--", linewidth=1.0)
        area.set_ylim(0, 1.02)
        area.text(
            0.015,
            0.93,
            f"{text('expected_error', language)} {curves.calibration.expected_error:.3f}"
            f"   ·   {text('max_error', language)} {curves.calibration.max_error:.3f}",
            transform=area.transAxes,
            fontsize=8.5,
            color=INK_2,
            va="top",
        )
        below = drawing.add_subplot(grid[1], sharex=area)
        below.bar(
            lefts, [one.num_detections for one in bins], widths * 0.9, align="edge", color=LINE
        )
        below.set_xlim(0, 1)
        below.set_xlabel(text("confidence_axis", language))
        below.set_ylabel(text("detections", language))
        # Hardly sure detections are often a hundred times as many as the others.
        below.set_yscale("log")
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        below.yaxis.set_minor_locator(NullLocator())
        below.set_ylim(bottom=0.5)
        area.tick_params(labelbottom=False)
    return drawing


def errors(analysis: EvaluationAnalysis, language: str) -> Figure | None:
    """What each kind of error costs, and how often it happens; None where nothing was found out."""
    impacts = sorted(analysis.errors, key=lambda one: (one.map50_gain, one.count))
    if not impacts:
        return None
    with styled():
        drawing = figure(2.9)
        area = axes(drawing, text("errors", language), text("map50_gain", language))
        places = range(len(impacts))
        gains = [one.map50_gain for one in impacts]
        area.barh(places, gains, color=SERIES[1], height=0.62)
        area.set_yticks(places, [error_kind(one.kind, language) for one in impacts])
        area.tick_params(axis="y", labelsize=9.5)
        area.grid(axis="y", visible=False)
        top = max([*gains, 0.01])
        area.set_xlim(0, top * 1.22)
        for place, one in zip(places, impacts, strict=True):
            area.text(
                max(one.map50_gain, 0.0) + top * 0.012,
                place,
                f"{one.map50_gain:.3f}  ({one.count:,}×)",
                va="center",
                fontsize=8.5,
                color=INK_2,
            )
    return drawing


def classes(figures: Sequence[ClassMetrics], language: str) -> Figure | None:
    """AP of each class, best first; of many the 30 with the most boxes; None without any."""
    known = [one for one in figures if one.num_ground_truths and one.ap50_95 >= 0]
    if not known:
        return None
    most = sorted(known, key=lambda one: -one.num_ground_truths)[:MAX_CHART_CLASSES]
    shown = sorted(most, key=lambda one: one.ap50_95)
    with styled():
        drawing = figure(max(1.9, 1.25 + 0.235 * len(shown)))
        area = axes(drawing, text("classes", language))
        places = range(len(shown))
        area.barh(
            places, [one.ap50 for one in shown], color=SOFT, height=0.68, label="AP50", zorder=2
        )
        area.barh(
            places,
            [one.ap50_95 for one in shown],
            color=BRAND,
            height=0.68,
            label="AP50-95",
            zorder=3,
        )
        area.set_yticks(places, [label(one.class_name) for one in shown])
        area.set_ylim(-0.7, len(shown) - 0.3)
        area.set_xlim(0, 1.12)
        area.set_xticks(np.linspace(0, 1, 6))
        area.grid(axis="y", visible=False)
        for place, one in zip(places, shown, strict=True):
            at = max(one.ap50, one.ap50_95) + 0.012
            area.text(at, place, f"{one.ap50_95:.3f}", va="center", fontsize=8, color=INK_2)
        legend(area)
        _say_left_out(area, len(shown), len(known), language)
    return drawing


def _say_left_out(area: Axes, num_shown: int, num_all: int, language: str) -> None:
    if num_shown < num_all:
        note = text("left_out", language).format(shown=num_shown, all=num_all)
        area.set_title(note, loc="right", fontsize=8.5, fontweight="normal", color=INK_2)


def _by_epoch(drawing: Figure, title: str, language: str) -> Axes:
    area = axes(drawing, title, text("epoch", language))
    area.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    return area


def _line(area: Axes, one: Series, name: str, colour: str, style: str, scale: float = 1.0) -> None:
    """Draws a series; what is no number leaves a gap."""
    values = one.values_N * scale
    values[~np.isfinite(values)] = np.nan
    marker = "o" if len(values) <= 3 else ""
    area.plot(
        one.epochs_N, values, color=colour, linestyle=style, marker=marker, markersize=4, label=name
    )


def _square(drawing: Figure, title: str, x: str, y: str, language: str) -> Axes:
    """Adds axes from 0 to 1."""
    area = axes(
        drawing,
        text(title, language),
        text(x, language) if x else "",
        text(y, language) if y else "",
    )
    area.set_xlim(0, 1)
    area.set_ylim(-0.01, 1.02)
    return area


def _by_iou(curve: PrecisionRecallCurve) -> float:
    return curve.iou or 1.0


def _colours(num: int) -> list[str]:
    return [SERIES[place % len(SERIES)] for place in range(num)]
