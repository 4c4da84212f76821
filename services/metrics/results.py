"""The images of a split as a confidence threshold shows them: which of them, in which order.

Array shapes are named by suffix: I images, N detections, M ground-truth boxes, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.metrics import thresholds
from services.metrics.domain import ErrorKind
from services.metrics.inputs import Booleans
from services.metrics.matches import Matches


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which images are wanted; all of it must hold.

    Attributes:
        classes: Those with a box or a detection of one of these classes; empty means all.
        error_kinds: Those with an error of one of these kinds; empty means all.
        cell: Those behind this cell of the confusion matrix: class of the box, class of the
            detection, each a class index or `thresholds.BACKGROUND`; None means all.
    """

    classes: Sequence[int] = ()
    error_kinds: Sequence[ErrorKind] = ()
    cell: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """What a confidence threshold makes of a split, ready to be told image by image.

    Attributes:
        matches: What became of every detection and every box.
        threshold: The confidence threshold.
        kept_N: Detections of at least that confidence.
        right_N: Those that are right.
        wrong_N: Those that are wrong.
        found_M: Boxes that were found.
        lost_M: Boxes that were not.
        missed_M: Those of them that no other error explains.
        first_N: Position of each image's first detection, and behind the last; shape I + 1.
        first_M: Position of each image's first box, and behind the last; shape I + 1.
    """

    matches: Matches
    threshold: float
    kept_N: Booleans
    right_N: Booleans
    wrong_N: Booleans
    found_M: Booleans
    lost_M: Booleans
    missed_M: Booleans
    first_N: npt.NDArray[np.intp]
    first_M: npt.NDArray[np.intp]

    def detections(self, image: int) -> slice:
        """Returns where the kept detections of an image are: the most confident come first."""
        start, stop = self.first_N[image], self.first_N[image + 1]
        return slice(start, start + np.count_nonzero(self.kept_N[start:stop]))

    def truths(self, image: int) -> slice:
        """Returns where the boxes of an image are."""
        return slice(self.first_M[image], self.first_M[image + 1])


def at_threshold(matches: Matches, threshold: float) -> Outcomes:
    """Works out what a confidence threshold makes of a split."""
    images = np.arange(len(matches.paths) + 1)
    return Outcomes(
        matches=matches,
        threshold=threshold,
        kept_N=thresholds.kept_N(matches, threshold),
        right_N=thresholds.true_positives_N(matches, threshold),
        wrong_N=thresholds.false_positives_N(matches, threshold),
        found_M=thresholds.found_M(matches, threshold),
        lost_M=thresholds.false_negatives_M(matches, threshold),
        missed_M=thresholds.missed_M(matches, threshold),
        first_N=np.searchsorted(matches.image_N, images),
        first_M=np.searchsorted(matches.image_M, images),
    )


def choose(outcomes: Outcomes, wanted: Filter, *, worst_first: bool = True) -> npt.NDArray[np.intp]:
    """Finds the images that a filter lets pass.

    Args:
        outcomes: The split at a threshold.
        wanted: The filter.
        worst_first: Most false positives and false negatives first, of equals the one whose most
            confident false positive is more confident, then as in the split; else all as in the
            split.

    Returns:
        Positions among the images.
    """
    matches = outcomes.matches
    chosen_I = np.ones(len(matches.paths), np.bool_)
    if wanted.classes:
        shown_N = outcomes.kept_N & np.isin(matches.class_N, wanted.classes)
        has_class_I = _have(matches.image_N[shown_N], chosen_I)
        has_class_I |= _have(matches.image_M[np.isin(matches.class_M, wanted.classes)], chosen_I)
        chosen_I &= has_class_I
    if wanted.error_kinds:
        wrong_N = outcomes.wrong_N & np.isin(matches.error_N, [int(k) for k in wanted.error_kinds])
        has_error_I = _have(matches.image_N[wrong_N], chosen_I)
        if ErrorKind.MISSED in wanted.error_kinds:
            has_error_I |= _have(matches.image_M[outcomes.missed_M], chosen_I)
        chosen_I &= has_error_I
    if wanted.cell is not None:
        pairs = thresholds.confusion(matches, outcomes.threshold)
        actual, predicted = wanted.cell
        in_cell_P = (pairs.actual_P == actual) & (pairs.predicted_P == predicted)
        chosen_I &= _have(pairs.image_P[in_cell_P], chosen_I)
    chosen = np.flatnonzero(chosen_I)
    if not worst_first:
        return chosen
    image_W, num_images = matches.image_N[outcomes.wrong_N], len(chosen_I)
    num_errors_I = np.bincount(image_W, minlength=num_images)
    num_errors_I += np.bincount(matches.image_M[outcomes.lost_M], minlength=num_images)
    confidence_I = np.full(num_images, -1, np.float32)
    np.maximum.at(confidence_I, image_W, matches.confidence_N[outcomes.wrong_N])
    order = np.lexsort((chosen, -confidence_I[chosen], -num_errors_I[chosen]))
    return chosen[order]


def count_boxes(outcomes: Outcomes) -> npt.NDArray[np.intp]:
    """Counts the kept detections and the boxes of each of the I images."""
    kept = outcomes.matches.image_N[outcomes.kept_N]
    num_images = len(outcomes.matches.paths)
    return np.bincount(kept, minlength=num_images) + np.diff(outcomes.first_M)


def find_image(matches: Matches, image_id: int) -> int | None:
    """Returns the position of the image with an id, or None if there is none."""
    position = int(np.searchsorted(matches.id_I, image_id))
    is_there = position < len(matches.id_I) and matches.id_I[position] == image_id
    return position if is_there else None


def _have(images: npt.NDArray[np.int32], chosen_I: Booleans) -> Booleans:
    """Marks some images among all."""
    marked_I = np.zeros_like(chosen_I)
    marked_I[images] = True
    return marked_I
