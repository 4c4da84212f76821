"""Compares detections with the boxes of their image: which are right, and what the others are.

Right or not is decided as `COCOeval.evaluateImg` of pycocotools does, at each of its ten IoU
thresholds. What is wrong with a detection follows Bolya et al., "TIDE: A General Toolbox for
Identifying Object Detection Errors" (2020), in the order of its reference implementation, tidecv.

Array shapes are named by suffix: N detections, M ground-truth boxes, E pairs of the two, T IoU
thresholds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.metrics.domain import ErrorKind
from services.metrics.inputs import Booleans, Floats, Integers, Predicted, Truth
from services.metrics.matches import NUM_THRESHOLDS, Matches

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, NUM_THRESHOLDS)
"""IoU from which a detection is right: COCO's iouThrs."""
MATCH_IOU = 0.5
"""The first of them, at which errors are told apart: TIDE's foreground IoU."""
BACKGROUND_IOU = 0.1
"""IoU below which a detection is on nothing: TIDE's background IoU."""
MAX_DETECTIONS = 100
"""Detections per image and class that count, most confident first: COCO's maxDets."""

_PAIRS_PER_CHUNK = 1 << 18  # bounds the memory of comparing: about 50 MB


@dataclass(frozen=True, slots=True)
class Pairs:
    """Detections and boxes that overlap, sorted by detection, then by box unless said otherwise."""

    detection_E: Integers
    truth_E: Integers
    iou_E: Floats

    def where(self, chosen_E: Booleans | Integers) -> Pairs:
        """Picks pairs by a mask or by position."""
        return Pairs(self.detection_E[chosen_E], self.truth_E[chosen_E], self.iou_E[chosen_E])


def match(truth: Truth, predicted: Predicted) -> Matches:
    """Finds what became of every detection and every box of a split."""
    num_truths = len(truth.image_M)
    pairs = overlaps(
        predicted.image_N, predicted.box_N4, truth.image_M, truth.box_M4, truth.crowd_M
    )
    same_E = predicted.class_N[pairs.detection_E] == truth.class_M[pairs.truth_E]
    crowd_E = truth.crowd_M[pairs.truth_E]
    rank_N = _ranks(predicted, len(truth.class_names))
    taken_TN = _take_own(pairs.where(same_E), rank_N, truth.crowd_M)
    in_crowd_TN = np.append(truth.crowd_M, False)[taken_TN]  # -1, no box, is the last
    right_N = _bits((taken_TN >= 0) & ~in_crowd_TN)
    ignored_N = _bits(in_crowd_TN | (rank_N >= MAX_DETECTIONS))
    truth_N = np.where(in_crowd_TN[0], -1, taken_TN[0]).astype(np.int32)

    counted_N = (ignored_N & 1) == 0
    error_N, overlap_N, iou_N = _errors(
        pairs.where(same_E & ~crowd_E),
        pairs.where(~same_E & ~crowd_E),
        counted_N & (truth_N < 0),
    )
    found = np.flatnonzero(truth_N >= 0)
    overlap_N[found] = truth_N[found]
    iou_N[found] = _iou_of(pairs, found, truth_N[found], num_truths)
    detection_M = np.full(num_truths, -1, np.int32)
    detection_M[truth_N[found]] = found
    explained_M = np.full(num_truths, -1, np.float32)
    explains = np.flatnonzero(np.isin(error_N, (ErrorKind.CLASS, ErrorKind.LOCALIZATION)))
    np.maximum.at(explained_M, overlap_N[explains], predicted.confidence_N[explains])
    return Matches(
        class_names=truth.class_names,
        paths=truth.paths,
        id_I=truth.id_I.astype(np.int32),
        size_I2=truth.size_I2.astype(np.int32),
        image_N=predicted.image_N.astype(np.int32),
        class_N=predicted.class_N.astype(np.int32),
        confidence_N=predicted.confidence_N,
        box_N4=predicted.corner_N4,
        counted_N=counted_N,
        truth_N=truth_N,
        overlap_N=overlap_N,
        iou_N=iou_N,
        error_N=error_N,
        right_N=right_N,
        ignored_N=ignored_N,
        image_M=truth.image_M.astype(np.int32),
        class_M=truth.class_M.astype(np.int32),
        box_M4=np.concatenate(
            [truth.box_M4[:, :2], truth.box_M4[:, :2] + truth.box_M4[:, 2:]], axis=1
        ),
        crowd_M=truth.crowd_M,
        detection_M=detection_M,
        explained_M=explained_M,
    )


