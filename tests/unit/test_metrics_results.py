"""Which images a filter finds and in which order, against plain Python over what is listed."""

import numpy as np
import pytest

from services.metrics import thresholds
from services.metrics.domain import ErrorKind
from services.metrics.evaluate import evaluate
from services.metrics.matches import Matches
from services.metrics.results import Filter, at_threshold, choose, count_boxes, find_image
from tests.metrics_fakes import Row, ground_truth, parquet

NUM_IMAGES = 30
NUM_CLASSES = 3


@pytest.fixture(scope="module")
def matches() -> Matches:
    """Few places and confidences, so that everything happens and much is equal."""
    rng = np.random.default_rng(7)
    places = [(x, y) for x in (0, 60, 200) for y in (0, 150)]

    def place() -> tuple[float, float]:
        x, y = places[rng.integers(len(places))]
        return float(x), float(y)

    boxes: list[tuple[int, int, list[float], int]] = []
    rows: list[Row] = []
    for image in range(1, NUM_IMAGES + 1):
        for _ in range(rng.integers(0, 5)):
            x, y = place()
            crowd = int(rng.random() < 0.1)
            boxes.append((image, int(rng.integers(NUM_CLASSES)), [x, y, 100.0, 100.0], crowd))
        for _ in range(rng.integers(0, 7)):
            x, y = place()
            x += float(rng.choice([0, 5, 40]))
            confidence = float(rng.choice([0.25, 0.5, 0.75]))
            index = int(rng.integers(NUM_CLASSES))
            rows.append((image, index, confidence, x, y, x + 100, y + 100))
    return evaluate(ground_truth(NUM_IMAGES, NUM_CLASSES, boxes), parquet(rows))[1]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75, 0.8])
def test_each_filter_finds_what_a_walk_through_all_images_finds(
    matches: Matches, threshold: float
) -> None:
    outcomes = at_threshold(matches, threshold)

    def found(wanted: Filter) -> list[int]:
        return [int(i) for i in choose(outcomes, wanted, worst_first=False)]

    for k in range(NUM_CLASSES):
        assert found(Filter(classes=[k])) == [
            i
            for i in range(NUM_IMAGES)
            if k in matches.class_N[outcomes.detections(i)]
            or k in matches.class_M[outcomes.truths(i)]
        ]
    for kind in ErrorKind:
        if kind is ErrorKind.NONE:
            continue
        has = outcomes.missed_M if kind is ErrorKind.MISSED else outcomes.wrong_N
        expected = []
        for i in range(NUM_IMAGES):
            part = outcomes.truths(i) if kind is ErrorKind.MISSED else outcomes.detections(i)
            kinds = [kind] if kind is ErrorKind.MISSED else matches.error_N[part][has[part]]
            if has[part].any() and kind in kinds:
                expected.append(i)
        assert found(Filter(error_kinds=[kind])) == expected
    pairs = thresholds.confusion(matches, threshold)
    for cell in {*zip(pairs.actual_P.tolist(), pairs.predicted_P.tolist(), strict=True)}:
        images = {
            image
            for *one, image in zip(
                pairs.actual_P.tolist(),
                pairs.predicted_P.tolist(),
                pairs.image_P.tolist(),
                strict=True,
            )
            if tuple(one) == cell
        }
        assert found(Filter(cell=cell)) == sorted(images)
    both = Filter(classes=[0], error_kinds=[ErrorKind.BACKGROUND])
    assert found(both) == sorted(
        {*found(Filter(classes=[0]))} & {*found(Filter(error_kinds=[ErrorKind.BACKGROUND]))}
    )


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8])
def test_worst_come_first_and_equal_ones_in_the_order_of_the_split(
    matches: Matches, threshold: float
) -> None:
    outcomes = at_threshold(matches, threshold)
    keys = []
    for i in range(NUM_IMAGES):
        detections, truths = outcomes.detections(i), outcomes.truths(i)
        wrong = matches.confidence_N[detections][outcomes.wrong_N[detections]]
        num_errors = len(wrong) + np.count_nonzero(outcomes.lost_M[truths])
        keys.append((-num_errors, -max(wrong, default=-1.0), i))
    assert choose(outcomes, Filter()).tolist() == [i for *_, i in sorted(keys)]
    some = Filter(classes=[1])
    chosen = choose(outcomes, some, worst_first=False).tolist()
    assert choose(outcomes, some).tolist() == [i for *_, i in sorted(keys) if i in chosen]


def test_boxes_of_an_image_are_counted(matches: Matches) -> None:
    outcomes = at_threshold(matches, 0.5)
    assert count_boxes(outcomes).tolist() == [
        part.stop - part.start + others.stop - others.start
        for i in range(NUM_IMAGES)
        for part, others in [(outcomes.detections(i), outcomes.truths(i))]
    ]


def test_split_without_anything_has_its_images() -> None:
    _, empty = evaluate(ground_truth(3, 1, []), parquet([]))
    outcomes = at_threshold(empty, 0.0)
    assert choose(outcomes, Filter()).tolist() == [0, 1, 2]
    assert choose(outcomes, Filter(classes=[0])).tolist() == []
    assert outcomes.detections(2) == slice(0, 0)
    assert [find_image(empty, image_id) for image_id in (0, 1, 3, 4)] == [None, 0, 2, None]
