"""Counting a dataset: batch by batch or at once, with nothing in it, and against plain counting."""

import math

import numpy as np
import pytest

from detflow.v1.dataset_pb2 import DatasetStatistics
from services.preprocess.domain import Image
from services.preprocess.statistics import StatisticsBuilder, count_dataset

_Kind = DatasetStatistics.Suspicion.Kind
NAMES = [f"class {number}" for number in range(6)]


def image(number: int, *boxes: tuple[int, float, float, float, float], size: int = 100) -> Image:
    """An image with boxes (class, x1, y1, x2, y2)."""
    return Image(
        path=f"{number:03}.jpg",
        sha256=f"{number:016x}{0:048x}",
        width=2 * size,
        height=size,
        shard_key="",
        offset=0,
        size_bytes=1,
        class_ids=tuple(box[0] for box in boxes),
        boxes=tuple(value for box in boxes for value in box[1:]),
    )


def random_images(count: int) -> list[Image]:
    """Images of two sizes with up to seven boxes."""
    random = np.random.default_rng(0)
    made = []
    for number in range(count):
        boxes = []
        for _ in range(random.integers(0, 8)):
            x1, y1 = random.uniform(0, 60, 2)
            width, height = random.uniform(1, 40, 2)
            boxes.append((int(random.integers(5)), x1, y1, x1 + width, y1 + height))
        made.append(image(number, *boxes, size=100 + number % 2 * 100))
    return made


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_counts_do_not_depend_on_the_batches(batch: int) -> None:
    images = random_images(100)
    builder = StatisticsBuilder(NAMES)
    for begin in range(0, len(images), batch):
        builder.add(images[begin : begin + batch])
    assert builder.finish() == count_dataset(images, NAMES)


def test_counts_are_those_of_plain_counting() -> None:
    images = random_images(100)
    found = count_dataset(images, NAMES)
    boxes = [
        (one, class_id, one.boxes[4 * i : 4 * i + 4])
        for one in images
        for i, class_id in enumerate(one.class_ids)
    ]
    assert (found.num_images, found.num_boxes) == (100, len(boxes))
    for number, counted in enumerate(found.classes):
        assert counted.num_boxes == sum(class_id == number for _, class_id, _ in boxes)
        assert counted.num_images == sum(number in one.class_ids for one in images)
    sizes = [
        math.sqrt((x2 - x1) * (y2 - y1) / (one.width * one.height))
        for one, _, (x1, y1, x2, y2) in boxes
    ]
    ratios = [(x2 - x1) / (y2 - y1) for _, _, (x1, y1, x2, y2) in boxes]
    for histogram, values in (
        (found.box_sizes, sizes),
        (found.box_aspect_ratios, ratios),
        (found.boxes_per_image, [len(one.class_ids) for one in images]),
    ):
        counts, _ = np.histogram(values, histogram.edges)
        assert list(histogram.counts) == counts.tolist()
        assert sum(histogram.counts) == len(values)
    assert [s.kind for s in found.suspicions if s.kind == _Kind.CLASS_WITHOUT_BOXES]
    assert found.num_background_images == sum(not one.class_ids for one in images)


def test_what_is_suspicious_is_named_once() -> None:
    found = count_dataset(
        [
            image(0, (0, 10, 10, 50, 50), (1, 10, 10, 50, 50), (0, 10.5, 10, 50, 50.9)),
            image(1, (0, 0, 0, 200, 99), (0, 5, 5, 7.9, 60), (0, 5, 5, 8, 60)),
            image(2, (1, 0, 0, 40, 40), (1, 0, 0, 42, 40)),
        ],
        NAMES[:2],
    )
    assert {s.kind: (s.num_total, list(s.examples)) for s in found.suspicions} == {
        _Kind.DUPLICATE_BOX: (
            2,
            ["000.jpg (10.5, 10, 50, 50.9)", "001.jpg (5, 5, 8, 60)"],
        ),
        _Kind.BOX_COVERS_IMAGE: (1, ["001.jpg (0, 0, 200, 99)"]),
        _Kind.TINY_BOX: (1, ["001.jpg (5, 5, 7.9, 60)"]),
    }


def test_images_without_boxes_and_no_images_can_be_counted() -> None:
    bare = count_dataset([image(number) for number in range(30)], NAMES)
    assert (bare.num_boxes, bare.num_background_images) == (0, 30)
    assert list(bare.boxes_per_image.counts) == [30]
    unlabelled = next(s for s in bare.suspicions if s.kind == _Kind.UNLABELLED_IMAGE)
    assert (unlabelled.num_total, len(unlabelled.examples)) == (30, 20)
    assert count_dataset([], NAMES).num_images == 0
