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

from services.metrics.curves import best_f1, count_truths, counted
from services.metrics.domain import ClassFigures, CocoSummary, Measurement
from services.metrics.inputs import (
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
        best_f1=best_f1(*counted(matches)),
        classes=_classes(matches, precision_TRKAD, recall_TKAD),
        num_images=len(matches.id_I),
        num_ground_truths=int(count_truths(matches).sum()),
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
    num_classes = len(matches.class_names)
    truths_K = count_truths(matches).tolist()
    predictions_K = np.bincount(matches.class_N, minlength=num_classes).tolist()
    precision_TRKA, recall_TK = precision_TRKAD[..., _MAX100], recall_TKAD[..., _ALL, _MAX100]
    return tuple(
        ClassFigures(
            class_name=name,
            ap50_95=_mean(precision_TRKA[:, :, k, _ALL]),
            ap50=_mean(precision_TRKA[_IOU50, :, k, _ALL]),
            num_ground_truths=truths_K[k],
            ap75=_mean(precision_TRKA[_IOU75, :, k, _ALL]),
            ap_small=_mean(precision_TRKA[:, :, k, _SMALL]),
            ap_medium=_mean(precision_TRKA[:, :, k, _MEDIUM]),
            ap_large=_mean(precision_TRKA[:, :, k, _LARGE]),
            ar_max100=_mean(recall_TK[:, k]),
            num_predictions=predictions_K[k],
            best_f1=best_f1(*counted(matches, k)),
        )
        for k, name in enumerate(matches.class_names)
    )


def _mean(values: Floats) -> float:
    """Mean of what could be measured (not -1), or -1."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else -1.0
