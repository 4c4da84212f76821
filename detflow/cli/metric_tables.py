"""Metrics as CSV: the columns are the fields of the messages, numbers unrounded.

Where there is nothing to measure a cell is empty: a -1, as messages have it, would spoil every mean
that somebody takes of a column.
"""

import csv
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from detflow.cli.follow import split_name
from detflow.cli.series import by_epoch
from detflow.client.columns import Columns
from detflow.v1 import analysis_pb2, metrics_pb2

_COCO = [field.name for field in metrics_pb2.CocoSummary.DESCRIPTOR.fields]
_POINT = ("precision", "recall", "f1", "confidence_threshold")
_COUNTS = ("num_images", "num_ground_truths", "num_predictions")
_CLASS = [
    field.name
    for field in metrics_pb2.ClassMetrics.DESCRIPTOR.fields
    if field.name not in ("class_name", "best_f1")
]
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?")
_Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One table; cells that are None stay empty."""

    header: Sequence[str]
    rows: Iterable[Sequence[_Cell]]


def say(tables: Sequence[Table]) -> None:
    """Prints tables as CSV, an empty line between two."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, table in enumerate(tables):
        if number:
            print()
        writer.writerow(table.header)
        writer.writerows([_harmless(cell) for cell in row] for row in table.rows)
    sys.stdout.flush()


def _harmless(cell: _Cell) -> _Cell:
    """Keeps a spreadsheet from taking a name for a formula, and NaN for a word."""
    if isinstance(cell, str):
        is_safe = _NUMBER.fullmatch(cell) or not cell.startswith(_FORMULA)
        return cell if is_safe else f"'{cell}"
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _figures(message: Message, fields: Iterable[str]) -> Iterable[_Cell]:
    return (value if value >= 0 else None for value in (getattr(message, f) for f in fields))


def _cells(message: Message, fields: Iterable[str]) -> Iterable[_Cell]:
    return (getattr(message, field) for field in fields)


def _point(message: metrics_pb2.Evaluation | metrics_pb2.ClassMetrics) -> Iterable[_Cell]:
    return _cells(message.best_f1, _POINT) if message.HasField("best_f1") else [None] * len(_POINT)


def _measured(evaluations: Iterable[metrics_pb2.Evaluation]) -> Iterable[metrics_pb2.Evaluation]:
    return (one for one in evaluations if one.state == metrics_pb2.Evaluation.SUCCEEDED)


def evaluations(evaluations: Sequence[metrics_pb2.Evaluation]) -> Table:
    """Figures of each split that was measured."""
    return Table(
        header=("split", *_COCO, *_POINT, *_COUNTS),
        rows=(
            (split_name(one), *_figures(one.coco, _COCO), *_point(one), *_cells(one, _COUNTS))
            for one in _measured(evaluations)
        ),
    )


def classes(evaluations: Sequence[metrics_pb2.Evaluation]) -> Table:
    """Figures of each class on each split."""
    return Table(
        header=("split", "class_name", *_CLASS, *_POINT),
        rows=(
            (split_name(evaluation), one.class_name, *_figures(one, _CLASS), *_point(one))
            for evaluation in _measured(evaluations)
            for one in evaluation.classes
        ),
    )


def counts(analysis: analysis_pb2.EvaluationAnalysis) -> Table:
    """Counts of all classes together (empty name), then of each."""
    fields = [field.name for field in analysis_pb2.EvaluationAnalysis.Counts.DESCRIPTOR.fields]
    return Table(
        header=("confidence_threshold", *fields),
        rows=(
            (analysis.confidence_threshold, *_cells(one, fields))
            for one in (analysis.all, *analysis.classes)
        ),
    )


def confusion(analysis: analysis_pb2.EvaluationAnalysis) -> Table:
    """Cells of the confusion matrix that are not 0; an empty class is background."""
    fields = ("actual_class", "predicted_class", "count")
    return Table(header=fields, rows=(tuple(_cells(one, fields)) for one in analysis.confusion))


def errors(analysis: analysis_pb2.EvaluationAnalysis) -> Table:
    """What goes wrong, and what it costs."""
    name = analysis_pb2.ErrorKind.Name
    return Table(
        header=("error", "count", "map50_gain"),
        rows=(
            (name(one.kind).removeprefix("ERROR_KIND_").lower(), one.count, one.map50_gain)
            for one in analysis.errors
        ),
    )


def precision_recall(curves: analysis_pb2.EvaluationCurves) -> Table:
    """Precision by recall; an empty class is the mean, IoU 0 the mean over 0.5 to 0.95."""
    return Table(
        header=("class_name", "iou", "recall", "precision"),
        rows=(
            (curve.class_name, curve.iou, recall, precision)
            for curve in curves.precision_recall
            for recall, precision in zip(curves.recalls, curve.precisions, strict=False)
        ),
    )


def confidence(curves: analysis_pb2.EvaluationCurves) -> Table:
    """Precision, recall and F1 by threshold; an empty class is all detections pooled."""
    return Table(
        header=("class_name", "confidence_threshold", "precision", "recall", "f1"),
        rows=(
            (
                curve.class_name,
                threshold,
                curve.precisions[at],
                curve.recalls[at] if curve.recalls else None,
                curve.f1s[at] if curve.f1s else None,
            )
            for curve in curves.confidence
            for at, threshold in enumerate(curves.thresholds)
        ),
    )


def calibration(curves: analysis_pb2.EvaluationCurves) -> Table:
    """Bins of confidences."""
    fields = [field.name for field in analysis_pb2.Calibration.Bin.DESCRIPTOR.fields]
    return Table(
        header=fields, rows=(tuple(_cells(one, fields)) for one in curves.calibration.bins)
    )


def epochs(series: Sequence[metrics_pb2.MetricSeries]) -> Table:
    """A row for each epoch, a column for each series."""
    return Table(
        header=("epoch", *(one.name for one in series)),
        rows=((epoch, *values) for epoch, values in by_epoch(series).items()),
    )


def steps(columns: Mapping[str, Columns]) -> Table:
    """A row for each step, a column for each series."""
    values: dict[tuple[int, int, float], dict[str, float]] = {}
    for name, one in columns.items():
        places = zip(one.epochs, one.steps, one.positions, strict=True)
        for place, value in zip(places, one.values, strict=True):
            values.setdefault(place, {})[name] = value
    return Table(
        header=("epoch", "step", "epochs_done", *columns),
        rows=((*place, *(values[place].get(name) for name in columns)) for place in sorted(values)),
    )