def _take_own(own: Pairs, rank_N: Integers, crowd_M: Booleans) -> npt.NDArray[np.int32]:
    """Finds the box that each detection takes at each IoU threshold, or -1; shape (T, N).

    In each image and class the detections, most confident first, equal ones in file order, the
    first 100, take the free box with the greatest IoU that is enough, of equals the last. Only if
    there is none they may fall into a crowd region, which is never used up; its IoU is the overlap
    divided by the detection's area.

    Args:
        own: Pairs of one class.
        rank_N: Place of each detection in its image and class.
        crowd_M: Which boxes are crowd regions.
    """
    near = own.where((own.iou_E >= MATCH_IOU) & (rank_N[own.detection_E] < MAX_DETECTIONS))
    rank_E = rank_N[near.detection_E]
    # Within a rank a detection's best box comes last: after crowds, then by IoU, then by position.
    order_E = np.lexsort(
        (near.truth_E, near.iou_E, ~crowd_M[near.truth_E], near.detection_E, rank_E)
    )
    near, rank_E = near.where(order_E), rank_E[order_E]
    taken_TN = np.empty((NUM_THRESHOLDS, len(rank_N)), np.int32)
    for t, threshold in enumerate(IOU_THRESHOLDS):
        enough_E = near.iou_E >= threshold
        taken_TN[t] = take(near.where(enough_E), rank_E[enough_E], crowd_M, len(rank_N))
    return taken_TN


def _bits(flag_TN: Booleans) -> npt.NDArray[np.uint16]:
    """Packs flags by IoU threshold: bit t of a detection is its flag at threshold t."""
    bits_N = np.zeros(flag_TN.shape[1], np.uint16)
    for t, flag_N in enumerate(flag_TN):
        bits_N |= flag_N.astype(np.uint16) << np.uint16(t)
    return bits_N


def _ranks(predicted: Predicted, num_classes: int) -> Integers:
    """Numbers the detections of each image and class, most confident first, from 0."""
    group_N = predicted.image_N * max(num_classes, 1) + predicted.class_N
    order_N = np.argsort(group_N, kind="stable")
    sorted_N = group_N[order_N]
    rank_N = np.empty(len(group_N), np.int64)
    rank_N[order_N] = np.arange(len(order_N)) - np.searchsorted(sorted_N, sorted_N)
    return rank_N


def take(
    near: Pairs, rank_E: Integers, crowd_M: Booleans, num_detections: int
) -> npt.NDArray[np.int32]:
    """Lets detections take boxes, the first rank first; each takes its last pair that is free.

    A crowd region is never used up.

    Args:
        near: Pairs, sorted by rank, then by detection, then by preference.
        rank_E: Rank of the detection; those of one rank have no box in common.
        crowd_M: Which boxes are crowd regions.
        num_detections: How many detections there are.

    Returns:
        The box that each of the N detections took, or -1.
    """
    taken_N = np.full(num_detections, -1, np.int32)
    free_M = np.ones(len(crowd_M), np.bool_)
    bounds = np.append(np.flatnonzero(np.diff(rank_E, prepend=-1)), len(rank_E))
    for start, stop in itertools.pairwise(bounds):
        free = free_M[near.truth_E[start:stop]]
        by, to = near.detection_E[start:stop][free], near.truth_E[start:stop][free]
        is_last = np.append(by[1:] != by[:-1], True)[: len(by)]
        by, to = by[is_last], to[is_last]
        taken_N[by] = to
        free_M[to] = crowd_M[to]
    return taken_N


