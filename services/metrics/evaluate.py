"""Measures predictions against ground truth: the COCO figures and the point of best F1.

Array shapes are named by suffix: N predictions, M ground-truth boxes, E candidate matches, T IoU
thresholds, R recall levels, K classes, A area ranges, D limits of detections per image. Boxes are
[x, y, w, h] in pixels of the bundle's image, float64.

The COCO figures follow Lin et al., "Microsoft COCO: Common Objects in Context" (2014) as its
reference implementation pycocotools computes them (`COCOeval`); hotcoco does the matching and
accumulation, equal to it to the last bit.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import hotcoco
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from detflow.errors import DataLoss
from services.metrics.domain import ClassFigures, CocoSummary, Measurement, OperatingPoint

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

MATCH_IOU = 0.5
"""IoU from which a prediction of the operating point counts as right."""
MAX_DETECTIONS = 100
"""Predictions per image and class that count, most confident first (COCO's maxDets)."""
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # area ranges, in the order of COCOeval.params.areaRng
_MAX1, _MAX10, _MAX100 = range(3)
_IOU50, _IOU75 = 0, 5
_PAIRS_PER_CHUNK = 1 << 20  # bounds the memory of matching: about 100 MB

_COLUMNS = {
    "image_id": pyarrow.int32(),
    "class_id": pyarrow.int32(),
    "confidence": pyarrow.float32(),
    "x1": pyarrow.float32(),
    "y1": pyarrow.float32(),
    "x2": pyarrow.float32(),
    "y2": pyarrow.float32(),
}


@dataclass(frozen=True, slots=True)
class _Truth:
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]  # in the order of their ids: the class list
    image_M: Integers
    category_M: Integers
    box_M4: Floats
    area_M: Floats
    crowd_M: Booleans


@dataclass(frozen=True, slots=True)
class _Predicted:
    image_N: Integers
    category_N: Integers
    box_N4: Floats
    confidence_N: Floats


def evaluate(ground_truth: Mapping[str, Any], predictions: bytes) -> Measurement:
    """Measures predictions against ground truth.

    Args:
        ground_truth: COCO dictionary (images, annotations, categories); category ids are class
            indexes + 1. Crowd regions (`iscrowd`) are neither to be found nor counted against
            predictions inside them.
        predictions: Parquet with image_id, class_id (0-based) int32, confidence, x1, y1, x2, y2
            float32.

    Returns:
        All figures of the split.

    Raises:
        DataLoss: One of the two is not what the worker or the bundle writes: reason
            BAD_GROUND_TRUTH or BAD_PREDICTIONS.
    """
    truth = _read_ground_truth(ground_truth)
    predicted = _read_predictions(predictions, truth)
    precision_TRKAD, recall_TKAD = _accumulate(truth, predicted)
    return Measurement(
        coco=_summarize(precision_TRKAD, recall_TKAD),
        best_f1=_best_f1(truth, predicted),
        classes=tuple(
            ClassFigures(
                class_name=category["name"],
                ap50_95=_mean(precision_TRKAD[:, :, k, _ALL, _MAX100]),
                ap50=_mean(precision_TRKAD[_IOU50, :, k, _ALL, _MAX100]),
                num_ground_truths=int(
                    np.count_nonzero((truth.category_M == category["id"]) & ~truth.crowd_M)
                ),
            )
            for k, category in enumerate(truth.categories)
        ),
        num_images=len(truth.images),
        num_ground_truths=int(np.count_nonzero(~truth.crowd_M)),
        num_predictions=len(predicted.confidence_N),
    )


def _read_ground_truth(coco: Mapping[str, Any]) -> _Truth:
    try:
        annotations = coco["annotations"]
        truth = _Truth(
            images=[
                {"id": i["id"], "width": i["width"], "height": i["height"]} for i in coco["images"]
            ],
            categories=sorted(
                ({"id": c["id"], "name": c["name"]} for c in coco["categories"]),
                key=lambda category: cast(int, category["id"]),
            ),
            image_M=np.array([a["image_id"] for a in annotations], np.int64),
            category_M=np.array([a["category_id"] for a in annotations], np.int64),
            box_M4=np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4),
            area_M=np.array([a["area"] for a in annotations], np.float64),
            crowd_M=np.array([a.get("iscrowd", 0) for a in annotations], np.bool_),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataLoss(
            f"the ground truth is no COCO detection dictionary ({type(error).__name__}: {error});"
            " preprocess the version again",
            reason="BAD_GROUND_TRUTH",
        ) from error
    ids = [category["id"] for category in truth.categories]
    if ids != list(range(1, len(ids) + 1)):
        raise DataLoss(
            f"the ground truth's category ids are {ids[:5]}..., not 1 to {len(ids)};"
            " preprocess the version again",
            reason="BAD_GROUND_TRUTH",
        )
    return truth


