"""Tables of a training as CSV and JSON, made row by row.

Where there is nothing to measure a cell is empty, in JSON null: never the -1 of the API, which
would spoil every mean that somebody takes of a column.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from detflow.v1.analysis_pb2 import ErrorKind, EvaluationAnalysis, EvaluationCurves
from detflow.v1.comparison_pb2 import Comparison
from detflow.v1.metrics_pb2 import ClassMetrics, CocoSummary, Evaluation, OperatingPoint
from services.metrics.matches import Matches
from services.metrics.reports.detection_rows import DETECTION_COLUMNS, detection_rows
from services.metrics.series import Series

Cell: TypeAlias = str | int | float | None

_CHUNK_BYTES = 256 << 10
_MAX_STEPS = 1 << 32  # of an epoch: they are int32
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_POINT = ("confidence_threshold", "precision", "recall", "f1")
_COUNTS = ("num_images", "num_ground_truths", "num_predictions")


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, and the rows as they are made.

    Attributes:
        columns: Names.
        rows: As many cells as columns in each; read once.
    """

    columns: Sequence[str]
    rows: Iterable[Sequence[Cell]]


def series_table(series: Sequence[Series]) -> Table:
    """A row for each epoch, or for each step; a column for each series.

    Array shapes: R rows, S series, N values of a series.
    """
    by_step = any(one.steps_N is not None for one in series)
    keys = [_places(one) for one in series]
    places_R = np.unique(np.concatenate([*keys, np.empty(0, np.int64)]))
    values_RS = np.full((len(places_R), len(series)), np.nan)
    for column, (one, places_N) in enumerate(zip(series, keys, strict=True)):
        values_RS[np.searchsorted(places_R, places_N), column] = one.values_N

    def rows() -> Iterator[Sequence[Cell]]:
        for place, values_S in zip(places_R.tolist(), values_RS, strict=True):
            epoch, step = divmod(place, _MAX_STEPS)
            yield (epoch, step, *values_S.tolist()) if by_step else (epoch, *values_S.tolist())

    head = ("epoch", "step") if by_step else ("epoch",)
    return Table((*head, *(one.name for one in series)), rows())


def _places(series: Series) -> npt.NDArray[np.int64]:
    """Returns epoch and step of each value as one number, so that they sort."""
    steps_N = 0 if series.steps_N is None else series.steps_N
    return series.epochs_N.astype(np.int64) * _MAX_STEPS + steps_N


def evaluations_table(evaluations: Sequence[Evaluation]) -> Table:
    """Figures, a row for each split."""
    figures = [field.name for field in CocoSummary.DESCRIPTOR.fields]
    rows = [
        (
            one.name.rsplit("/", 1)[-1],
            Evaluation.State.Name(one.state),
            one.attempt,
            *(getattr(one, name) for name in _COUNTS),
            *(_measured(getattr(one.coco, name)) for name in figures),
            *_point(one.best_f1 if one.HasField("best_f1") else None),
            one.ground_truth_sha256,
            one.failure.status.message,
        )
        if one.state == Evaluation.State.SUCCEEDED
        else (
            one.name.rsplit("/", 1)[-1],
            Evaluation.State.Name(one.state),
            one.attempt,
            *[None] * (len(_COUNTS) + len(figures) + len(_POINT)),
            one.ground_truth_sha256,
            one.failure.status.message,
        )
        for one in evaluations
    ]
    columns = ("split", "state", "attempt", *_COUNTS, *figures, *_POINT)
    return Table((*columns, "ground_truth_sha256", "failure"), rows)


