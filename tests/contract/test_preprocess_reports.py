"""Statistics of datasets and leak reports of versions, through a real server."""

import pytest

from detflow import channels
from detflow.errors import FailedPrecondition, NotFound
from detflow.v1 import dataset_pb2, preprocess_pb2, version_pb2
from tests.preprocess_rig import PROJECT, PreprocessingState, Rig, rig
from tests.preprocess_samples import encode, jpeg, pack, picture, yolo_files

__all__ = ["rig"]

_Kind = dataset_pb2.DatasetStatistics.Suspicion.Kind


async def statistics(rig: Rig, dataset: str) -> dataset_pb2.DatasetStatistics:
    """Reads what was counted."""
    request = dataset_pb2.GetDatasetStatisticsRequest(name=f"{dataset}/statistics")
    with channels.translate():
        found: dataset_pb2.DatasetStatistics = await rig.datasets.GetDatasetStatistics(request)
    return found


async def leak_report(rig: Rig, version_id: str = "v1") -> preprocess_pb2.LeakReport:
    """Reads what a split kept together."""
    request = preprocess_pb2.GetLeakReportRequest(
        name=f"{PROJECT}/versions/{version_id}/leakReport"
    )
    with channels.translate():
        found: preprocess_pb2.LeakReport = await rig.preprocessings.GetLeakReport(request)
    return found


def archive() -> bytes:
    """Ten images, two of them the same picture, one without labels, and odd boxes."""
    files = yolo_files(10)
    files["images/twin.png"] = encode(".png", picture(64, 48, seed=3))
    files["labels/twin.txt"] = b"0 0.5 0.5 1 1\n0 0.5 0.5 1 1\n1 0.5 0.5 0.02 0.5\n"
    files["images/bare.jpg"] = jpeg(32, 32, seed=99)
    return pack(files)


async def test_statistics_of_ready_datasets_are_counted_once(rig: Rig) -> None:
    dataset = await rig.import_archive(archive())
    found = await statistics(rig, dataset.name)
    assert found.name == f"{dataset.name}/statistics"
    assert (found.num_images, found.num_boxes, found.num_background_images) == (12, 13, 1)
    assert [(c.class_name, c.num_boxes, c.num_images) for c in found.classes] == [
        ("disc", 7, 6),
        ("square", 6, 6),
    ]
    assert [(s.width_px, s.height_px, s.num_images) for s in found.image_sizes] == [
        (64, 48, 11),
        (32, 32, 1),
    ]
    assert list(found.boxes_per_image.edges) == [0, 1, 2, 3, 4]
    assert list(found.boxes_per_image.counts) == [1, 10, 0, 1]
    assert sum(found.box_sizes.counts) == sum(found.box_aspect_ratios.counts) == 13
    assert sum(found.num_boxes_by_coco_size) == 13
    suspicions = {s.kind: (s.num_total, list(s.examples)) for s in found.suspicions}
    assert suspicions[_Kind.BOX_COVERS_IMAGE][0] == 2
    assert suspicions[_Kind.DUPLICATE_BOX] == (1, ["images/twin.png (0, 0, 64, 48)"])
    assert suspicions[_Kind.TINY_BOX] == (1, ["images/twin.png (31.4, 12, 32.6, 36)"])
    assert suspicions[_Kind.UNLABELLED_IMAGE] == (1, ["images/bare.jpg"])
    (near,) = suspicions[_Kind.NEAR_DUPLICATE_IMAGE][1]
    assert near.endswith(" = images/twin.png")

    # One of an earlier release is counted when it is asked for.
    async with rig.service.db.connection() as conn:
        await conn.execute("delete from dataset_statistics")
    assert await statistics(rig, dataset.name) == found
    async with rig.service.db.connection() as conn:
        assert await conn.fetchval("select count(*) from dataset_statistics") == 1

    broken = await rig.import_archive(b"no archive", "broken")
    with pytest.raises(FailedPrecondition, match="FAILED, not READY"):
        await statistics(rig, broken.name)
    with pytest.raises(NotFound):
        await statistics(rig, f"{PROJECT}/datasets/nothing")


async def test_near_duplicates_stay_together_and_the_report_of_a_made_version_says_so(
    rig: Rig,
) -> None:
    dataset = await rig.import_archive(archive())
    recipe = version_pb2.Recipe(augmentations=[version_pb2.AUGMENTATION_ROTATE_90])
    done = await rig.preprocess(dataset.name, recipe)
    report = await leak_report(rig)
    assert report.name == f"{PROJECT}/versions/v1/leakReport"
    assert report.group_by == version_pb2.GROUP_BY_NEAR_DUPLICATES
    assert (report.num_groups, report.num_grouped_images, report.num_leaking_groups) == (1, 2, 0)
    (group,) = report.groups
    assert group.paths[1] == "images/twin.png"
    assert report.num_sources == version_pb2.SplitCounts(train=9, val=2, test=1)
    assert report.num_augmented_copies == 9 == done.num_images.train - report.num_sources.train

    few = await rig.import_archive(pack(yolo_files(2)), "few")
    failed = await rig.preprocess(few.name, version_pb2.Recipe(), "v2")
    assert failed.state == PreprocessingState.FAILED
    with pytest.raises(FailedPrecondition, match="is FAILED"):
        await leak_report(rig, "v2")
    with pytest.raises(NotFound):
        await leak_report(rig, "nothing")


async def test_the_archives_own_splits_are_kept(rig: Rig) -> None:
    splits = ["train"] * 4 + ["valid"] * 4 + ["test"] * 2
    files = {
        path.replace("/", f"/{splits[int(path[-7:-4])]}/") if "/" in path else path: data
        for path, data in yolo_files(10).items()
    }
    dataset = await rig.import_archive(pack(files))
    done = await rig.preprocess(dataset.name, version_pb2.Recipe(keep_existing_split=True))
    counts = done.num_images
    assert (counts.train, counts.val, counts.test) == (4, 4, 2)