def _read_predictions(data: bytes, truth: _Truth) -> _Predicted:
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data), columns=list(_COLUMNS))
        columns = {name: table.column(name).cast(kind) for name, kind in _COLUMNS.items()}
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise _bad_predictions(f"are no parquet of the expected columns ({error})") from error
    if any(column.null_count for column in columns.values()):
        raise _bad_predictions("have null values")
    corner_N4 = np.stack(
        [columns[name].to_numpy().astype(np.float64) for name in ("x1", "y1", "x2", "y2")], axis=1
    )
    predicted = _Predicted(
        image_N=columns["image_id"].to_numpy().astype(np.int64),
        category_N=columns["class_id"].to_numpy().astype(np.int64) + 1,
        box_N4=np.concatenate([corner_N4[:, :2], corner_N4[:, 2:] - corner_N4[:, :2]], axis=1),
        confidence_N=columns["confidence"].to_numpy().astype(np.float64),
    )
    _require(np.isfinite(corner_N4).all(axis=1), "have a coordinate that is not finite")
    _require((predicted.box_N4[:, 2:] >= 0).all(axis=1), "have a box with x2 < x1 or y2 < y1")
    _require(
        (predicted.confidence_N >= 0) & (predicted.confidence_N <= 1),
        "have a confidence outside 0..1",
    )
    _require(
        (predicted.category_N >= 1) & (predicted.category_N <= len(truth.categories)),
        f"have a class_id outside 0..{len(truth.categories) - 1}",
    )
    _require(
        np.isin(predicted.image_N, np.array([image["id"] for image in truth.images], np.int64)),
        "have an image_id that is not in the split",
    )
    return predicted


def _require(good_N: npt.NDArray[np.bool_] | np.bool_, fault: str) -> None:
    if not good_N.all():
        raise _bad_predictions(f"{fault}, first in row {int(np.argmin(good_N))}")


def _bad_predictions(fault: str) -> DataLoss:
    return DataLoss(
        f"the predictions {fault}; resume the training to make them again", reason="BAD_PREDICTIONS"
    )