def _errors(
    own: Pairs, other: Pairs, wrong_N: Booleans
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Says what is wrong with detections, which box that is about, and their IoU.

    With the greatest IoU with a box of the own class and of another, found or not, the first that
    holds: LOCALIZATION, 0.1 <= own < 0.5; CLASS, other >= 0.5; DUPLICATE, own >= 0.5, for then a
    more confident detection has found that box; BACKGROUND, both < 0.1; BOTH. Of a BACKGROUND it is
    the box that it overlaps most, if any.

    Args:
        own: Pairs with boxes of the detection's class that are no crowds.
        other: Pairs with boxes of other classes that are no crowds.
        wrong_N: Which detections are wrong.
    """
    own_N, own_iou_N = _best(own, len(wrong_N))
    other_N, other_iou_N = _best(other, len(wrong_N))
    first_that_holds = {
        ErrorKind.LOCALIZATION: (own_iou_N >= BACKGROUND_IOU) & (own_iou_N < MATCH_IOU),
        ErrorKind.CLASS: other_iou_N >= MATCH_IOU,
        ErrorKind.DUPLICATE: own_iou_N >= MATCH_IOU,
        ErrorKind.BACKGROUND: other_iou_N < BACKGROUND_IOU,
    }
    kinds = [int(kind) for kind in first_that_holds]
    error_N = np.select(list(first_that_holds.values()), kinds, int(ErrorKind.BOTH))
    about_other_N = np.isin(error_N, (ErrorKind.CLASS, ErrorKind.BOTH)) | (
        (error_N == ErrorKind.BACKGROUND) & (other_iou_N > own_iou_N)
    )
    overlap_N = np.where(about_other_N, other_N, own_N)
    iou_N = np.where(about_other_N, other_iou_N, own_iou_N)
    return (
        np.where(wrong_N, error_N, 0).astype(np.int8),
        np.where(wrong_N, overlap_N, -1).astype(np.int32),
        np.where(wrong_N, iou_N, 0.0).astype(np.float32),
    )


def _best(pairs: Pairs, num_detections: int) -> tuple[Integers, Floats]:
    """Finds the box with the greatest IoU of each detection, of equals the first; -1 and 0."""
    best_N = np.full(num_detections, -1, np.int64)
    iou_N = np.zeros(num_detections, np.float64)
    starts = np.flatnonzero(np.diff(pairs.detection_E, prepend=-1))
    if len(starts):
        iou_N[pairs.detection_E[starts]] = np.maximum.reduceat(pairs.iou_E, starts)
        is_best_E = pairs.iou_E == iou_N[pairs.detection_E]
        # Assigned from the last to the first, so that the first stays.
        best_N[pairs.detection_E[is_best_E][::-1]] = pairs.truth_E[is_best_E][::-1]
    return best_N, iou_N


def _iou_of(
    pairs: Pairs, detections: Integers, truths: npt.NDArray[np.int32], num_truths: int
) -> Floats:
    """Looks up the IoU of some pairs, each of which there is."""
    key_E = pairs.detection_E * num_truths + pairs.truth_E
    return pairs.iou_E[np.searchsorted(key_E, detections * num_truths + truths)]


def overlaps(
    image_N: Integers, box_N4: Floats, image_M: Integers, box_M4: Floats, crowd_M: Booleans
) -> Pairs:
    """Lists the detections and boxes of an image that overlap, whatever their classes.

    Args:
        image_N: Image of each detection, never decreasing.
        box_N4: Its x, y, width, height in pixels.
        image_M: Image of each box, never decreasing.
        box_M4: Its x, y, width, height in pixels.
        crowd_M: Whether it is a crowd region.
    """
    first_N = np.searchsorted(image_M, image_N, side="left")
    count_N = np.searchsorted(image_M, image_N, side="right") - first_N
    found = []
    for chunk in _chunks(count_N):
        repeats = count_N[chunk]
        detection_E = np.repeat(np.arange(chunk.start, chunk.stop), repeats)
        before_E = np.repeat(np.cumsum(repeats) - repeats, repeats)
        truth_E = np.arange(len(before_E)) - before_E + first_N[detection_E]
        iou_E = _iou(box_N4[detection_E], box_M4[truth_E], crowd_M[truth_E])
        found.append(Pairs(detection_E, truth_E, iou_E).where(iou_E > 0))
    return Pairs(
        np.concatenate([part.detection_E for part in found]),
        np.concatenate([part.truth_E for part in found]),
        np.concatenate([part.iou_E for part in found]),
    )


def _chunks(count_N: Integers) -> Iterator[slice]:
    """Cuts detections with `count_N` pairs each into runs of about `_PAIRS_PER_CHUNK` pairs."""
    total_N = np.cumsum(count_N)
    start = 0
    while True:
        done = total_N[start - 1] if start else 0
        stop = int(np.searchsorted(total_N, done + _PAIRS_PER_CHUNK, side="right"))
        stop = min(max(start + 1, stop), len(count_N))
        yield slice(start, stop)
        start = stop
        if start >= len(count_N):
            return


def _iou(detection_E4: Floats, truth_E4: Floats, crowd_E: Booleans) -> Floats:
    """Intersection over union, operation by operation as `bbIou` in pycocotools' maskApi.c."""
    end_d, end_t = detection_E4[:, :2] + detection_E4[:, 2:], truth_E4[:, :2] + truth_E4[:, 2:]
    side_E2 = np.minimum(end_d, end_t) - np.maximum(detection_E4[:, :2], truth_E4[:, :2])
    area_d = detection_E4[:, 2] * detection_E4[:, 3]
    area_t = truth_E4[:, 2] * truth_E4[:, 3]
    overlap_E = np.where((side_E2 > 0).all(axis=1), side_E2[:, 0] * side_E2[:, 1], 0.0)
    union_E = np.where(crowd_E, area_d, area_d + area_t - overlap_E)
    return np.divide(overlap_E, union_E, out=np.zeros_like(overlap_E), where=overlap_E > 0)
