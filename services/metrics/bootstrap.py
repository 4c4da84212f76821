"""How far figures differ by chance: a paired bootstrap over the images of a split.

B. Efron, R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 and 13. A resample
draws as many images as the split has, with replacement, the same for every training. Its figures
are those of the data set in which each image stands as often as it was drawn; they are computed
from the matches of the split with these counts as weights, without matching again, because what a
detection is depends on its image alone.

Array shapes are named by suffix: I images, K classes, T IoU thresholds, R resamples, and of one
class N detections, P right detections, M ground-truth boxes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.metrics.matches import NUM_THRESHOLDS, Matches
from services.metrics.thresholds import false_positives_N, true_positives_N

FIGURES = ("map50_95", "map50", "map75", "precision", "recall", "f1")
"""What is resampled, besides AP50-95 of each class; the last three at a fixed confidence."""

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[np.uint8]
_Positions = npt.NDArray[np.intp]

_IOU50, _IOU75 = 0, 5
_RECALL_LEVELS = np.linspace(0.0, 1.0, 101)  # as COCOeval has them, to the last bit
_MAX_RESAMPLES_AT_ONCE = 128
_MAX_WEIGHT_BYTES = 16 << 20
_CELLS_AT_ONCE = 1 << 16  # of one class; keeps its arrays in the processor's cache


@dataclass(frozen=True, slots=True)
class Resampled:
    """Figures of one training in each resample, 0..1; NaN where there was nothing to measure.

    Attributes:
        figures: R values of each of `FIGURES`.
        ap_RK: AP50-95 of each class.
    """

    figures: dict[str, Floats]
    ap_RK: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Ranking:
    """Detections of a class that count at the same IoU thresholds, most confident first.

    Attributes:
        image_N: Image of each.
        right: IoU threshold, and the positions among the N that are right at it.
    """

    image_N: _Positions
    right: tuple[tuple[int, _Positions], ...]


@dataclass(frozen=True, slots=True)
class _Class:
    image_M: _Positions  # image of each ground-truth box
    rankings: tuple[_Ranking, ...]  # together they hold all T thresholds


class ImageCounts:
    """How many detections of each image are right at a confidence threshold.

    Attributes:
        right_I: Kept detections that are right.
        kept_I: Kept detections that count.
        truths_I: Ground-truth boxes.
    """

    def __init__(self, matches: Matches, threshold: float) -> None:
        def count(image: npt.NDArray[np.int32]) -> Floats:
            return np.bincount(image, minlength=len(matches.id_I)).astype(np.float64)

        is_right_N = true_positives_N(matches, threshold)
        is_kept_N = is_right_N | false_positives_N(matches, threshold)
        self.right_I = count(matches.image_N[is_right_N])
        self.kept_I = count(matches.image_N[is_kept_N])
        self.truths_I = count(matches.image_M[~matches.crowd_M])

    def f1(self) -> Floats:
        """Returns F1 of each image; 1 where there is nothing to find and nothing was found."""
        both_I = self.kept_I + self.truths_I
        return np.where(both_I > 0, 2 * self.right_I / np.maximum(both_I, 1), 1.0)

    def rates(self, weight_RI: Weights) -> Floats:
        """Returns precision, recall and F1 of resamples, shape (R, 3); NaN without any boxes."""
        right_R, kept_R, truths_R = (
            np.einsum("ri,i->r", weight_RI, counts_I)
            for counts_I in (self.right_I, self.kept_I, self.truths_I)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            precision_R = np.where(kept_R > 0, right_R / kept_R, 0.0)
            recall_R, f1_R = right_R / truths_R, 2 * right_R / (kept_R + truths_R)
        f1_R[truths_R == 0] = precision_R[truths_R == 0] = np.nan
        return np.stack([precision_R, recall_R, f1_R], axis=1)


class Side:
    """One training of a comparison, prepared to be measured on any number of resamples.

    Args:
        matches: What became of its detections.
        threshold: Confidence from which detections count for precision, recall and F1.
    """

    def __init__(self, matches: Matches, threshold: float) -> None:
        self.num_images = len(matches.id_I)
        self.counts = ImageCounts(matches, threshold)
        self._classes = [_prepare(matches, k) for k in range(len(matches.class_names))]

    def measure(
        self, weight_RI: Weights, cancelled: threading.Event | None = None
    ) -> tuple[Floats, Floats]:
        """Measures resamples, each given by how often every image was drawn.

        Returns:
            The `FIGURES`, shape (R, 6), and AP50-95 of each class, shape (R, K); NaN where there
            is no ground truth. Where `cancelled` is set meanwhile, anything.
        """
        ap_RKT = np.full((len(weight_RI), len(self._classes), NUM_THRESHOLDS), np.nan)
        for k, of_class in enumerate(self._classes):
            if cancelled is not None and cancelled.is_set():
                break
            _fill_average_precision(ap_RKT[:, k], of_class, weight_RI)
        rates_R3 = self.counts.rates(weight_RI)
        measured_RK = ~np.isnan(ap_RKT[:, :, 0])
        num_measured_R = np.where(measured_RK.any(axis=1), measured_RK.sum(axis=1), np.nan)
        ap_RT = np.where(measured_RK[..., None], ap_RKT, 0.0).sum(axis=1) / num_measured_R[:, None]
        map_R3 = np.stack([ap_RT.mean(axis=1), ap_RT[:, _IOU50], ap_RT[:, _IOU75]], axis=1)
        return np.concatenate([map_R3, rates_R3], axis=1), ap_RKT.mean(axis=2)


def resample(
    sides: Sequence[Side],
    *,
    num_resamples: int,
    seed: int,
    cancelled: threading.Event | None = None,
) -> list[Resampled]:
    """Measures trainings on the same resamples of their images.

    The draws depend on the seed and the number of images alone. Memory is bounded whatever the
    number of resamples, but for the result: 4 bytes for each resample, class and training.

    Args:
        sides: Trainings measured on the same images.
        num_resamples: How many.
        seed: Any integer.
        cancelled: Ends it soon once set; the result is then of no use.
    """
    num_images, num_classes = sides[0].num_images, len(sides[0]._classes)
    figures = np.full((len(sides), num_resamples, len(FIGURES)), np.nan)
    ap = np.full((len(sides), num_resamples, num_classes), np.nan, np.float32)

    size = min(_MAX_RESAMPLES_AT_ONCE, 1 + _MAX_WEIGHT_BYTES // max(1, num_images))
    for start in range(0, num_resamples, size):
        numbers = range(start, min(start + size, num_resamples))
        weight_RI = np.stack([draw(num_images, seed, number) for number in numbers])
        rows = slice(numbers.start, numbers.stop)
        for s, side in enumerate(sides):
            figures[s, rows], ap[s, rows] = side.measure(weight_RI, cancelled)
        if cancelled is not None and cancelled.is_set():
            break
    return [
        Resampled(dict(zip(FIGURES, figures[s].T, strict=True)), ap[s]) for s in range(len(sides))
    ]


def draw(num_images: int, seed: int, number: int) -> Weights:
    """Draws a resample: how often it has each image.

    Args:
        num_images: Images of the split.
        seed: Any integer.
        number: Which of the seed's resamples, from 0.
    """
    # More than 255 of one image in as many draws as there are images do not happen: 1e-500.
    random = np.random.default_rng([seed & (1 << 64) - 1, number])
    drawn = random.integers(0, max(1, num_images), num_images)
    return np.bincount(drawn, minlength=num_images).astype(np.uint8)


def _prepare(matches: Matches, k: int) -> _Class:
    """Ranks the detections of a class, as `COCOeval.accumulate` does."""
    of_class_N = np.flatnonzero(matches.class_N == k)
    order_N = np.argsort(-matches.confidence_N[of_class_N], kind="stable")
    ranked_N = of_class_N[order_N]
    ignored_N, right_N = matches.ignored_N[ranked_N], matches.right_N[ranked_N]
    by_counted: dict[bytes, tuple[Any, list[int]]] = {}
    for threshold in range(NUM_THRESHOLDS):
        counted_N = ignored_N >> threshold & 1 == 0
        by_counted.setdefault(counted_N.tobytes(), (counted_N, []))[1].append(threshold)
    return _Class(
        image_M=matches.image_M[(matches.class_M == k) & ~matches.crowd_M].astype(np.intp),
        rankings=tuple(
            _Ranking(
                image_N=matches.image_N[ranked_N[counted_N]].astype(np.intp),
                right=tuple((t, np.flatnonzero(right_N[counted_N] >> t & 1)) for t in thresholds),
            )
            for counted_N, thresholds in by_counted.values()
        ),
    )


def _fill_average_precision(ap_RT: Floats, of_class: _Class, weight_RI: Weights) -> None:
    """Writes COCO's 101-point AP of one class, where a resample has ground truth of it."""
    num_truths_R = weight_RI[:, of_class.image_M].sum(axis=1, dtype=np.intp)
    size = max(1, _CELLS_AT_ONCE // (1 + max(len(r.image_N) for r in of_class.rankings)))
    drawn = np.flatnonzero(num_truths_R)
    for rows in np.split(drawn, range(size, len(drawn), size)):
        if not len(rows):
            return
        levels, drawn_RI = _Levels(num_truths_R[rows]), weight_RI[rows]
        for ranking in of_class.rankings:
            weight_RN = drawn_RI[:, ranking.image_N].astype(np.int32)
            num_counted_RN = np.maximum(np.cumsum(weight_RN, axis=1, dtype=np.int32), 1)
            for threshold, position_P in ranking.right:
                ap_RT[rows, threshold] = _average_precision(
                    np.cumsum(weight_RN[:, position_P], axis=1, dtype=np.int32),
                    num_counted_RN[:, position_P],
                    levels,
                )


class _Levels:
    """How many of the 101 recall levels are reached when so many boxes are found."""

    def __init__(self, num_truths_R: _Positions) -> None:
        found_F = np.arange(num_truths_R.max() + 1)
        recall_RF = np.minimum(found_F / num_truths_R[:, None], 1.0)
        level_RF = (recall_RF * 100 + 1e-9).astype(np.intp)  # the last one reached, or the next
        level_RF += _RECALL_LEVELS[level_RF] <= recall_RF
        self._table = level_RF.astype(np.uint8).ravel()
        self._first_R1 = np.arange(len(num_truths_R))[:, None] * len(found_F)

    def reached(self, num_found_RP: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        level_RP: npt.NDArray[np.uint8] = self._table[num_found_RP + self._first_R1]
        return level_RP


def _average_precision(
    num_right_RP: npt.NDArray[np.int32], num_counted_RP: npt.NDArray[np.int32], levels: _Levels
) -> Floats:
    """Averages the precision at 101 recall levels, of several resamples at once.

    Precision is greatest where a detection is right, so only these P positions matter: at each,
    `num_right_RP` of the first `num_counted_RP` detections are right.
    """
    if not num_right_RP.shape[1]:
        return np.zeros(len(num_right_RP))
    precision_RP = num_right_RP / num_counted_RP
    # Floats that are not negative are in the order of their bits, and those are compared faster.
    bits_RP = precision_RP.view(np.int64)[:, ::-1]
    best_RP = np.maximum.accumulate(bits_RP, axis=1)[:, ::-1].view(np.float64)
    reached_RP = levels.reached(num_right_RP)
    newly_RP = reached_RP[:, 1:] - reached_RP[:, :-1]
    total_R: Floats = np.einsum("rp,rp->r", newly_RP, best_RP[:, 1:])
    return (total_R + reached_RP[:, 0] * best_RP[:, 0]) / len(_RECALL_LEVELS)
