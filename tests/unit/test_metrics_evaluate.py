"""The figures of services.metrics.evaluate against pycocotools, brute force and by hand."""

import dataclasses
import io
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings

from detflow.errors import DataLoss
from services.metrics import matching
from services.metrics.domain import Measurement, OperatingPoint
from services.metrics.evaluate import evaluate as evaluate_both
from tests.metrics_cases import Case, cases, plain_iou, reference_rows, run_pycocotools
from tests.metrics_fakes import Row, ground_truth, parquet


def evaluate(truth: dict[str, Any], data: bytes) -> Measurement:
    return evaluate_both(truth, data)[0]


def random_case(
    seed: int,
    *,
    num_images: int = 12,
    num_classes: int = 3,
    boxes_per_image: int = 6,
    extra_per_image: int = 8,
    crowd_share: float = 0.0,
    absent_classes: tuple[int, ...] = (),
    confidence_steps: int = 20,
) -> tuple[dict[str, Any], list[Row]]:
    """Boxes on a coarse grid and jittered copies: IoUs and confidences tie often."""
    rng = np.random.default_rng(seed)
    present = [k for k in range(num_classes) if k not in absent_classes]
    boxes: list[tuple[int, int, list[float], int]] = []
    rows: list[Row] = []
    for image in range(1, num_images + 1):
        for _ in range(int(rng.integers(0, boxes_per_image + 1))):
            x, y = (float(v) for v in rng.integers(0, 40, 2) * 8)
            w, h = (float(v) for v in 2.0 ** rng.integers(3, 8, 2))
            index = int(rng.choice(present))
            boxes.append((image, index, [x, y, w, h], int(rng.random() < crowd_share)))
            for _ in range(int(rng.integers(0, 4))):
                dx, dy, dw, dh = (float(v) for v in rng.integers(-2, 3, 4) * w / 16)
                confidence = float(rng.integers(1, confidence_steps + 1) / confidence_steps)
                wrong = rng.random() < 0.1
                rows.append(
                    (
                        image,
                        int(rng.integers(num_classes)) if wrong else index,
                        confidence,
                        x + dx,
                        y + dy,
                        x + dx + max(w + dw, 0.0),
                        y + dy + max(h + dh, 0.0),
                    )
                )
        for _ in range(int(rng.integers(0, extra_per_image + 1))):
            x, y, w, h = rng.random(4) * 200
            confidence = float(rng.integers(1, confidence_steps + 1) / confidence_steps)
            rows.append((image, int(rng.integers(num_classes)), confidence, x, y, x + w, y + h))
    return ground_truth(num_images, num_classes, boxes), rows


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one class": {"num_classes": 1},
    "a class without ground truth": {"num_classes": 4, "absent_classes": (1, 3)},
    "over 100 per image": {"num_images": 3, "num_classes": 1, "extra_per_image": 400},
    "crowd": {"crowd_share": 0.3},
    "many ties": {"confidence_steps": 2, "num_classes": 1},
    "crowded images": {"boxes_per_image": 40, "num_images": 5, "num_classes": 2},
}


def mean_of_known(values: Any) -> float:
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def assert_equal_to_pycocotools(measured: Measurement, reference: Any) -> None:
    assert list(dataclasses.astuple(measured.coco)) == reference.stats.tolist()
    precision, recall = reference.eval["precision"], reference.eval["recall"]
    for k, figures in enumerate(measured.classes):
        expected = {
            "ap50_95": precision[:, :, k, 0, 2],
            "ap50": precision[0, :, k, 0, 2],
            "ap75": precision[5, :, k, 0, 2],
            "ap_small": precision[:, :, k, 1, 2],
            "ap_medium": precision[:, :, k, 2, 2],
            "ap_large": precision[:, :, k, 3, 2],
            "ar_max100": recall[:, k, 0, 2],
        }
        for name, part in expected.items():
            assert getattr(figures, name) == mean_of_known(part), name


