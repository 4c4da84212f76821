"""What a confidence threshold makes of a split's matches: right, wrong, not found, confused.

Whatever counts, lists or shows detections at a threshold takes it from here, so that a count always
equals the length of its list. A detection of exactly the threshold is kept; confidences are
float32, so the threshold is compared as float32.

Array shapes are named by suffix: N detections, M ground-truth boxes, K classes, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detflow.boxes import to_xywh
from services.metrics.domain import ErrorKind
from services.metrics.inputs import Booleans, Integers
from services.metrics.matches import Matches
from services.metrics.matching import MATCH_IOU, overlaps, take

BACKGROUND = -1
"""Class index that stands for no box, or for no detection."""


def kept_N(matches: Matches, threshold: float) -> Booleans:
    """Which detections are at least that confident, those that do not count included."""
    return matches.confidence_N >= np.float32(threshold)


def true_positives_N(matches: Matches, threshold: float) -> Booleans:
    """Which detections are kept and right."""
    return kept_N(matches, threshold) & (matches.truth_N >= 0)


def false_positives_N(matches: Matches, threshold: float) -> Booleans:
    """Which detections are kept, count and are wrong."""
    return kept_N(matches, threshold) & matches.counted_N & (matches.truth_N < 0)


def errors_N(matches: Matches, threshold: float) -> npt.NDArray[np.int8]:
    """The `ErrorKind` of each false positive, 0 of other detections."""
    return np.where(false_positives_N(matches, threshold), matches.error_N, np.int8(0))


def found_M(matches: Matches, threshold: float) -> Booleans:
    """Which boxes a kept detection is right about."""
    is_found_M = matches.detection_M >= 0
    is_found_M[is_found_M] = kept_N(matches, threshold)[matches.detection_M[is_found_M]]
    return is_found_M


def false_negatives_M(matches: Matches, threshold: float) -> Booleans:
    """Which boxes should be found and are not; crowd regions are none."""
    return ~matches.crowd_M & ~found_M(matches, threshold)


def missed_M(matches: Matches, threshold: float) -> Booleans:
    """Which false negatives no kept detection's CLASS or LOCALIZATION error explains."""
    is_explained_M = (matches.explained_M >= 0) & (matches.explained_M >= np.float32(threshold))
    return false_negatives_M(matches, threshold) & ~is_explained_M


def count_errors(matches: Matches, threshold: float) -> dict[ErrorKind, int]:
    """Counts each kind of error."""
    counts = np.bincount(errors_N(matches, threshold), minlength=len(ErrorKind))
    errors: dict[ErrorKind, int] = {
        kind: int(counts[kind]) for kind in ErrorKind if kind is not ErrorKind.NONE
    }
    errors[ErrorKind.MISSED] = int(np.count_nonzero(missed_M(matches, threshold)))
    return errors


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """True positives, false positives and false negatives of each class."""

    true_positives_K: Integers
    false_positives_K: Integers
    false_negatives_K: Integers


def count_classes(matches: Matches, threshold: float) -> ClassCounts:
    """Counts what is right, wrong and not found of each class."""

    def count(classes: npt.NDArray[np.int32]) -> Integers:
        return np.bincount(classes, minlength=len(matches.class_names))

    return ClassCounts(
        count(matches.class_N[true_positives_N(matches, threshold)]),
        count(matches.class_N[false_positives_N(matches, threshold)]),
        count(matches.class_M[false_negatives_M(matches, threshold)]),
    )


@dataclass(frozen=True, slots=True)
class Confusion:
    """What the confusion matrix counts: one pair for each detection or box, or one for two.

    Attributes:
        image_P: Image: its position among the images.
        actual_P: Class of the box; BACKGROUND if the detection is on none.
        predicted_P: Class of the detection; BACKGROUND if none is on the box.
        detection_P: The detection, or -1.
        truth_P: The box, or -1.
    """

    image_P: npt.NDArray[np.int32]
    actual_P: npt.NDArray[np.int32]
    predicted_P: npt.NDArray[np.int32]
    detection_P: npt.NDArray[np.int32]
    truth_P: npt.NDArray[np.int32]


def confusion(matches: Matches, threshold: float) -> Confusion:
    """Says which class was taken for which at a confidence threshold.

    A right detection and its box are one pair, of the same class. Then the wrong detections of each
    image, most confident first, take the box of another class that is still free and with which
    their IoU is greatest and at least 0.5, of equals the first: a pair of two classes. What is left
    is paired with the background: wrong detections, and boxes that were not found. Detections that
    do not count and crowd regions are in no pair, so the pairs of a predicted class are its true
    and false positives, and those of an actual class its boxes.
    """
    wrong = np.flatnonzero(false_positives_N(matches, threshold))
    free_M = false_negatives_M(matches, threshold)
    taken_N = np.where(true_positives_N(matches, threshold), matches.truth_N, -1)
    taken_N[wrong] = _take_others(matches, wrong, free_M)
    free_M[taken_N[wrong][taken_N[wrong] >= 0]] = False
    detections = np.flatnonzero(taken_N >= 0)
    alone = wrong[taken_N[wrong] < 0]
    truths = np.flatnonzero(free_M)
    none_D, none_M = np.full(len(alone), -1), np.full(len(truths), -1)

    def column(*parts: npt.NDArray[np.signedinteger]) -> npt.NDArray[np.int32]:
        return np.concatenate(parts).astype(np.int32)

    return Confusion(
        column(matches.image_N[detections], matches.image_N[alone], matches.image_M[truths]),
        column(matches.class_M[taken_N[detections]], none_D, matches.class_M[truths]),
        column(matches.class_N[detections], matches.class_N[alone], none_M),
        column(detections, alone, none_M),
        column(taken_N[detections], none_D, truths),
    )


def _take_others(matches: Matches, wrong: Integers, free_M: Booleans) -> npt.NDArray[np.int32]:
    """Finds the box of another class that each of some wrong detections takes, or -1."""
    boxes = np.flatnonzero(free_M)
    image_W = matches.image_N[wrong]
    pairs = overlaps(
        image_W,
        to_xywh(matches.box_N4[wrong].astype(np.float64)),
        matches.image_M[boxes],
        to_xywh(matches.box_M4[boxes]),
        np.zeros(len(boxes), np.bool_),
    )
    class_E, actual_E = matches.class_N[wrong][pairs.detection_E], matches.class_M[boxes]
    pairs = pairs.where((class_E != actual_E[pairs.truth_E]) & (pairs.iou_E >= MATCH_IOU))
    # They are sorted by image, then by confidence: their rank is their place in the image.
    rank_E = pairs.detection_E - np.searchsorted(image_W, image_W[pairs.detection_E])
    order_E = np.lexsort((-pairs.truth_E, pairs.iou_E, pairs.detection_E, rank_E))
    taken_W = take(
        pairs.where(order_E), rank_E[order_E], np.zeros(len(boxes), np.bool_), len(wrong)
    )
    taken_W[taken_W >= 0] = boxes[taken_W[taken_W >= 0]]
    return taken_W
