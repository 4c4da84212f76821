"""Figures of resamples against those of data sets in which images really stand several times."""

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

from services.metrics import bootstrap
from services.metrics.domain import Measurement
from services.metrics.evaluate import evaluate
from services.metrics.matches import Matches
from services.metrics.thresholds import count_classes
from tests.metrics_fakes import Row, ground_truth, parquet

NUM_IMAGES, NUM_CLASSES = 12, 4


def make(seed: int, jitter: float = 0.12) -> tuple[dict[str, Any], list[Row]]:
    """Images with boxes, some of them crowds, and detections near them or anywhere.

    Class 3 has ground truth in one image alone. Confidences are all different: equal ones would
    stand in another order where an image stands twice.
    """
    random = np.random.default_rng(seed)
    truths, rows = [], []
    for image in range(1, NUM_IMAGES + 1):
        for _ in range(int(random.integers(0, 6))):
            index = 3 if image == 2 else int(random.integers(0, 3))
            box = [*random.uniform(0, 400, 2).tolist(), *random.uniform(20, 80, 2).tolist()]
            truths.append((image, index, box, int(random.random() < 0.1)))
            for _ in range(int(random.integers(0, 4))):
                x, y, w, h = np.array(box) + random.normal(0, jitter, 4) * box[2]
                rows.append((image, index, 0.0, x, y, x + abs(w), y + abs(h)))
        for _ in range(int(random.integers(0, 3))):
            x, y = random.uniform(0, 400, 2)
            rows.append((image, int(random.integers(0, 4)), 0.0, x, y, x + 50, y + 50))
    confidences = random.permutation(len(rows)) / len(rows)
    rows = [(*row[:2], float(c), *row[3:]) for row, c in zip(rows, confidences, strict=True)]
    return ground_truth(NUM_IMAGES, NUM_CLASSES, truths), rows


def replicate(
    truth: dict[str, Any], rows: list[Row], weight_I: np.ndarray[Any, Any]
) -> tuple[dict[str, Any], list[Row]]:
    """Makes the data set in which each image stands as often as it was drawn."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    predicted: list[Row] = []
    for image, times in enumerate(weight_I.tolist(), start=1):
        for _ in range(times):
            images.append({**truth["images"][image - 1], "id": len(images) + 1})
            annotations += [
                {**one, "image_id": len(images)}
                for one in truth["annotations"]
                if one["image_id"] == image
            ]
            predicted += [(len(images), *row[1:]) for row in rows if row[0] == image]
    annotations = [{**one, "id": n} for n, one in enumerate(annotations, start=1)]
    return {**truth, "images": images, "annotations": annotations}, predicted


def figures_of(measurement: Measurement, matches: Matches, threshold: float) -> list[float]:
    counts = count_classes(matches, threshold)
    right, wrong, missed = (
        int(getattr(counts, field.name).sum()) for field in dataclasses.fields(counts)
    )
    coco = measurement.coco
    return [
        coco.map50_95,
        coco.map50,
        coco.map75,
        right / max(right + wrong, 1),
        right / (right + missed),
        2 * right / (2 * right + wrong + missed),
    ]


def nan_to_minus_one(values: np.ndarray[Any, Any]) -> list[float]:
    numbers: list[float] = np.where(np.isnan(values), -1.0, values).tolist()
    return numbers


@pytest.mark.parametrize("seed", range(4))
def test_every_image_once_gives_the_figures_of_the_evaluation(seed: int) -> None:
    truth, rows = make(seed)
    measurement, matches = evaluate(truth, parquet(rows))
    assert measurement.best_f1 is not None
    side = bootstrap.Side(matches, measurement.best_f1.confidence_threshold)
    figure_RF, ap_RK = side.measure(np.ones((1, NUM_IMAGES), np.uint8))
    best, coco = measurement.best_f1, measurement.coco
    expected = [coco.map50_95, coco.map50, coco.map75, best.precision, best.recall, best.f1]
    assert figure_RF[0] == pytest.approx(expected, rel=0, abs=1e-12)
    expected = [one.ap50_95 for one in measurement.classes]
    assert nan_to_minus_one(ap_RK[0]) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_resamples_have_the_figures_of_the_replicated_data_set(seed: int) -> None:
    truth, rows = make(seed)
    _, matches = evaluate(truth, parquet(rows))
    weight_RI = np.stack([bootstrap.draw(NUM_IMAGES, seed, number) for number in range(12)])
    figure_RF, ap_RK = bootstrap.Side(matches, 0.3).measure(weight_RI)
    for weight_I, figure_F, ap_K in zip(weight_RI, figure_RF, ap_RK, strict=True):
        again, again_matches = evaluate(*_stored(replicate(truth, rows, weight_I)))
        expected = figures_of(again, again_matches, 0.3)
        assert figure_F == pytest.approx(expected, rel=0, abs=1e-9)
        expected = [one.ap50_95 for one in again.classes]
        assert nan_to_minus_one(ap_K) == pytest.approx(expected, rel=0, abs=1e-9)
    assert (weight_RI[:, 1] == 0).any()  # then class 3 has no ground truth, and is left out
    assert (np.isnan(ap_RK[:, 3]) == (weight_RI[:, 1] == 0)).all()


def _stored(split: tuple[dict[str, Any], list[Row]]) -> tuple[dict[str, Any], bytes]:
    return split[0], parquet(split[1])


def test_recall_exactly_at_a_level_counts_as_in_coco() -> None:
    """Of 20 boxes 7 found is a recall of 0.35, just below COCO's level of that name."""
    boxes = [(1, 0, [50.0 * n, 0, 40, 40], 0) for n in range(20)]
    for found in range(1, 21):
        rows: list[Row] = [
            (1, 0, 1 - n / 100, 50.0 * n, 0, 50.0 * n + 40, 40) for n in range(found)
        ]
        measurement, matches = evaluate(ground_truth(1, 1, boxes), parquet(rows))
        figure_RF, _ = bootstrap.Side(matches, 0).measure(np.ones((1, 1), np.uint8))
        assert figure_RF[0, 0] == pytest.approx(measurement.coco.map50_95, rel=0, abs=1e-12)


