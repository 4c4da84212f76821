"""What a confidence threshold makes of matches, and what each kind of error costs."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from services.metrics import thresholds
from services.metrics.curves import RECALLS
from services.metrics.domain import ErrorKind
from services.metrics.error_gains import gains
from services.metrics.evaluate import evaluate
from services.metrics.matches import Matches
from tests.metrics_cases import TIDE_NAMES, Case, cases, jittered, plain_iou, run_tide
from tests.metrics_fakes import Row, ground_truth, parquet

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


def match(truth: dict[str, Any], rows: list[Row]) -> Matches:
    return evaluate(truth, parquet(rows))[1]


def cells(matches: Matches, threshold: float) -> dict[tuple[int, int], int]:
    found = thresholds.confusion(matches, threshold)
    pairs = zip(found.actual_P.tolist(), found.predicted_P.tolist(), strict=True)
    counts: dict[tuple[int, int], int] = {}
    for pair in pairs:
        counts[pair] = counts.get(pair, 0) + 1
    return counts


def count(matches: Matches, threshold: float) -> list[list[int]]:
    counts = thresholds.count_classes(matches, threshold)
    return [
        counts.true_positives_K.tolist(),
        counts.false_positives_K.tolist(),
        counts.false_negatives_K.tolist(),
    ]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_threshold_is_as_if_the_detections_below_it_were_not_there(case: Case) -> None:
    truth, rows = case
    whole = match(truth, rows)
    for threshold in LEVELS:
        part = match(truth, [row for row in rows if row[2] >= threshold])
        assert count(whole, threshold) == count(part, 0.0)
        assert thresholds.count_errors(whole, threshold) == thresholds.count_errors(part, 0.0)
        assert cells(whole, threshold) == cells(part, 0.0)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_counts_errors_and_confusion_add_up(case: Case) -> None:
    matches = match(*case)
    for threshold in LEVELS:
        kept = thresholds.kept_N(matches, threshold)
        right = thresholds.true_positives_N(matches, threshold)
        wrong = thresholds.false_positives_N(matches, threshold)
        assert np.array_equal(right | wrong, kept & matches.counted_N)
        assert not (right & wrong).any()
        found, lost = (
            thresholds.found_M(matches, threshold),
            thresholds.false_negatives_M(matches, threshold),
        )
        assert np.array_equal(found | lost, ~matches.crowd_M)
        assert np.count_nonzero(found) == np.count_nonzero(right)
        assert not (thresholds.missed_M(matches, threshold) & ~lost).any()
        errors = thresholds.count_errors(matches, threshold)
        assert sum(errors.values()) - errors[ErrorKind.MISSED] == np.count_nonzero(wrong)

        pairs = thresholds.confusion(matches, threshold)
        detections, boxes = (one[one >= 0] for one in (pairs.detection_P, pairs.truth_P))
        assert sorted(detections) == np.flatnonzero(right | wrong).tolist()
        assert sorted(boxes) == np.flatnonzero(~matches.crowd_M).tolist()
        assert (pairs.image_P[pairs.truth_P >= 0] == matches.image_M[boxes]).all()
        assert (pairs.image_P[pairs.detection_P >= 0] == matches.image_N[detections]).all()
        on_diagonal = pairs.actual_P == pairs.predicted_P
        assert np.array_equal(np.sort(pairs.detection_P[on_diagonal]), np.flatnonzero(right))


def confused_by_hand(matches: Matches, threshold: float) -> set[tuple[int, int]]:
    """Pairs of a wrong detection and a box of another class, taken one after the other."""
    free = set(np.flatnonzero(thresholds.false_negatives_M(matches, threshold)).tolist())
    wrong = np.flatnonzero(thresholds.false_positives_N(matches, threshold)).tolist()
    taken = set()
    for n in wrong:  # by image, most confident first
        x1, y1, x2, y2 = matches.box_N4[n].tolist()
        best, most = -1, 0.0
        for m in sorted(free):
            u1, v1, u2, v2 = matches.box_M4[m].tolist()
            iou = plain_iou([x1, y1, x2 - x1, y2 - y1], [u1, v1, u2 - u1, v2 - v1])
            near = matches.image_M[m] == matches.image_N[n] and iou >= 0.5
            if near and matches.class_M[m] != matches.class_N[n] and iou > most:
                best, most = m, iou
        if best >= 0:
            free.remove(best)
            taken.add((n, best))
    return taken


@settings(max_examples=100, deadline=None)
@given(cases())
def test_wrong_detections_take_boxes_of_other_classes_as_defined(case: Case) -> None:
    matches = match(*case)
    for threshold in LEVELS:
        pairs = thresholds.confusion(matches, threshold)
        other = (pairs.actual_P != pairs.predicted_P) & (pairs.detection_P >= 0)
        other &= pairs.truth_P >= 0
        taken = zip(pairs.detection_P[other].tolist(), pairs.truth_P[other].tolist(), strict=True)
        assert set(taken) == confused_by_hand(matches, threshold)


def test_threshold_is_compared_as_the_float32_that_confidences_are() -> None:
    matches = match(ground_truth(1, 1, []), [(1, 0, 0.7, 0, 0, 9, 9)])
    assert thresholds.kept_N(matches, 0.7).tolist() == [True]  # float32(0.7) < 0.7
    assert thresholds.kept_N(matches, 0.70001).tolist() == [False]


def average_precision(
    detections: list[tuple[float, int, bool]], num_truths: int, class_index: int
) -> float:
    """AP of (confidence, class, is right), by the definition of interpolated precision."""
    mine = sorted((one for one in detections if one[1] == class_index), key=lambda one: -one[0])
    points = []
    for end in range(1, len(mine) + 1):
        right = sum(one[2] for one in mine[:end])
        points.append((right / num_truths, right / end))
    total = 0.0
    for level in RECALLS:
        total += max((p for r, p in points if r >= level), default=0.0)
    return total / len(RECALLS)


def gain_by_hand(matches: Matches, kind: ErrorKind) -> float:
    """Repairs one error after the other, as the paper says, and computes mAP50 anew."""
    num_truths = [
        int(np.count_nonzero((matches.class_M == k) & ~matches.crowd_M))
        for k in range(len(matches.class_names))
    ]

    def map50(detections: list[tuple[float, int, bool]], truths: list[int]) -> float:
        aps = [average_precision(detections, n, k) for k, n in enumerate(truths) if n]
        return sum(aps) / len(aps)

    actual, repaired = [], []
    taken: set[int] = set()
    for n in np.argsort(-matches.confidence_N, kind="stable").tolist():
        if not matches.counted_N[n]:
            continue
        confidence, index = float(matches.confidence_N[n]), int(matches.class_N[n])
        actual.append((confidence, index, bool(matches.truth_N[n] >= 0)))
        if matches.error_N[n] != kind:
            repaired.append(actual[-1])
        elif kind in (ErrorKind.CLASS, ErrorKind.LOCALIZATION):
            box = int(matches.overlap_N[n])
            if matches.detection_M[box] < 0 and box not in taken:
                taken.add(box)
                repaired.append((confidence, int(matches.class_M[box]), True))
    truths = list(num_truths)
    if kind is ErrorKind.MISSED:
        for box in np.flatnonzero(thresholds.missed_M(matches, 0.0)).tolist():
            truths[matches.class_M[box]] -= 1
    return map50(repaired, truths) - map50(actual, num_truths)


@pytest.mark.parametrize("seed", range(3))
def test_gains_are_those_of_repairing_error_after_error(seed: int) -> None:
    truth, rows = jittered(seed)
    matches = match(truth, rows)
    found = gains(matches)
    for kind, gain in found.items():
        assert gain == pytest.approx(gain_by_hand(matches, kind), abs=1e-12)
        assert gain >= 0
    assert max(found.values()) > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_gains_without_detections_that_hotcoco_also_leaves_out_are_equal(seed: int) -> None:
    # It repairs CLASS, LOCALIZATION and MISSED in other ways than the paper says.
    truth, rows = jittered(seed)
    found, expected = gains(match(truth, rows)), run_tide(truth, parquet(rows))["delta_ap"]
    for kind in (ErrorKind.BOTH, ErrorKind.DUPLICATE, ErrorKind.BACKGROUND):
        assert found[kind] == pytest.approx(expected[TIDE_NAMES[kind]], abs=1e-12)


def test_without_ground_truth_no_error_costs_anything() -> None:
    matches = match(ground_truth(1, 2, []), [(1, 0, 0.7, 0, 0, 9, 9)])
    assert set(gains(matches).values()) == {0.0}
