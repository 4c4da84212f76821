"""What became of each detection and box, against pycocotools, hotcoco's TIDE and plain Python."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from detflow.errors import DataLoss
from services.metrics import matching
from services.metrics.domain import ErrorKind
from services.metrics.evaluate import evaluate
from services.metrics.matches import NUM_THRESHOLDS, Matches
from services.metrics.thresholds import count_errors
from tests.metrics_cases import (
    TIDE_NAMES,
    Case,
    cases,
    jittered,
    plain_iou,
    reference_rows,
    run_pycocotools,
    run_tide,
)
from tests.metrics_fakes import Row, ground_truth, parquet


def match(truth: dict[str, Any], rows: list[Row]) -> Matches:
    return evaluate(truth, parquet(rows))[1]


def as_pycocotools(truth: dict[str, Any], data: bytes) -> dict[str, Any]:
    """`Matches` as COCOeval's dtMatches, dtIgnore and gtMatches say it."""
    evaluation = run_pycocotools(truth, data)
    num_rows, boxes = len(reference_rows(data)), truth["annotations"]
    # Rows are in the order of `Matches`; boxes there are by image.
    order = sorted(range(len(boxes)), key=lambda n: boxes[n]["image_id"])
    place = {boxes[n]["id"]: m for m, n in enumerate(order)}
    right, ignored = [0] * num_rows, [(1 << NUM_THRESHOLDS) - 1] * num_rows
    truth_of, detection_of = [-1] * num_rows, [-1] * len(boxes)
    for one in evaluation.evalImgs:
        if one is None or one["aRng"] != evaluation.params.areaRng[0]:
            continue
        for d, row in enumerate(id_ - 1 for id_ in one["dtIds"]):
            bits = range(NUM_THRESHOLDS)
            ignored[row] = sum(1 << t for t in bits if one["dtIgnore"][t, d])
            is_right = (one["dtMatches"][:, d] > 0) & ~one["dtIgnore"][:, d].astype(bool)
            right[row] = sum(1 << t for t in bits if is_right[t])
            if is_right[0]:
                truth_of[row] = place[int(one["dtMatches"][0, d])]
                detection_of[truth_of[row]] = row
    return {
        "right_N": right,
        "ignored_N": ignored,
        "truth_N": truth_of,
        "detection_M": detection_of,
        "counted_N": [mask & 1 == 0 for mask in ignored],
    }


def assert_equal_to_pycocotools(truth: dict[str, Any], rows: list[Row]) -> None:
    data = parquet(rows)
    matches = evaluate(truth, data)[1]
    for name, expected in as_pycocotools(truth, data).items():
        assert getattr(matches, name).tolist() == expected, name


@settings(max_examples=100, deadline=None)
@given(cases())
def test_matches_at_every_iou_threshold_equal_pycocotools(case: Case) -> None:
    assert_equal_to_pycocotools(*case)


def test_only_the_100_most_confident_of_an_image_and_class_count() -> None:
    truth = ground_truth(2, 2, [(1, 0, [0, 0, 64, 64], 0), (1, 1, [0, 0, 64, 64], 0)])
    rng = np.random.default_rng(3)
    rows: list[Row] = [
        (1, int(k), float(confidence), 0, 0, 64, float(side))
        for k, confidence, side in zip(
            rng.integers(0, 2, 330),
            rng.integers(0, 9, 330) / 8,
            rng.integers(8, 64, 330),
            strict=True,
        )
    ]
    assert_equal_to_pycocotools(truth, rows)
    matches = match(truth, rows)
    assert np.bincount(matches.class_N[matches.counted_N]).tolist() == [100, 100]