def test_detections_beyond_the_hundredth_do_not_count() -> None:
    rows: list[Row] = [(1, 0, 1 - n / 200, 500, 0, 540, 40) for n in range(100)]
    rows.append((1, 0, 0.1, 0, 0, 40, 40))
    _, matches = evaluate(ground_truth(1, 1, [(1, 0, [0, 0, 40, 40], 0)]), parquet(rows))
    figure_RF, _ = bootstrap.Side(matches, 0).measure(np.ones((1, 1), np.uint8))
    assert figure_RF[0].tolist() == [0.0] * 6


def test_same_seed_draws_the_same_whatever_is_asked_besides() -> None:
    truth, rows = make(0)
    side = bootstrap.Side(evaluate(truth, parquet(rows))[1], 0.3)
    other = bootstrap.Side(evaluate(truth, parquet(make(0, 0.3)[1]))[1], 0.3)
    many = bootstrap.resample([side, other], num_resamples=300, seed=-5)
    few = bootstrap.resample([other], num_resamples=7, seed=-5)
    for name in bootstrap.FIGURES:
        np.testing.assert_array_equal(many[1].figures[name][:7], few[0].figures[name])
    np.testing.assert_array_equal(many[1].ap_RK[:7], few[0].ap_RK)
    again = bootstrap.resample([other], num_resamples=7, seed=6)
    assert (again[0].figures["map50"] != few[0].figures["map50"]).any()


@pytest.mark.parametrize("num_images", [3, 0])
def test_split_without_ground_truth_has_no_figures(num_images: int) -> None:
    rows: list[Row] = [(1, 0, 0.5, 0, 0, 40, 40)] if num_images else []
    _, matches = evaluate(ground_truth(num_images, 2, []), parquet(rows))
    (found,) = bootstrap.resample([bootstrap.Side(matches, 0)], num_resamples=5, seed=0)
    assert all(np.isnan(found.figures[name]).all() for name in bootstrap.FIGURES)
    assert np.isnan(found.ap_RK).all()


def test_cancelled_bootstrap_ends_at_once() -> None:
    truth, rows = make(0)
    side = bootstrap.Side(evaluate(truth, parquet(rows))[1], 0.3)
    cancelled = threading.Event()
    cancelled.set()
    (found,) = bootstrap.resample([side], num_resamples=10_000, seed=0, cancelled=cancelled)
    assert np.isnan(found.figures["map50"]).all()
