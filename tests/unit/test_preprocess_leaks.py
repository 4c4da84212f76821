"""What belongs together, and what the leak report says of it."""

from collections.abc import Sequence

import numpy as np
import pytest

from detflow.errors import FailedPrecondition
from detflow.recipes import resolve_recipe
from detflow.v1 import common_pb2, version_pb2
from services.preprocess.grouping import group_images
from services.preprocess.leaks import plan_split
from services.preprocess.outlines import Outlines

_RANDOM = np.random.default_rng(0)


def images_of(
    looks: Sequence[int | None], splits: Sequence[str | None] | None = None, folder: str = "a"
) -> Outlines:
    """Images that look like this, all with one box of class 0 and the odd ones with one of 1."""
    made = Outlines()
    for number, hash_ in enumerate(looks):
        made.add(
            f"{folder}/{number:04}.jpg",
            sha256=f"{number:016x}{0:048x}",
            class_ids=[0] * (1 + number % 2),
            existing_split=splits[number] if splits else None,
            perceptual_hash=hash_,
        )
    return made


def different(count: int) -> list[int | None]:
    """Hashes of images that don't look the same."""
    return [int(value) for value in _RANDOM.integers(0, 1 << 63, count, dtype=np.uint64)]


def recipe(**fields: object) -> version_pb2.Recipe:
    """A resolved recipe."""
    return resolve_recipe(version_pb2.Recipe(**fields))  # type: ignore[arg-type]


def named(*paths: str) -> Outlines:
    """Images with these paths."""
    made = Outlines()
    for number, path in enumerate(paths):
        made.add(path, sha256=f"{number:064x}")
    return made


def test_images_that_look_the_same_are_on_one_side_and_reported() -> None:
    looks = different(100)
    for copy, original, bits in ((97, 3, 0b111), (98, 3, 0), (99, 50, 0b1)):
        looks[copy] = looks[original] ^ bits  # type: ignore[operator]
    for seed in range(5):
        asked = recipe(
            seed=seed, augmentations=[version_pb2.AUGMENTATION_ROTATE_90], contrast=[2.0]
        )
        plan = plan_split(images_of(looks), asked, num_classes=2)
        positions = plan.positions()
        assert [len(positions[name]) for name in ("train", "val", "test")] == [70, 20, 10]
        for group in ({3, 97, 98}, {50, 99}):
            assert any(group <= set(side) for side in positions.values())
        report = plan.report
        assert report.group_by == version_pb2.GROUP_BY_NEAR_DUPLICATES
        assert (report.num_groups, report.num_grouped_images) == (2, 5)
        assert report.num_leaking_groups == 0
        largest, other = report.groups
        assert list(largest.paths) == ["a/0003.jpg", "a/0097.jpg", "a/0098.jpg"]
        assert (largest.num_images, largest.max_distance, other.max_distance) == (3, 3, 1)
        number = next(i for i, name in enumerate(("train", "val", "test")) if 3 in positions[name])
        assert largest.split == number + common_pb2.SPLIT_TRAIN
        assert report.num_sources == version_pb2.SplitCounts(train=70, val=20, test=10)
        assert report.num_augmented_copies == 140
        assert sum(part.train + part.val + part.test for part in report.num_boxes_by_class) == 150


def test_groups_torn_by_the_archives_own_splits_are_leaks() -> None:
    looks = different(30)
    looks[29] = looks[0]
    looks[5] = looks[6] = looks[7]
    own = ["train"] * 20 + ["val"] * 5 + ["test"] * 5
    plan = plan_split(images_of(looks, own), recipe(keep_existing_split=True), 2)
    assert plan.positions()["test"] == tuple(range(25, 30))
    assert plan.report.num_leaking_groups == 1
    leak, whole = plan.report.groups  # leaks come first
    assert (leak.split, leak.num_images) == (common_pb2.SPLIT_UNSPECIFIED, 2)
    assert (whole.split, whole.num_images) == (common_pb2.SPLIT_TRAIN, 3)
    # Images that are not grouped may leak, too, and the report says so.
    torn = [
        plan_split(images_of(looks), recipe(seed=seed, group_by=version_pb2.GROUP_BY_NOTHING), 2)
        for seed in range(9)
    ]
    assert {plan.report.num_groups for plan in torn} == {2}
    assert max(plan.report.num_leaking_groups for plan in torn) > 0
    # Without the archive's splits they stay together.
    assert plan_split(images_of(looks, own), recipe(), 2).report.num_leaking_groups == 0