def best_f1_by_brute_force(truth: dict[str, Any], data: bytes) -> OperatingPoint | None:
    """Tries every threshold with a matching of its own, in plain Python."""
    rows = reference_rows(data)
    boxes = truth["annotations"]
    num_truths = sum(1 for box in boxes if not box["iscrowd"])
    if not num_truths:
        return None
    best = OperatingPoint(confidence_threshold=0.0, precision=0.0, recall=0.0, f1=-1.0)
    for threshold in sorted({row["score"] for row in rows}, reverse=True):
        right = wrong = 0
        for image in truth["images"]:
            for category in truth["categories"]:

                def here(item: dict[str, Any], i: Any = image, c: Any = category) -> bool:
                    return (item["image_id"], item["category_id"]) == (i["id"], c["id"])

                kept = [row for row in rows if here(row) and row["score"] >= threshold]
                kept = sorted(kept, key=lambda row: -row["score"])[:100]
                free = [box for box in boxes if here(box) and not box["iscrowd"]]
                crowds = [box for box in boxes if here(box) and box["iscrowd"]]
                for row in kept:
                    choice, choice_iou = None, 0.5
                    for box in free:
                        if (iou := plain_iou(row["bbox"], box["bbox"], False)) >= choice_iou:
                            choice, choice_iou = box, iou
                    if choice is not None:
                        free.remove(choice)
                        right += 1
                    elif not any(plain_iou(row["bbox"], c["bbox"], True) >= 0.5 for c in crowds):
                        wrong += 1
        f1 = 2 * right / (right + wrong + num_truths)
        if f1 > best.f1 and right + wrong:
            best = OperatingPoint(
                confidence_threshold=threshold,
                precision=right / (right + wrong),
                recall=right / num_truths,
                f1=f1,
            )
    return dataclasses.replace(best, f1=max(best.f1, 0.0))


def boxes_of(truth: dict[str, Any], index: int) -> list[dict[str, Any]]:
    return [box for box in truth["annotations"] if box["category_id"] == index + 1]


