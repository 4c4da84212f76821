"""Intervals of a comparison against data sets that are really drawn and measured again."""

from datetime import UTC, datetime

import numpy as np
import pytest

from detflow.v1.common_pb2 import StoredObject
from services.metrics import bootstrap
from services.metrics.comparison import MAX_IMAGES, compare
from services.metrics.domain import Evaluation
from services.metrics.evaluate import evaluate
from services.metrics.measured import Measured
from tests.metrics_fakes import Row, ground_truth, parquet
from tests.unit.test_metrics_bootstrap import NUM_IMAGES, make, replicate


def measured(truth: dict[str, object], rows: list[Row]) -> Measured:
    measurement, matches = evaluate(truth, parquet(rows))
    evaluation = Evaluation(
        training="projects/p/versions/v/trainings/t",
        split="test",
        attempt=1,
        measurement=measurement,
        failure=None,
        create_time=datetime.now(UTC),
    )
    return Measured(
        evaluation=evaluation, measurement=measurement, matches=matches, manifest=StoredObject()
    )


def test_intervals_are_percentiles_of_the_differences_in_replicated_data_sets() -> None:
    truth, first = make(0)
    second = [(*row[:2], row[2] ** 2, *row[3:]) for row in first if row[2] > 0.3]
    found = compare(
        [measured(truth, first), measured(truth, second)],
        num_resamples=20,
        confidence_level=0.8,
        seed=3,
    )
    differences = []
    for number in range(20):
        weight_I = bootstrap.draw(NUM_IMAGES, 3, number)
        before, after = (
            evaluate(again, parquet(rows))[0].coco
            for again, rows in (replicate(truth, rows, weight_I) for rows in (first, second))
        )
        differences.append((after.map50_95 - before.map50_95, after.map50 - before.map50))
    for name, values in zip(("map50_95", "map50"), np.transpose(differences), strict=True):
        delta = found.deltas[0][name]
        expected = np.quantile(values, (0.1, 0.9)).tolist()
        assert [delta.low, delta.high] == pytest.approx(expected, rel=0, abs=1e-9)
    class_values = [found.class_deltas[0][k].delta for k in range(4)]
    assert np.mean(class_values) == pytest.approx(found.deltas[0]["map50_95"].delta)


def test_images_on_which_they_differ_most_come_first_and_background_found_empty_is_right() -> None:
    num_images = MAX_IMAGES + 20
    box = [0.0, 0, 40, 40]
    truth = ground_truth(num_images, 1, [(image, 0, box, 0) for image in range(2, num_images + 1)])
    hits: list[Row] = [(image, 0, 0.9, 0, 0, 40, 40) for image in range(2, num_images + 1)]
    misses: list[Row] = [(image, 0, 0.9, 90, 90, 99, 99) for image in (1, 70)]
    found = compare(
        [measured(truth, hits), measured(truth, [*hits[10:-1], *misses]), measured(truth, hits)],
        num_resamples=1,
        confidence_level=0.95,
        seed=0,
    )
    # The background image, those not found, and the one found elsewhere.
    assert [one.image for one in found.images] == [*range(11), 69]
    assert {one.f1s for one in found.images} == {(1.0, 0.0, 1.0)}
    everywhere: list[Row] = [(n, 0, 0.9, 90, 90, 99, 99) for n in range(1, num_images + 1)]
    found = compare(
        [measured(truth, hits), measured(truth, hits + everywhere)],
        num_resamples=1,
        confidence_level=0.95,
        seed=0,
    )
    assert [one.image for one in found.images] == [*range(MAX_IMAGES)]
    assert found.images[1].f1s == pytest.approx((1.0, 2 / 3))
