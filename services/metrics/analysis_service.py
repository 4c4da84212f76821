"""The AnalysisService servicer: curves, confusion and errors behind an evaluation's figures."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from detflow.errors import InvalidArgument, Violation
from detflow.v1 import analysis_pb2, analysis_pb2_grpc, metrics_pb2
from services.metrics import curves, thresholds
from services.metrics.domain import ErrorKind, OperatingPoint
from services.metrics.error_gains import gains
from services.metrics.inputs import Floats
from services.metrics.matches import Matches
from services.metrics.measured import Measured, MeasuredSplits

_EVERY_CLASS = "*"
_IOU50, _IOU75 = 0, 5
_SHOWN_CLASSES = 20


class AnalysisService(analysis_pb2_grpc.AnalysisServiceServicer):
    """Answers from the matches of measured splits.

    Args:
        splits: The measured splits.
    """

    def __init__(self, splits: MeasuredSplits) -> None:
        self._splits = splits

    async def GetEvaluationCurves(
        self, request: analysis_pb2.GetEvaluationCurvesRequest, context: Any
    ) -> analysis_pb2.EvaluationCurves:
        """Curves of an evaluation, and of some of its classes."""
        measured = await self._read(request.name)
        classes = class_indexes(measured.matches.class_names, request.class_names)
        return await asyncio.to_thread(evaluation_curves, measured.matches, classes)

    async def AnalyzeEvaluation(
        self, request: analysis_pb2.AnalyzeEvaluationRequest, context: Any
    ) -> analysis_pb2.EvaluationAnalysis:
        """What a confidence threshold makes of an evaluation."""
        measured = await self._read(request.name)
        wanted = request.confidence_threshold if request.HasField("confidence_threshold") else None
        return await asyncio.to_thread(
            evaluation_analysis, measured.matches, measured.threshold(wanted)
        )

    async def _read(self, name: str) -> Measured:
        training, split = name.rsplit("/evaluations/", 1)
        return await self._splits.read(training, split)


def class_indexes(class_names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Finds the classes of a request's `class_names`, each once; "*" alone means every class.

    Raises:
        InvalidArgument: UNKNOWN_CLASS: some are not there.
    """
    if list(wanted) == [_EVERY_CLASS]:
        return list(range(len(class_names)))
    index = {name: k for k, name in enumerate(class_names)}
    violations = [
        Violation(
            f"class_names[{position}]",
            "UNKNOWN_CLASS",
            no_such_class(class_names, name),
        )
        for position, name in enumerate(wanted)
        if name not in index
    ]
    if violations:
        raise InvalidArgument(
            f"{violations[0].field}: {violations[0].description}",
            reason="UNKNOWN_CLASS",
            violations=violations,
        )
    return list(dict.fromkeys(index[name] for name in wanted))


def no_such_class(class_names: Sequence[str], name: str) -> str:
    """Says that there is no such class, and which there are."""
    shown = ", ".join(class_names[:_SHOWN_CLASSES])
    more = len(class_names) - _SHOWN_CLASSES
    rest = f" and {more} more" if more > 0 else ""
    return f'there is no class "{name}"; there are: {shown}{rest}'


def evaluation_curves(matches: Matches, classes: Sequence[int]) -> analysis_pb2.EvaluationCurves:
    """Makes the curves of all classes together and of some classes, given by index."""
    message = analysis_pb2.EvaluationCurves(
        recalls=curves.RECALLS.round(2), thresholds=curves.CONFIDENCES
    )
    precision_TKR = curves.precisions(matches)
    known = np.flatnonzero(curves.count_truths(matches)).tolist()
    message.precision_recall.extend(_precision_recall("", precision_TKR[:, known]))
    for k in classes:
        of_class_TKR = precision_TKR[:, [k] if k in known else []]
        message.precision_recall.extend(_precision_recall(matches.class_names[k], of_class_TKR))
    message.confidence.append(_confidence_curve(matches, None))
    message.confidence.extend(_confidence_curve(matches, k) for k in classes)
    confidence_N, right_N, _ = curves.counted(matches)
    message.calibration.CopyFrom(_calibration(curves.calibration(confidence_N, right_N)))
    return message