def test_frames_of_one_camera_do_not_swallow_a_split() -> None:
    base = different(1)[0]
    assert base is not None
    # A chain: each frame differs from the next by 6 bits, and every tenth from its copy by 1.
    frames = [base]
    for number in range(199):
        bits = _RANDOM.choice(63, 6, replace=False) if number % 10 else [number % 63]
        frames.append(frames[-1] ^ sum(1 << int(bit) for bit in bits))
    images = images_of([*frames, *different(50)])
    grouping = group_images(images, recipe(), smallest_split=25)
    assert np.bincount(grouping.found).max() == 200
    assert np.bincount(grouping.together).max() <= 25
    plan = plan_split(images, recipe(), 2)
    assert tuple(map(len, plan.positions().values())) == (175, 50, 25)
    assert plan.report.num_leaking_groups == 1  # and it says so
    assert plan.report.groups[0].num_images == 200
    for number in range(0, 199, 10):
        assert any({number, number + 1} <= set(side) for side in plan.positions().values())


def test_images_that_all_look_the_same_are_split_and_called_a_leak() -> None:
    plan = plan_split(images_of([5] * 40), recipe(), 2)
    assert tuple(map(len, plan.positions().values())) == (28, 8, 4)
    assert plan.report.num_leaking_groups == 1


def test_images_without_a_hash_are_grouped_by_their_bytes_alone() -> None:
    images = images_of([None] * 20)
    images.add("twin.jpg", sha256=f"{7:016x}{0:048x}")
    assert plan_split(images, recipe(), 2).report.num_grouped_images == 2


def test_groups_by_folder_name_or_not_at_all() -> None:
    paths = ["x/f_1.jpg", "x/f_2.jpg", "y/f_3.jpg", "y/g.jpg", "z/h_4.jpg", "g.jpg"]
    images = named(*paths)
    for asked, expected in (
        (recipe(group_by=version_pb2.GROUP_BY_FOLDER), [0, 0, 2, 2, 4, 5]),
        (
            recipe(group_by=version_pb2.GROUP_BY_NAME_PREFIX, group_separator="_"),
            [0, 0, 0, 3, 4, 5],
        ),
        (recipe(group_by=version_pb2.GROUP_BY_NOTHING), [0, 1, 2, 3, 4, 5]),
    ):
        assert group_images(images, asked, 1).together.tolist() == expected
    report = plan_split(images, recipe(group_by=version_pb2.GROUP_BY_FOLDER), 0).report
    assert (report.num_groups, report.num_leaking_groups) == (2, 0)
    assert not report.groups[0].HasField("max_distance")


def test_too_few_images_or_groups_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="2 images") as few:
        plan_split(images_of(different(2)), recipe(), 1)
    assert few.value.reason == "TOO_FEW_IMAGES"
    with pytest.raises(FailedPrecondition, match="by folder") as groups:
        plan_split(images_of(different(20)), recipe(group_by=version_pb2.GROUP_BY_FOLDER), 1)
    assert groups.value.reason == "TOO_FEW_GROUPS"


def test_many_groups_are_reported_largest_first() -> None:
    looks = [value for value in different(300) for _ in range(2)] + [9] * 15
    plan = plan_split(images_of(looks), recipe(), 2)
    assert plan.report.num_groups == 301
    assert len(plan.report.groups) == 100
    assert plan.report.groups[0].num_images == 15
    assert len(plan.report.groups[0].paths) == 10