def error_by_hand(matches: Matches, n: int) -> tuple[ErrorKind, int, float]:
    """Kind, box and IoU of a wrong detection, one after the other as the proto defines them."""
    x1, y1, x2, y2 = matches.box_N4[n].tolist()
    own: tuple[float, int] = (0.0, -1)
    other: tuple[float, int] = (0.0, -1)
    for m in range(len(matches.image_M)):
        if matches.image_M[m] != matches.image_N[n] or matches.crowd_M[m]:
            continue
        u1, v1, u2, v2 = matches.box_M4[m].tolist()
        iou = plain_iou([x1, y1, x2 - x1, y2 - y1], [u1, v1, u2 - u1, v2 - v1])
        if matches.class_M[m] == matches.class_N[n]:
            own = max(own, (iou, m), key=lambda one: one[0])
        else:
            other = max(other, (iou, m), key=lambda one: one[0])
    if 0.1 <= own[0] < 0.5:
        return ErrorKind.LOCALIZATION, own[1], own[0]
    if other[0] >= 0.5:
        return ErrorKind.CLASS, other[1], other[0]
    if own[0] >= 0.5:
        return ErrorKind.DUPLICATE, own[1], own[0]
    if other[0] < 0.1:
        most = other if other[0] > own[0] else own
        return ErrorKind.BACKGROUND, most[1] if most[0] > 0 else -1, most[0]
    return ErrorKind.BOTH, other[1], other[0]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_errors_of_wrong_detections_follow_their_definitions(case: Case) -> None:
    matches = match(*case)
    explained = [-1.0] * len(matches.image_M)
    for n in range(len(matches.image_N)):
        found = (matches.error_N[n], matches.overlap_N[n], matches.iou_N[n])
        if matches.truth_N[n] >= 0:
            assert found[:2] == (ErrorKind.NONE, matches.truth_N[n])
            assert found[2] >= 0.5
        elif not matches.counted_N[n]:
            assert found == (ErrorKind.NONE, -1, 0.0)
        else:
            kind, box, iou = error_by_hand(matches, n)
            assert found == (kind, box, np.float32(iou))
            if kind in (ErrorKind.CLASS, ErrorKind.LOCALIZATION):
                explained[box] = max(explained[box], float(matches.confidence_N[n]))
    assert matches.explained_M.tolist() == explained


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_errors_equal_hotcoco(seed: int) -> None:
    truth, rows = jittered(seed)
    expected = run_tide(truth, parquet(rows))["counts"]
    counts = count_errors(match(truth, rows), 0.0)
    assert min(counts.values()) > 0  # the case has some of every kind
    assert {TIDE_NAMES[kind]: count for kind, count in counts.items()} == expected


def test_memory_bound_of_comparing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, rows = jittered(7)
    whole = match(truth, rows).to_bytes()
    monkeypatch.setattr(matching, "_PAIRS_PER_CHUNK", 5)
    assert match(truth, rows).to_bytes() == whole


def test_matches_survive_being_stored_and_equal_ones_are_equal_bytes() -> None:
    truth, rows = jittered(1)
    matches = match(truth, rows)
    data = matches.to_bytes()
    again = Matches.from_bytes(data)
    for field in dataclasses.fields(Matches):
        before, after = getattr(matches, field.name), getattr(again, field.name)
        assert np.array_equal(before, after)
        assert getattr(before, "dtype", None) == getattr(after, "dtype", None)
    assert match(truth, rows).to_bytes() == data
    for damaged in (b"", data[:100], data[: len(data) // 2], b"PK" + data[2:50]):
        with pytest.raises(DataLoss) as caught:
            Matches.from_bytes(damaged)
        assert caught.value.reason == "BAD_MATCHES"


def test_paths_are_those_of_the_dataset() -> None:
    truth = ground_truth(2, 1, [])
    for image, path in zip(truth["images"], ("a/1.jpg", "b/2.jpg"), strict=True):
        image["source"] = {"path": path, "sha256": "", "augmentation": ""}
    truth["images"].reverse()
    matches = match(truth, [])
    assert matches.paths == ("a/1.jpg", "b/2.jpg")
    assert matches.id_I.tolist() == [1, 2]
    assert matches.size_I2.tolist() == [[640, 480]] * 2


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ((1, 0, 0.5, 0, 0, 40, 20), ErrorKind.DUPLICATE),  # IoU 0.5 with the box that is found
        ((1, 0, 0.5, 0, 0, 40, 4), ErrorKind.LOCALIZATION),  # IoU 0.1
        ((1, 1, 0.5, 0, 0, 40, 20), ErrorKind.CLASS),  # IoU 0.5 with a box of another class
        ((1, 1, 0.5, 0, 0, 40, 4), ErrorKind.BOTH),  # IoU 0.1
    ],
)
def test_iou_that_is_just_enough_is_enough(row: Row, kind: ErrorKind) -> None:
    truth = ground_truth(1, 2, [(1, 0, [0, 0, 40, 40], 0)])
    matches = match(truth, [(1, 0, 0.9, 0, 0, 40, 40), row])
    assert matches.error_N.tolist() == [ErrorKind.NONE, kind]
    assert matches.overlap_N.tolist() == [0, 0]
