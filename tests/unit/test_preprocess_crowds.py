"""Crowd regions: kept, hashed, written as ground truth, and no boxes to learn from."""

import json
from dataclasses import replace
from pathlib import Path

from services.preprocess.bundle import GroundTruth, Transform
from services.preprocess.domain import Image, describe
from services.trainer.worker.bundle import _read_split

IMAGE = Image("a.jpg", "00", 40, 30, "k", 0, 1, (0, 1), (1, 2, 11, 12, 0, 0, 40, 30))
CROWDED = replace(IMAGE, crowds=(False, True))


def test_a_crowd_changes_the_hash_of_a_dataset_and_is_counted() -> None:
    plain, crowded = describe([IMAGE], 2), describe([CROWDED], 2)
    assert plain.content_sha256 != crowded.content_sha256
    assert (plain.num_crowd_boxes, crowded.num_crowd_boxes) == (0, 1)
    assert crowded.num_boxes_by_class == (1, 1)
    other = describe([replace(IMAGE, crowds=(True, False))], 2)
    assert other.content_sha256 != crowded.content_sha256


def test_splits_are_counted_where_the_archive_had_any() -> None:
    images = [replace(IMAGE, path=f"{i}", existing_split=s) for i, s in enumerate(("val", None))]
    assert describe(images, 2).existing_split == (0, 1, 0)
    assert describe([IMAGE], 2).existing_split is None


def test_trainings_leave_crowds_out_and_the_ground_truth_has_them(tmp_path: Path) -> None:
    truth = GroundTruth(tmp_path / "images", tmp_path / "annotations")
    truth.extend([CROWDED], Transform())
    truth.finish(["disc", "square"], tmp_path / "truth.json")
    document = json.loads((tmp_path / "truth.json").read_bytes())
    assert [a["iscrowd"] for a in document["annotations"]] == [0, 1]
    (image,) = _read_split(tmp_path, document)
    assert image.classes.tolist() == [0]
    assert image.boxes.tolist() == [[1, 2, 10, 10]]
