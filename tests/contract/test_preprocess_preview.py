"""A preview says exactly what a version would be, and makes nothing."""

from collections.abc import Sequence

import numpy as np
import pytest
import simplejpeg

from detflow import channels
from detflow.errors import FailedPrecondition, NotFound
from detflow.v1 import common_pb2, preprocess_pb2, version_pb2
from services.preprocess.preview import choose
from tests.preprocess_rig import PROJECT, Rig, rig
from tests.preprocess_samples import jpeg, pack, yolo_files

__all__ = ["rig"]

RECIPE = version_pb2.Recipe(
    split=version_pb2.SplitRatio(train=70, val=20, test=10),
    exact_size=version_pb2.ExactSize(width_px=400, height_px=200),
    augmentations=[version_pb2.AUGMENTATION_ROTATE_90],
    brightness=[40],
)


async def preview(
    rig: Rig, dataset: str, recipe: version_pb2.Recipe, num_samples: int = 0
) -> preprocess_pb2.PreviewVersionResponse:
    with channels.translate():
        seen: preprocess_pb2.PreviewVersionResponse = await rig.preprocessings.PreviewVersion(
            preprocess_pb2.PreviewVersionRequest(
                parent=PROJECT, dataset=dataset, recipe=recipe, num_samples=num_samples
            )
        )
    return seen


async def test_counts_and_leak_report_are_those_of_the_version(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(20)))
    seen = await preview(rig, dataset.name, RECIPE)
    made = await rig.preprocess(dataset.name, RECIPE)
    assert seen.num_images == made.num_images
    assert seen.num_images.train == 14 * 3
    name = f"{made.version}/leakReport"
    report = await rig.preprocessings.GetLeakReport(preprocess_pb2.GetLeakReportRequest(name=name))
    report.name = ""
    assert seen.leak_report == report
    assert not seen.samples


async def test_samples_show_images_before_and_after_with_their_boxes(rig: Rig) -> None:
    files = yolo_files(10)
    for number in range(10):
        files[f"images/{number:03d}.jpg"] = jpeg(600, 300, seed=number)
    dataset = await rig.import_archive(pack(files))
    seen = await preview(rig, dataset.name, RECIPE, 4)

    train, val, test = common_pb2.SPLIT_TRAIN, common_pb2.SPLIT_VAL, common_pb2.SPLIT_TEST
    assert [sample.split for sample in seen.samples] == [train, train, val, test]
    assert len({sample.path for sample in seen.samples}) == 4
    first, last = seen.samples[0], seen.samples[-1]
    assert [p.step for p in first.after] == ["none", "rotate_90", "brightness_+40"]
    assert [p.step for p in last.after] == ["none"]
    assert (first.before.width_px, first.before.height_px) == (600, 300)
    plain, _, bright = (simplejpeg.decode_jpeg(picture.jpeg) for picture in first.after)
    assert plain.shape == (160, 320, 3)
    assert bright.mean() > plain.mean() + 20
    for picture in first.after:
        assert (picture.width_px, picture.height_px) == (400, 200)
        corners = np.asarray(picture.boxes).reshape(-1, 4)
        assert len(corners) == len(picture.class_ids) == len(first.before.class_ids)
        assert (corners >= 0).all()
        assert (corners <= [400, 200, 400, 200]).all()
    # 600 x 300 becomes 400 x 200 without a border.
    np.testing.assert_allclose(np.asarray(first.before.boxes) * 2 / 3, first.after[0].boxes)


async def test_pictures_that_are_too_many_for_one_answer_are_left_out(rig: Rig) -> None:
    files = yolo_files(20, size=(640, 640))
    dataset = await rig.import_archive(pack(files))
    many = version_pb2.Recipe(brightness=range(10, 50, 5), contrast=[0.5, 0.75, 1.25, 1.5, 2])
    seen = await preview(rig, dataset.name, many, 12)
    assert 0 < len(seen.samples) <= 12
    assert seen.ByteSize() < 4 << 20


async def test_what_cannot_be_made_cannot_be_seen(rig: Rig) -> None:
    with pytest.raises(NotFound):
        await preview(rig, f"{PROJECT}/datasets/nope", RECIPE)
    with pytest.raises(NotFound):
        await preview(rig, "projects/q/datasets/nope", RECIPE)
    failed = await rig.import_archive(b"no archive", "broken")
    with pytest.raises(FailedPrecondition, match="READY") as error:
        await preview(rig, failed.name, RECIPE)
    assert error.value.reason == "DATASET_NOT_READY"
    tiny = await rig.import_archive(pack(yolo_files(2)), "tiny")
    with pytest.raises(FailedPrecondition) as error:
        await preview(rig, tiny.name, RECIPE)
    assert error.value.reason == "TOO_FEW_IMAGES"


@pytest.mark.parametrize(
    ("sizes", "wanted", "expected"),
    [
        ((14, 4, 2), 0, []),
        ((14, 4, 2), 1, [(0, 0)]),
        ((14, 4, 2), 4, [(0, 0), (0, 7), (1, 0), (2, 0)]),
        ((1, 1, 1), 12, [(0, 0), (1, 0), (2, 0)]),
    ],
)
def test_samples_are_spread_over_all_splits(
    sizes: Sequence[int], wanted: int, expected: list[tuple[int, int]]
) -> None:
    assert choose([range(size) for size in sizes], wanted) == expected