def _accumulate(truth: _Truth, predicted: _Predicted) -> tuple[Floats, Floats]:
    """Returns COCOeval's precision TxRxKxAxD and recall TxKxAxD, -1 without ground truth."""
    num_truths = len(truth.image_M)
    gt = hotcoco.COCO.from_arrays(
        truth.images,
        truth.categories,
        truth.image_M,
        truth.category_M,
        truth.box_M4,
        ids=np.arange(1, num_truths + 1),
        area=truth.area_M,
        iscrowd=truth.crowd_M,
    )
    dt = gt.load_res(
        np.column_stack(
            [predicted.image_N, predicted.box_N4, predicted.confidence_N, predicted.category_N]
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


def _mean(values: Floats) -> float:
    """Mean of what could be measured (not -1), or -1."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else -1.0


def _best_f1(truth: _Truth, predicted: _Predicted) -> OperatingPoint | None:
    """Finds the confidence threshold with the best F1 at IoU 0.5, all classes pooled.

    Predictions are matched as `COCOeval.evaluateImg` does (see `_match`). With a threshold t, TP(t)
    and FP(t) are the matched and unmatched predictions of confidence >= t, P(t) = TP / (TP + FP),
    R(t) = TP / ground-truth boxes and F1(t) = 2 P R / (P + R) = 2 TP / (TP + FP + boxes). Matching
    is greedy from the most confident prediction down, so the matches above a threshold do not
    depend on what lies below it, and one matching serves every threshold. The thresholds tried are
    all distinct confidences; of equals the highest wins. Without predictions the point is 0
    throughout.
    """
    num_truths = int(np.count_nonzero(~truth.crowd_M))
    if not num_truths:
        return None
    matched_N, counted_N = _match(truth, predicted)
    confidence_N, right_N = predicted.confidence_N[counted_N], matched_N[counted_N]
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


def _match(truth: _Truth, predicted: _Predicted) -> tuple[Booleans, Booleans]:
    """Matches predictions to boxes as COCOeval does at IoU 0.5, over all images at once.

    In each image and class the predictions, most confident first (equal ones in file order, the
    first 100), take the free box with the greatest IoU >= 0.5, of equals the last. Only if there is
    none, they may fall into a crowd region, which is never used up; its IoU is the overlap divided
    by the prediction's area.

    Returns:
        Two masks over the N predictions: matched to a box that is no crowd, and counted at all
        (neither beyond the 100th of its image and class nor in a crowd).
    """
    num_groups_K = len(truth.categories) + 1
    group_N = predicted.image_N * num_groups_K + predicted.category_N
    group_M = truth.image_M * num_groups_K + truth.category_M
    order_N = np.lexsort((-predicted.confidence_N, group_N))  # stable: equal ones keep their order
    sorted_group_N = group_N[order_N]
    rank_N = np.arange(len(order_N)) - np.searchsorted(sorted_group_N, sorted_group_N)
    considered = order_N[rank_N < MAX_DETECTIONS]
    rank_of = rank_N[rank_N < MAX_DETECTIONS]

    matched_N = np.zeros(len(order_N), np.bool_)
    counted_N = np.zeros(len(order_N), np.bool_)
    counted_N[considered] = True
    taken_M = np.zeros(len(group_M), np.bool_)
    edges = _candidates(truth, predicted, considered, rank_of, group_N, group_M)
    rank_E, prediction_E, truth_E, iou_E = edges
    # Within a rank a prediction's best candidate comes last: boxes after crowds, then by IoU, then
    # by position.
    order_E = np.lexsort((truth_E, iou_E, ~truth.crowd_M[truth_E], prediction_E, rank_E))
    rank_E, prediction_E, truth_E = rank_E[order_E], prediction_E[order_E], truth_E[order_E]
    bounds = np.searchsorted(rank_E, np.arange(MAX_DETECTIONS + 1))
    for start, stop in itertools.pairwise(bounds):
        # One rank holds at most one prediction of each group, so its choices cannot collide.
        free = ~taken_M[truth_E[start:stop]]
        by, to = prediction_E[start:stop][free], truth_E[start:stop][free]
        is_last = np.append(by[1:] != by[:-1], True)[: len(by)]
        by, to = by[is_last], to[is_last]
        in_crowd = truth.crowd_M[to]
        matched_N[by[~in_crowd]] = True
        taken_M[to[~in_crowd]] = True
        counted_N[by[in_crowd]] = False
    return matched_N, counted_N


def _candidates(
    truth: _Truth,
    predicted: _Predicted,
    considered: Integers,
    rank_of: Integers,
    group_N: Integers,
    group_M: Integers,
) -> tuple[Integers, Integers, Integers, Floats]:
    """Lists rank, prediction, box and IoU of each pair in one image and class with IoU >= 0.5."""
    order_M = np.argsort(group_M, kind="stable")
    sorted_group_M = group_M[order_M]
    first = np.searchsorted(sorted_group_M, group_N[considered], side="left")
    count = np.searchsorted(sorted_group_M, group_N[considered], side="right") - first
    found: list[tuple[Integers, Integers, Integers, Floats]] = []
    for chunk in _chunks(count):
        repeats = count[chunk]
        offset_E = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        truth_E = order_M[np.repeat(first[chunk], repeats) + offset_E]
        prediction_E = np.repeat(considered[chunk], repeats)
        iou_E = _iou(predicted.box_N4[prediction_E], truth.box_M4[truth_E], truth.crowd_M[truth_E])
        near = iou_E >= MATCH_IOU
        rank_E = np.repeat(rank_of[chunk], repeats)
        found.append((rank_E[near], prediction_E[near], truth_E[near], iou_E[near]))
    rank, prediction, target, iou = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rank, prediction, target, iou


def _chunks(count: Integers) -> Iterator[slice]:
    """Cuts predictions with `count` pairs each into runs of about `_PAIRS_PER_CHUNK` pairs."""
    total = np.cumsum(count)
    start = 0
    while True:
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + _PAIRS_PER_CHUNK, side="right")))
        yield slice(start, stop)
        start = stop
        if start >= len(count):
            return


def _iou(prediction_E4: Floats, truth_E4: Floats, crowd_E: Booleans) -> Floats:
    """Intersection over union, operation by operation as `bbIou` in pycocotools' maskApi.c."""
    end_p, end_t = prediction_E4[:, :2] + prediction_E4[:, 2:], truth_E4[:, :2] + truth_E4[:, 2:]
    side_E2 = np.minimum(end_p, end_t) - np.maximum(prediction_E4[:, :2], truth_E4[:, :2])
    area_p = prediction_E4[:, 2] * prediction_E4[:, 3]
    area_t = truth_E4[:, 2] * truth_E4[:, 3]
    overlap_E = np.where((side_E2 > 0).all(axis=1), side_E2[:, 0] * side_E2[:, 1], 0.0)
    union_E = np.where(crowd_E, area_p, area_p + area_t - overlap_E)
    return np.divide(overlap_E, union_E, out=np.zeros_like(overlap_E), where=overlap_E > 0)
