"""Precision and recall of a split: by recall, by confidence, and the point of best F1.

All of it is computed from `Matches`, without matching again.

Array shapes are named by suffix: N detections, T IoU thresholds, R recall levels, K classes,
C confidence thresholds, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.metrics.domain import OperatingPoint
from services.metrics.inputs import Booleans, Floats, Integers
from services.metrics.matches import NUM_THRESHOLDS, Matches

RECALLS: Floats = np.linspace(0.0, 1.0, 101)
"""Recall levels at which precision is interpolated: COCO's recThrs."""
CONFIDENCES: Floats = np.arange(101) / 100
"""Confidence thresholds of a `ConfidenceCurve`."""
NUM_BINS = 20
"""Bins of a `Calibration`."""

Confidences = npt.NDArray[np.float32]


def interpolate(right_N: Booleans, wrong_N: Booleans, num_truths: int) -> Floats:
    """Returns the interpolated precision of one class at each of `RECALLS`.

    Interpolated as `COCOeval.accumulate` of pycocotools does, operation by operation: the precision
    at a recall level is the greatest at any recall from there on, and 0 beyond the greatest recall.

    Args:
        right_N: Which detections are right, most confident first.
        wrong_N: Which are wrong; one that is neither does not count.
        num_truths: Boxes there are to be found, at least 1.
    """
    num_right, num_wrong = np.cumsum(right_N, dtype=float), np.cumsum(wrong_N, dtype=float)
    precision_N = num_right / (num_wrong + num_right + np.spacing(1))
    precision_N = np.maximum.accumulate(precision_N[::-1])[::-1]
    position_R = np.searchsorted(num_right / num_truths, RECALLS, side="left")
    return np.append(precision_N, 0.0)[position_R]


def by_class(order_N: Integers, class_N: Integers, num_classes: int) -> list[Integers]:
    """Divides the detections among the classes, in the order in which they are given.

    Args:
        order_N: The detections in some order, such as most confident first.
        class_N: Class index of each, not in that order.
        num_classes: How many classes there are.
    """
    # NumPy sorts integers of 16 bits in linear time.
    sorted_N = order_N[
        np.argsort(class_N[order_N].astype(np.min_scalar_type(num_classes)), kind="stable")
    ]
    return np.split(sorted_N, np.searchsorted(class_N[sorted_N], np.arange(1, num_classes)))[
        :num_classes
    ]


def most_confident_first(confidence_N: Confidences) -> Integers:
    """Orders detections by falling confidence; equal ones stay in order."""
    return np.argsort(-confidence_N, kind="stable")


def count_truths(matches: Matches) -> Integers:
    """Counts the boxes of each class that are to be found."""
    return np.bincount(matches.class_M[~matches.crowd_M], minlength=len(matches.class_names))


def counted(matches: Matches, class_index: int | None = None) -> tuple[Confidences, Booleans, int]:
    """Returns what counts at IoU 0.5, of one class or of all pooled.

    Returns:
        Confidence of the detections that count, which of them are right, and how many boxes there
        are to be found.
    """
    counted_N, to_find_M = matches.counted_N, ~matches.crowd_M
    if class_index is not None:
        counted_N = counted_N & (matches.class_N == class_index)
        to_find_M = to_find_M & (matches.class_M == class_index)
    return (
        matches.confidence_N[counted_N],
        matches.truth_N[counted_N] >= 0,
        int(np.count_nonzero(to_find_M)),
    )


def precisions(matches: Matches) -> Floats:
    """Returns interpolated precision of shape (IoU thresholds, classes, recalls).

    It is NaN throughout in a class without ground truth.
    """
    truths_K = count_truths(matches)
    precision_TKR = np.full((NUM_THRESHOLDS, len(truths_K), len(RECALLS)), np.nan)
    order_N = most_confident_first(matches.confidence_N)
    groups = by_class(order_N, matches.class_N, len(truths_K))
    for k, detections in enumerate(groups):
        if not truths_K[k]:
            continue
        right, ignored = matches.right_N[detections], matches.ignored_N[detections]
        for t in range(NUM_THRESHOLDS):
            right_N, ignored_N = (right >> t) & 1 == 1, (ignored >> t) & 1 == 1
            precision_TKR[t, k] = interpolate(right_N, ~right_N & ~ignored_N, int(truths_K[k]))
    return precision_TKR


def best_f1(confidence_N: Confidences, right_N: Booleans, num_truths: int) -> OperatingPoint | None:
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
    order_N = most_confident_first(confidence_N)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfidenceCurve:
    """Precision, recall and F1 at each of `CONFIDENCES`, IoU 0.5.

    Attributes:
        precision_C: 1 where no detection is that confident.
        recall_C: Empty without ground truth.
        f1_C: Empty without ground truth.
        best_f1: Best of all confidences that occur; None without ground truth.
    """

    precision_C: Floats
    recall_C: Floats
    f1_C: Floats
    best_f1: OperatingPoint | None


def confidence_curve(
    confidence_N: Confidences, right_N: Booleans, num_truths: int
) -> ConfidenceCurve:
    """Computes what every threshold makes of some detections; arguments as of `best_f1`."""
    order_N = np.argsort(confidence_N, kind="stable")
    below_C = np.searchsorted(confidence_N[order_N], CONFIDENCES.astype(np.float32), side="left")
    kept_C = len(order_N) - below_C
    right_C = np.count_nonzero(right_N) - np.append(0, np.cumsum(right_N[order_N]))[below_C]
    nothing = np.empty(0)
    return ConfidenceCurve(
        precision_C=np.where(kept_C > 0, right_C / np.maximum(kept_C, 1), 1.0),
        recall_C=right_C / num_truths if num_truths else nothing,
        f1_C=2 * right_C / (kept_C + num_truths) if num_truths else nothing,
        best_f1=best_f1(confidence_N, right_N, num_truths),
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidences compared with how often detections of that confidence are right, at IoU 0.5.

    Guo et al., "On Calibration of Modern Neural Networks" (2017), equations 3 and 5. Bins have
    equal width; the last includes 1.

    Attributes:
        count_B: Detections in each bin.
        confidence_B: Mean of their confidences; 0 if there are none.
        precision_B: Share of them that is right; 0 if there are none.
    """

    count_B: Integers
    confidence_B: Floats
    precision_B: Floats

    @property
    def expected_error(self) -> float:
        """Mean of |mean confidence - precision| over the bins, weighted by their detections."""
        return float((self._gap_B * self.count_B).sum() / max(self.count_B.sum(), 1))

    @property
    def max_error(self) -> float:
        """Greatest |mean confidence - precision| of a bin that holds detections."""
        return float(self._gap_B.max())

    @property
    def _gap_B(self) -> Floats:
        return np.abs(self.confidence_B - self.precision_B)


def calibration(confidence_N: Confidences, right_N: Booleans) -> Calibration:
    """Compares the confidences of detections that count with how many are right."""
    edges = (np.arange(NUM_BINS) / NUM_BINS).astype(np.float32)
    bin_N = np.searchsorted(edges, confidence_N, side="right") - 1
    count_B = np.bincount(bin_N, minlength=NUM_BINS)
    some_B = np.maximum(count_B, 1)
    return Calibration(
        count_B,
        np.bincount(bin_N, weights=confidence_N, minlength=NUM_BINS) / some_B,
        np.bincount(bin_N, weights=right_N, minlength=NUM_BINS) / some_B,
    )
