"""The real data set: blood cells in Pascal VOC layout with two boxes without area."""

import pytest

from detflow.v1 import dataset_pb2
from tests.preprocess_rig import DatasetState, Rig, reasons, rig
from tests.preprocess_samples import BCCD

__all__ = ["rig"]

pytestmark = pytest.mark.skipif(
    not BCCD.exists(), reason=f"{BCCD.name} is not beside the repository"
)

DEGENERATE = [
    ("BCCD/Annotations/BloodImage_00338.xml object[13]", "BAD_BOX"),
    ("BCCD/Annotations/BloodImage_00343.xml object[4]", "BAD_BOX"),
]


async def test_degenerate_boxes_are_named_and_nothing_is_kept(rig: Rig) -> None:
    dataset = await rig.import_archive(BCCD.read_bytes())

    assert dataset.state == DatasetState.FAILED
    assert reasons(dataset.failure) == DEGENERATE
    assert dataset.num_images == 0


async def test_skip_invalid_leaves_out_only_the_two_boxes(rig: Rig) -> None:
    dataset = await rig.import_archive(BCCD.read_bytes(), skip_invalid=True)

    assert dataset.state == DatasetState.READY, dataset.failure
    assert dataset.format == dataset_pb2.DATASET_FORMAT_VOC
    assert dataset.num_images == 364
    assert list(dataset.class_names) == ["Platelets", "RBC", "WBC"]
    assert list(dataset.num_boxes_by_class) == [361, 4153, 372]
    assert dataset.num_boxes == 361 + 4155 + 372 - 2
    assert dataset.num_skipped == 2
    assert [(p.field, p.reason) for p in dataset.skipped] == DEGENERATE

    # One scene was photographed twice, and nothing else looks the same.
    request = dataset_pb2.GetDatasetStatisticsRequest(name=f"{dataset.name}/statistics")
    statistics = await rig.datasets.GetDatasetStatistics(request)
    (suspicion,) = statistics.suspicions
    assert suspicion.kind == dataset_pb2.DatasetStatistics.Suspicion.NEAR_DUPLICATE_IMAGE
    assert list(suspicion.examples) == [
        "BCCD/JPEGImages/BloodImage_00037.jpg = BCCD/JPEGImages/BloodImage_00038.jpg"
    ]
