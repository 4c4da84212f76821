"""Measures predictions against ground truth: the COCO figures and the points of best F1.

The COCO figures follow Lin et al., "Microsoft COCO: Common Objects in Context" (2014) as its
reference implementation pycocotools computes them (`COCOeval`); hotcoco computes them, equal to it
to the last bit.

Array shapes are named by suffix: N detections, T IoU thresholds, R recall levels, K classes, A area
ranges, D limits of detections per image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hotcoco
import numpy as np

from services.metrics.domain import ClassFigures, CocoSummary, Measurement, OperatingPoint
from services.metrics.inputs import (
    Booleans,
    Floats,
    Predicted,
    Truth,
    read_ground_truth,
    read_predictions,
)
from services.metrics.matches import Matches
from services.metrics.matching import match

_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # area ranges, in the order of COCOeval.params.areaRng
_MAX1, _MAX10, _MAX100 = range(3)
_IOU50, _IOU75 = 0, 5


def evaluate(ground_truth: Mapping[str, Any], predictions: bytes) -> tuple[Measurement, Matches]:
    """Measures predictions against ground truth.

    Args:
        ground_truth: COCO dictionary (images, annotations, categories); category ids are class
            indexes + 1. Crowd regions (`iscrowd`) are neither to be found nor counted against
            predictions inside them.
        predictions: Parquet with image_id, class_id (0-based) int32, confidence, x1, y1, x2, y2
            float32.

    Returns:
        All figures of the split, and what became of every detection and box.

    Raises:
        DataLoss: One of the two is not what the worker or the bundle writes: reason
            BAD_GROUND_TRUTH or BAD_PREDICTIONS.
    """
    truth = read_ground_truth(ground_truth)
    predicted = read_predictions(predictions, truth)
    precision_TRKAD, recall_TKAD = _accumulate(truth, predicted)
    matches = match(truth, predicted)
    measurement = Measurement(
        coco=_summarize(precision_TRKAD, recall_TKAD),
        best_f1=best_f1(
            matches.confidence_N[matches.counted_N],
            matches.truth_N[matches.counted_N] >= 0,
            int(np.count_nonzero(~matches.crowd_M)),
        ),
        classes=_classes(matches, precision_TRKAD, recall_TKAD),
        num_images=len(matches.id_I),
        num_ground_truths=int(np.count_nonzero(~matches.crowd_M)),
        num_predictions=len(matches.confidence_N),
    )
    return measurement, matches


def _accumulate(truth: Truth, predicted: Predicted) -> tuple[Floats, Floats]:
    """Returns COCOeval's precision TxRxKxAxD and recall TxKxAxD, -1 without ground truth."""
    sizes = zip(truth.id_I.tolist(), truth.size_I2.tolist(), strict=True)
    gt = hotcoco.COCO.from_arrays(
        [{"id": image, "width": width, "height": height} for image, (width, height) in sizes],
        [{"id": k, "name": name} for k, name in enumerate(truth.class_names, start=1)],
        truth.id_I[truth.image_M],
        truth.class_M + 1,
        truth.box_M4,
        ids=np.arange(1, len(truth.image_M) + 1),
        area=truth.area_M,
        iscrowd=truth.crowd_M,
    )
    dt = gt.load_res(
        np.column_stack(
            [
                truth.id_I[predicted.image_N],
                predicted.box_N4,
                predicted.confidence_N,
                predicted.class_N + 1,
            ]
        )
    )
    evaluation = hotcoco.COCOeval(gt, dt, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    figures = evaluation.eval
    assert figures is not None  # accumulate() sets it
    return figures["precision"], figures["recall"]


def _summarize(precision_TRKAD: Floats, recall_TKAD: Floats) -> CocoSummary:
    """Averages as `COCOeval.summarize` does, without printing."""
    precision_TRKA, recall_TKA = precision_TRKAD[..., _MAX100], recall_TKAD[..., _MAX100]
    return CocoSummary(
        map50_95=_mean(precision_TRKA[..., _ALL]),
        map50=_mean(precision_TRKA[_IOU50, ..., _ALL]),
        map75=_mean(precision_TRKA[_IOU75, ..., _ALL]),
        map_small=_mean(precision_TRKA[..., _SMALL]),
        map_medium=_mean(precision_TRKA[..., _MEDIUM]),
        map_large=_mean(precision_TRKA[..., _LARGE]),
        ar_max1=_mean(recall_TKAD[..., _ALL, _MAX1]),
        ar_max10=_mean(recall_TKAD[..., _ALL, _MAX10]),
        ar_max100=_mean(recall_TKA[..., _ALL]),
        ar_small=_mean(recall_TKA[..., _SMALL]),
        ar_medium=_mean(recall_TKA[..., _MEDIUM]),
        ar_large=_mean(recall_TKA[..., _LARGE]),
    )


def _classes(
    matches: Matches, precision_TRKAD: Floats, recall_TKAD: Floats
) -> tuple[ClassFigures, ...]:
    """Averages the figures of each class."""
    figures = []
    for k, name in enumerate(matches.class_names):
        precision_TRA = precision_TRKAD[:, :, k, :, _MAX100]
        mine_N = matches.class_N == k
        counted_N = mine_N & matches.counted_N
        num_truths = int(np.count_nonzero((matches.class_M == k) & ~matches.crowd_M))
        figures.append(
            ClassFigures(
                class_name=name,
                ap50_95=_mean(precision_TRA[:, :, _ALL]),
                ap50=_mean(precision_TRA[_IOU50, :, _ALL]),
                num_ground_truths=num_truths,
                ap75=_mean(precision_TRA[_IOU75, :, _ALL]),
                ap_small=_mean(precision_TRA[:, :, _SMALL]),
                ap_medium=_mean(precision_TRA[:, :, _MEDIUM]),
                ap_large=_mean(precision_TRA[:, :, _LARGE]),
                ar_max100=_mean(recall_TKAD[:, k, _ALL, _MAX100]),
                num_predictions=int(np.count_nonzero(mine_N)),
                best_f1=best_f1(
                    matches.confidence_N[counted_N], matches.truth_N[counted_N] >= 0, num_truths
                ),
            )
        )
    return tuple(figures)


def _mean(values: Floats) -> float:
    """Mean of what could be measured (not -1), or -1."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else -1.0


def best_f1(
    confidence_N: np.typing.NDArray[np.float32], right_N: Booleans, num_truths: int
) -> OperatingPoint | None:
    """Finds the confidence threshold with the best F1.

    With a threshold t, TP(t) and FP(t) are the right and wrong detections of confidence >= t,
    P(t) = TP / (TP + FP), R(t) = TP / boxes and F1(t) = 2 P R / (P + R) = 2 TP / (TP + FP + boxes).
    Matching is greedy from the most confident detection down, so the matches above a threshold do
    not depend on what lies below it, and one matching serves every threshold. The thresholds tried
    are all distinct confidences; of equals the highest wins. Without detections the point is 0
    throughout.

    Args:
        confidence_N: Confidence of the detections that count.
        right_N: Which of them are right.
        num_truths: Boxes there are to be found; without any there is no such point.
    """
    if not num_truths:
        return None
    if not confidence_N.size:
        return OperatingPoint(confidence_threshold=0.0, precision=0.0, recall=0.0, f1=0.0)
    order_N = np.argsort(-confidence_N, kind="stable")
    confidence_N, right_N = confidence_N[order_N], right_N[order_N]
    last = np.flatnonzero(np.append(np.diff(confidence_N) != 0, True))  # equal ones come together
    num_right, num_kept = np.cumsum(right_N)[last], last + 1
    best = int(np.argmax(2 * num_right / (num_kept + num_truths)))
    right, kept = int(num_right[best]), int(num_kept[best])
    return OperatingPoint(
        confidence_threshold=float(confidence_N[last[best]]),
        precision=right / kept,
        recall=right / num_truths,
        f1=2 * right / (kept + num_truths),
    )