@pytest.mark.parametrize("case", [*CASES, "many classes"])
@pytest.mark.parametrize("seed", range(4))
def test_coco_figures_equal_pycocotools_bit_for_bit(case: str, seed: int) -> None:
    truth, rows = random_case(seed, **CASES.get(case, {"num_classes": 90}))
    data = parquet(rows)
    assert_equal_to_pycocotools(evaluate(truth, data), run_pycocotools(truth, data))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_best_f1_equals_brute_force(case: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, rows = random_case(seed, **{**CASES[case], "confidence_steps": 7})
    data = parquet(rows)
    expected = best_f1_by_brute_force(truth, data)
    measured = evaluate(truth, data)
    assert measured.best_f1 == expected
    for k, figures in enumerate(measured.classes):
        of_class = {**truth, "annotations": boxes_of(truth, k)}
        mine = parquet([row for row in rows if row[1] == k])
        assert figures.best_f1 == best_f1_by_brute_force(of_class, mine)
        assert figures.num_predictions == sum(row[1] == k for row in rows)
    monkeypatch.setattr(matching, "_PAIRS_PER_CHUNK", 10)
    assert evaluate(truth, data).best_f1 == expected


@settings(max_examples=100, deadline=None)
@given(cases())
def test_coco_figures_equal_pycocotools_whatever_the_boxes(case: Case) -> None:
    truth, rows = case
    data = parquet(rows)
    assert_equal_to_pycocotools(evaluate(truth, data), run_pycocotools(truth, data))


def test_no_predictions_give_zeros_and_equal_pycocotools() -> None:
    truth, _ = random_case(5, num_classes=3, absent_classes=(2,))
    measured = evaluate(truth, parquet([]))
    assert_equal_to_pycocotools(measured, run_pycocotools(truth, parquet([])))
    assert measured.coco.map50_95 == 0.0
    assert measured.classes[2].ap50 == -1.0
    assert measured.best_f1 == OperatingPoint(
        confidence_threshold=0.0, precision=0.0, recall=0.0, f1=0.0
    )
    assert measured.num_predictions == 0


@pytest.mark.parametrize("num_images", [0, 3])
def test_without_ground_truth_there_is_nothing_to_measure(num_images: int) -> None:
    truth = ground_truth(num_images, 2, [])
    rows: list[Row] = [(1, 0, 0.9, 0, 0, 10, 10)] if num_images else []
    measured = evaluate(truth, parquet(rows))
    assert set(dataclasses.astuple(measured.coco)) == {-1.0}
    assert {(c.ap50_95, c.ap50, c.num_ground_truths) for c in measured.classes} == {(-1.0, -1.0, 0)}
    assert measured.best_f1 is None
    assert (measured.num_images, measured.num_predictions) == (num_images, len(rows))


def test_hand_computed_example() -> None:
    # Two classes; class 0 has two boxes in two images, class 1 one box.
    truth = ground_truth(
        2,
        2,
        [(1, 0, [0, 0, 40, 40], 0), (2, 0, [0, 0, 40, 40], 0), (2, 1, [100, 100, 40, 40], 0)],
    )
    rows: list[Row] = [
        (1, 0, 0.75, 0, 0, 40, 40),  # exact: right at every IoU
        (2, 0, 0.5, 200, 200, 240, 240),  # nothing there
        (2, 1, 0.25, 100, 100, 140, 124),  # IoU 24/40 = 0.6: right at 0.50, 0.55, 0.60
    ]
    measured = evaluate(truth, parquet(rows))
    # Class 0 at each IoU: precision 1 up to recall 1/2, that is at 51 of the 101 recall levels.
    # Class 1: AP 1 at three of ten IoUs, at 0 of the others.
    assert measured.classes[0].ap50 == pytest.approx(51 / 101)
    assert measured.classes[0].ap50_95 == pytest.approx(51 / 101)
    assert measured.classes[1].ap50 == pytest.approx(1.0)
    assert measured.classes[1].ap50_95 == pytest.approx(0.3)
    assert measured.coco.map50 == pytest.approx((51 / 101 + 1) / 2)
    assert measured.coco.map75 == pytest.approx(51 / 101 / 2)
    assert measured.coco.ar_max100 == pytest.approx((0.5 + 0.3) / 2)
    assert measured.coco.map_small == -1.0
    # F1 at 0.75: 2/(1+3); at 0.5: 2/(2+3); at 0.25: 4/(3+3).
    assert measured.best_f1 is not None
    assert measured.best_f1.confidence_threshold == 0.25
    assert measured.best_f1.precision == pytest.approx(2 / 3)
    assert measured.best_f1.recall == pytest.approx(2 / 3)
    assert measured.best_f1.f1 == pytest.approx(2 / 3)
    assert (measured.num_images, measured.num_ground_truths, measured.num_predictions) == (2, 3, 3)
    assert [c.num_ground_truths for c in measured.classes] == [2, 1]


def test_threshold_takes_in_all_predictions_of_equal_confidence() -> None:
    truth = ground_truth(1, 1, [(1, 0, [0, 0, 10, 10], 0)])
    rows: list[Row] = [(1, 0, 0.5, 0, 0, 10, 10), (1, 0, 0.5, 50, 50, 60, 60)]
    best = evaluate(truth, parquet(rows)).best_f1
    assert best == OperatingPoint(confidence_threshold=0.5, precision=0.5, recall=1.0, f1=2 / 3)


def test_of_equal_f1_the_highest_threshold_wins() -> None:
    truth = ground_truth(1, 1, [(1, 0, [0, 0, 10, 10], 0)])
    rows: list[Row] = [(1, 0, 0.25, 50, 50, 60, 60), (1, 0, 0.75, 70, 70, 80, 80)]
    best = evaluate(truth, parquet(rows)).best_f1
    assert best == OperatingPoint(confidence_threshold=0.75, precision=0.0, recall=0.0, f1=0.0)


GOOD: Row = (1, 0, 0.5, 0, 0, 10, 10)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ((9, 0, 0.5, 0, 0, 10, 10), "image_id that is not in the split"),
        ((1, 7, 0.5, 0, 0, 10, 10), r"class_id outside 0\.\.0"),
        ((1, -1, 0.5, 0, 0, 10, 10), r"class_id outside 0\.\.0"),
        ((1, 0, float("nan"), 0, 0, 10, 10), r"confidence outside 0\.\.1"),
        ((1, 0, 1.5, 0, 0, 10, 10), r"confidence outside 0\.\.1"),
        ((1, 0, 0.5, float("inf"), 0, 10, 10), "not finite"),
        ((1, 0, 0.5, 20, 0, 10, 10), "x2 < x1"),
    ],
)
def test_bad_prediction_is_named_with_its_row(row: Row, fault: str) -> None:
    truth = ground_truth(1, 1, [(1, 0, [0, 0, 10, 10], 0)])
    with pytest.raises(DataLoss, match=f"{fault}.*row") as caught:
        evaluate(truth, parquet([GOOD, row]))
    assert caught.value.reason == "BAD_PREDICTIONS"


def test_what_is_no_parquet_is_rejected() -> None:
    truth = ground_truth(1, 1, [])
    other = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"image_id": [1]}), other)
    whole = parquet([GOOD])
    for data in (b"", b"PAR1 but not really PAR1", other.getvalue(), whole[: len(whole) // 2]):
        with pytest.raises(DataLoss) as caught:
            evaluate(truth, data)
        assert caught.value.reason == "BAD_PREDICTIONS"


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"images": [], "annotations": [{"id": 1}], "categories": []},
        {"images": [], "annotations": [], "categories": [{"id": 4, "name": "x"}]},
        {"images": 3, "annotations": [], "categories": []},
    ],
)
def test_what_is_no_coco_ground_truth_is_rejected(broken: dict[str, Any]) -> None:
    with pytest.raises(DataLoss) as caught:
        evaluate(broken, parquet([]))
    assert caught.value.reason == "BAD_GROUND_TRUTH"
