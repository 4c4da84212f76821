"""What each kind of error costs: the mAP50 that would be gained without it.

Follows Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (2020),
section 2.3. Unlike its reference implementation, tidecv, the repair of one kind does not look at
errors of another: where a CLASS and a LOCALIZATION error are about the same box, each is repaired
in its turn, and not only the more confident of the two.

Array shapes are named by suffix: N detections, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from services.metrics.curves import by_class, count_truths, interpolate, most_confident_first
from services.metrics.domain import ErrorKind
from services.metrics.inputs import Booleans, Integers
from services.metrics.matches import Matches
from services.metrics.thresholds import missed_M


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What mAP50 is computed from: detections, their order, and the boxes of each class."""

    order_N: Integers
    class_N: Integers
    right_N: Booleans
    wrong_N: Booleans
    truths_K: Integers


def gains(matches: Matches) -> dict[ErrorKind, float]:
    """Returns the mAP50, 0..1, that would be gained without each kind of error, one at a time.

    Of all detections, whatever their confidence. Repaired are:

    - CLASS: the detection gets the class of the box; LOCALIZATION: it gets its place. Then it is
      right, unless the box was found or a more confident error of the kind is about the same box:
      then it is left out.
    - BOTH, DUPLICATE, BACKGROUND: the detection is left out.
    - MISSED: the box is left out. A class without any other box is left out of the mean too; if
      none is left, nothing else is wrong and mAP50 would be 1.
    """
    actual = _Outcome(
        order_N=most_confident_first(matches.confidence_N),
        class_N=matches.class_N,
        right_N=matches.truth_N >= 0,
        wrong_N=matches.counted_N & (matches.truth_N < 0),
        truths_K=count_truths(matches),
    )
    if not actual.truths_K.any():
        return dict.fromkeys(_KINDS, 0.0)
    base = _map50(actual)
    return {kind: _map50(_repair(matches, actual, kind)) - base for kind in _KINDS}


_KINDS = tuple(kind for kind in ErrorKind if kind is not ErrorKind.NONE)


def _repair(matches: Matches, actual: _Outcome, kind: ErrorKind) -> _Outcome:
    if kind is ErrorKind.MISSED:
        missed_K = np.bincount(
            matches.class_M[missed_M(matches, 0.0)], minlength=len(actual.truths_K)
        )
        return replace(actual, truths_K=actual.truths_K - missed_K)
    affected_N = matches.error_N == kind
    outcome = replace(actual, wrong_N=actual.wrong_N & ~affected_N)
    if kind not in (ErrorKind.CLASS, ErrorKind.LOCALIZATION):
        return outcome
    repaired = _most_confident(matches, np.flatnonzero(affected_N))
    repaired = repaired[matches.detection_M[matches.overlap_N[repaired]] < 0]
    right_N, class_N = actual.right_N.copy(), actual.class_N.copy()
    right_N[repaired] = True
    class_N[repaired] = matches.class_M[matches.overlap_N[repaired]]
    return replace(outcome, right_N=right_N, class_N=class_N)


def _most_confident(matches: Matches, detections: Integers) -> Integers:
    """Picks the most confident of the detections about each box, of equals the first."""
    # Those of one image, and so of one box, are sorted by falling confidence.
    _, first = np.unique(matches.overlap_N[detections], return_index=True)
    return detections[first]


def _map50(outcome: _Outcome) -> float:
    """Mean over the classes with ground truth of AP at IoU 0.5."""
    groups = by_class(outcome.order_N, outcome.class_N, len(outcome.truths_K))
    found = [
        float(interpolate(outcome.right_N[group], outcome.wrong_N[group], num_truths).mean())
        for group, num_truths in zip(groups, outcome.truths_K.tolist(), strict=True)
        if num_truths
    ]
    return sum(found) / len(found) if found else 1.0