def _precision_recall(
    class_name: str, precision_TKR: Floats
) -> list[analysis_pb2.PrecisionRecallCurve]:
    """Makes the curves at IoU 0.5 and 0.75 and over all IoU thresholds: means over some classes."""
    found = []
    for iou, some_TKR in (
        (0.5, precision_TKR[_IOU50]),
        (0.75, precision_TKR[_IOU75]),
        (0.0, precision_TKR),
    ):
        message = analysis_pb2.PrecisionRecallCurve(class_name=class_name, iou=iou, ap=-1.0)
        if some_TKR.size:
            message.precisions.extend(some_TKR.reshape(-1, len(curves.RECALLS)).mean(axis=0))
            message.ap = float(some_TKR.mean())
        found.append(message)
    return found


def _confidence_curve(matches: Matches, class_index: int | None) -> analysis_pb2.ConfidenceCurve:
    curve = curves.confidence_curve(*curves.counted(matches, class_index))
    return analysis_pb2.ConfidenceCurve(
        class_name="" if class_index is None else matches.class_names[class_index],
        precisions=curve.precision_C,
        recalls=curve.recall_C,
        f1s=curve.f1_C,
        best_f1=_operating_point(curve.best_f1),
    )


def _operating_point(point: OperatingPoint | None) -> metrics_pb2.OperatingPoint | None:
    return metrics_pb2.OperatingPoint(**dataclasses.asdict(point)) if point else None


def _calibration(found: curves.Calibration) -> analysis_pb2.Calibration:
    bins = zip(
        found.count_B.tolist(), found.confidence_B.tolist(), found.precision_B.tolist(), strict=True
    )
    return analysis_pb2.Calibration(
        bins=[
            analysis_pb2.Calibration.Bin(
                min_confidence=b / curves.NUM_BINS,
                max_confidence=(b + 1) / curves.NUM_BINS,
                num_detections=count,
                mean_confidence=confidence,
                precision=precision,
            )
            for b, (count, confidence, precision) in enumerate(bins)
        ],
        expected_error=found.expected_error,
        max_error=found.max_error,
    )


def evaluation_analysis(matches: Matches, threshold: float) -> analysis_pb2.EvaluationAnalysis:
    """Counts what a confidence threshold makes of a split."""
    counts = thresholds.count_classes(matches, threshold)
    rows = list(
        zip(
            counts.true_positives_K.tolist(),
            counts.false_positives_K.tolist(),
            counts.false_negatives_K.tolist(),
            strict=True,
        )
    )
    errors, gained = thresholds.count_errors(matches, threshold), gains(matches)
    return analysis_pb2.EvaluationAnalysis(
        confidence_threshold=threshold,
        all=_counts("", *(sum(row[i] for row in rows) for i in range(3))),
        classes=[_counts(name, *row) for name, row in zip(matches.class_names, rows, strict=True)],
        confusion=_cells(matches, threshold),
        errors=[
            analysis_pb2.EvaluationAnalysis.ErrorImpact(
                kind=analysis_pb2.ErrorKind.ValueType(kind),
                count=errors[kind],
                map50_gain=gained[kind],
            )
            for kind in ErrorKind
            if kind is not ErrorKind.NONE
        ],
    )


def _counts(
    class_name: str, right: int, wrong: int, not_found: int
) -> analysis_pb2.EvaluationAnalysis.Counts:
    return analysis_pb2.EvaluationAnalysis.Counts(
        class_name=class_name,
        num_true_positives=right,
        num_false_positives=wrong,
        num_false_negatives=not_found,
        precision=_share(right, right + wrong),
        recall=_share(right, right + not_found),
        f1=_share(2 * right, 2 * right + wrong + not_found),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _cells(
    matches: Matches, threshold: float
) -> list[analysis_pb2.EvaluationAnalysis.ConfusionCell]:
    """Counts the pairs of each cell, in the order of the class list, background first."""
    found = thresholds.confusion(matches, threshold)
    names = ["", *matches.class_names]  # by class index + 1: BACKGROUND is -1
    cell_P = (found.actual_P + 1).astype(np.int64) * len(names) + found.predicted_P + 1
    counts = np.bincount(cell_P)
    return [
        analysis_pb2.EvaluationAnalysis.ConfusionCell(
            actual_class=names[cell // len(names)],
            predicted_class=names[cell % len(names)],
            count=counts[cell],
        )
        for cell in np.flatnonzero(counts).tolist()
    ]