def classes_table(classes: Sequence[ClassMetrics]) -> Table:
    """Figures of each class, in the order of the class list."""
    figures = ("ap50_95", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_max100")
    rows = (
        (
            one.class_name,
            one.num_ground_truths,
            one.num_predictions,
            *(_measured(getattr(one, name)) for name in figures),
            *_point(one.best_f1 if one.HasField("best_f1") else None),
        )
        for one in classes
    )
    return Table(("class", "num_ground_truths", "num_predictions", *figures, *_POINT), rows)


def curves_table(curves: EvaluationCurves) -> Table:
    """Points of every curve: `curve` is precision_recall or confidence; class empty for all."""

    def rows() -> Iterator[Sequence[Cell]]:
        for line in curves.precision_recall:
            iou = f"{line.iou:.2f}" if line.iou else "0.50:0.95"
            for recall, precision in zip(curves.recalls, line.precisions, strict=False):
                yield "precision_recall", line.class_name, iou, None, precision, recall, None
        for one in curves.confidence:
            columns = (curves.thresholds, one.precisions, one.recalls, one.f1s)
            for threshold, precision, recall, f1 in zip(*columns, strict=False):
                yield "confidence", one.class_name, "0.50", threshold, precision, recall, f1

    columns = ("curve", "class", "iou", "confidence_threshold", "precision", "recall", "f1")
    return Table(columns, rows())


def confusion_table(analysis: EvaluationAnalysis) -> Table:
    """Cells of the confusion matrix that hold something; an empty class is background."""
    rows = ((one.actual_class, one.predicted_class, one.count) for one in analysis.confusion)
    return Table(("actual_class", "predicted_class", "count"), rows)


def errors_table(analysis: EvaluationAnalysis) -> Table:
    """What goes wrong and what it costs."""
    rows = (
        (ErrorKind.Name(one.kind).removeprefix("ERROR_KIND_"), one.count, one.map50_gain)
        for one in analysis.errors
    )
    return Table(("error", "count", "map50_gain"), rows)


def detections_table(matches: Matches, threshold: float) -> Table:
    """Every detection of at least a confidence and every box not found, image by image."""
    return Table(DETECTION_COLUMNS, detection_rows(matches, threshold))


def deltas_table(comparison: Comparison) -> Table:
    """Differences of the figures to those of the first training."""
    rows = ((one.training, one.metric, *_delta(one)) for one in comparison.deltas)
    return Table(("training", "metric", *_DELTA), rows)


def class_deltas_table(comparison: Comparison) -> Table:
    """Differences in AP of each class."""
    rows = (
        (one.training, one.class_name, one.num_ground_truths, *_delta(one))
        for one in comparison.class_deltas
    )
    return Table(("training", "class", "num_ground_truths", *_DELTA), rows)


def parameters_table(comparison: Comparison) -> Table:
    """Parameters that differ, a column for each training."""
    rows = ((one.name, *one.values) for one in comparison.parameters)
    return Table(("parameter", *(one.training for one in comparison.sides)), rows)


def images_table(comparison: Comparison) -> Table:
    """F1 of the images on which they differ most, a column for each training."""
    rows: Iterator[tuple[Cell, ...]] = (
        (one.image_path, *one.f1s, one.difference) for one in comparison.images
    )
    return Table(("image", *(one.training for one in comparison.sides), "difference"), rows)


def to_csv(table: Table) -> Iterator[bytes]:
    """Writes CSV (RFC 4180, UTF-8, with a header) in chunks.

    A text that a spreadsheet would take for a formula gets a ' in front; numbers stay numbers.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([_harmless(name) for name in table.columns])
    for row in table.rows:
        writer.writerow([_harmless(cell) for cell in row])
        if text.tell() >= _CHUNK_BYTES:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()


def to_json(table: Table) -> Iterator[bytes]:
    """Writes a JSON array of one object per row, in chunks."""
    chunk, separator = bytearray(b"["), b"\n"
    for row in table.rows:
        chunk += separator + orjson.dumps(dict(zip(table.columns, row, strict=True)))
        separator = b",\n"
        if len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    yield bytes(chunk) + b"\n]\n"


def _harmless(cell: Cell) -> Cell:
    if isinstance(cell, str):
        return f"'{cell}" if cell.startswith(_FORMULA) else cell
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell


def _measured(figure: float) -> float | None:
    return figure if figure >= 0 else None


def _point(point: OperatingPoint | None) -> list[float | None]:
    return [getattr(point, name) if point else None for name in _POINT]


_DELTA = ("baseline", "value", "difference", "low", "high", "significant")


def _delta(one: Comparison.Delta | Comparison.ClassDelta) -> tuple[Cell, ...]:
    is_measured = one.baseline >= 0 and one.value >= 0
    figures = (one.baseline, one.value, one.delta, one.low, one.high)
    return (*(figure if is_measured else None for figure in figures), int(one.significant))
