"""Curves against the arrays of pycocotools, plain Python and hotcoco's calibration."""

import math
from typing import Any

import hotcoco
import numpy as np
import pytest
from hypothesis import given, settings

from services.metrics import curves
from services.metrics.evaluate import evaluate
from services.metrics.matches import Matches
from tests.metrics_cases import Case, cases, jittered, reference_rows, run_pycocotools
from tests.metrics_fakes import Row, ground_truth, parquet


def match(truth: dict[str, Any], rows: list[Row]) -> Matches:
    return evaluate(truth, parquet(rows))[1]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_precision_by_recall_equals_pycocotools_bit_for_bit(case: Case) -> None:
    truth, rows = case
    found_TKR = curves.precisions(match(truth, rows))
    expected_TRK = run_pycocotools(truth, parquet(rows)).eval["precision"][:, :, :, 0, 2]
    assert np.array_equal(np.nan_to_num(found_TKR, nan=-1.0), expected_TRK.transpose(0, 2, 1))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_confidence_curves_are_what_each_threshold_makes_of_the_detections(case: Case) -> None:
    matches = match(*case)
    for class_index in (None, *range(len(matches.class_names))):
        confidence_N, right_N, num_truths = curves.counted(matches, class_index)
        curve = curves.confidence_curve(confidence_N, right_N, num_truths)
        for c in (0, 1, 25, 26, 50, 74, 75, 76, 99, 100):
            kept = [n for n, one in enumerate(confidence_N) if one >= np.float32(c / 100)]
            right = sum(right_N[n] for n in kept)
            assert curve.precision_C[c] == (right / len(kept) if kept else 1.0)
            if num_truths:
                assert curve.recall_C[c] == right / num_truths
                precision, recall = curve.precision_C[c], curve.recall_C[c]
                harmonic = 2 * precision * recall / (precision + recall) if right else 0.0
                assert curve.f1_C[c] == pytest.approx(harmonic)
        assert (curve.best_f1 is None) == (len(curve.recall_C) == 0) == (num_truths == 0)
        if curve.best_f1 and len(curve.f1_C):
            assert curve.best_f1.f1 >= curve.f1_C.max()


def test_calibration_equals_hotcoco() -> None:
    truth, rows = jittered(0)
    # No confidence of this case is on the edge of a bin.
    gt = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(gt, gt.load_res(reference_rows(parquet(rows))), "bbox")
    evaluation.evaluate()
    expected = evaluation.calibration(n_bins=curves.NUM_BINS, iou_threshold=0.5)
    confidence_N, right_N, _ = curves.counted(match(truth, rows))
    found = curves.calibration(confidence_N, right_N)
    assert found.expected_error == pytest.approx(expected["ece"])
    assert found.max_error == pytest.approx(expected["mce"])
    bins = expected["bins"]
    assert found.count_B.tolist() == [one["count"] for one in bins]
    assert found.confidence_B == pytest.approx([one["avg_confidence"] for one in bins])
    assert found.precision_B == pytest.approx([one["avg_accuracy"] for one in bins])


def test_confidence_on_an_edge_is_in_the_bin_above_and_1_in_the_last() -> None:
    edges = [n / curves.NUM_BINS for n in range(curves.NUM_BINS + 1)]
    rows: list[Row] = [(1, 0, edge, 0, 0, 9, 9) for edge in edges]
    confidence_N, right_N, _ = curves.counted(match(ground_truth(1, 1, []), rows))
    assert curves.calibration(confidence_N, right_N).count_B.tolist() == [1] * 19 + [2]


def test_nothing_to_calibrate_has_no_error() -> None:
    found = curves.calibration(np.empty(0, np.float32), np.empty(0, np.bool_))
    assert (found.expected_error, found.max_error) == (0.0, 0.0)
    assert not any(math.isnan(one) for one in found.precision_B)
