"""What is needed to make a version again: complete, and enough to do so."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.protobuf import json_format

from detflow import channels
from detflow.errors import FailedPrecondition, NotFound
from detflow.v1 import dataset_pb2, preprocess_pb2, version_pb2
from services.preprocess import replay
from tests.preprocess_rig import PROJECT, Rig, rig
from tests.preprocess_samples import pack, yolo_files

__all__ = ["rig"]


async def download(rig: Rig, version_id: str) -> dict[str, Any]:
    request = preprocess_pb2.DownloadReplayRequest(name=f"{PROJECT}/versions/{version_id}")
    with channels.translate():
        chunks = [chunk async for chunk in rig.preprocessings.DownloadReplay(request)]
    assert chunks[0].content_type == "application/json"
    document: dict[str, Any] = json.loads(b"".join(chunk.data for chunk in chunks))
    return document


async def test_replay_names_every_image_and_makes_the_same_bundle_again(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(20)), "my cells")
    recipe = version_pb2.Recipe(
        split=version_pb2.SplitRatio(train=50, val=25, test=25),
        augmentations=[version_pb2.AUGMENTATION_FLIP_LEFT_RIGHT],
        seed=-3,
    )
    made = await rig.preprocess(dataset.name, recipe, "v1")
    document = await download(rig, "v1")
    assert document["dataset"]["content_sha256"] == dataset.content_sha256
    assert document["class_names"] == list(dataset.class_names)
    assert document["seed"] == -3
    assert document["manifest"]["sha256"] == made.manifest.sha256
    assert "opencv" in document["libraries"] and document["detflow"]
    assert [command.split()[1:3] for command in document["commands"]] == [
        ["datasets", "download"],
        ["datasets", "import"],
        ["versions", "create"],
    ]
    assert all("'my cells'" in command for command in document["commands"])
    assert all(shard["sha256"] in shard["key"] for shard in document["shards"])
    images = document["images"]
    assert len({image["path"] for image in images}) == len(images) == 20
    counts = Counter(image["split"] for image in images)
    assert counts["train"] * 2 == made.num_images.train  # each image and its copy
    assert (counts["val"], counts["test"]) == (made.num_images.val, made.num_images.test)

    again = json_format.ParseDict(document["recipe"], version_pb2.Recipe())
    assert (await rig.preprocess(dataset.name, again, "v2")).manifest == made.manifest
    with channels.translate():
        await rig.tell("deleted", version_pb2.Version(name=f"{PROJECT}/versions/v2", revision=2))
        await rig.tell("deleted", version_pb2.Version(name=f"{PROJECT}/versions/v1", revision=2))
    assert (await download(rig, "v1"))["images"] == images


async def test_version_without_a_bundle_has_no_replay(rig: Rig) -> None:
    dataset = (await rig.import_archive(pack(yolo_files(3)))).name
    with channels.translate():
        await rig.datasets.DeleteDataset(dataset_pb2.DeleteDatasetRequest(name=dataset))
    failed = await rig.preprocess(dataset, version_pb2.Recipe(), "v1")
    assert failed.state == preprocess_pb2.Preprocessing.FAILED
    with pytest.raises(FailedPrecondition) as caught:
        await download(rig, "v1")
    assert caught.value.reason == "VERSION_HAS_NO_BUNDLE"
    with pytest.raises(NotFound):
        await download(rig, "none")


def test_images_are_read_from_a_large_ground_truth_in_pieces(tmp_path: Path) -> None:
    sources = [
        (f"한글 {'x' * (number % 700)}/{number}\n.jpg", f"{number:064x}") for number in range(9000)
    ]
    entries = [
        {"id": 1, "source": {"path": path, "sha256": sha256, "augmentation": name}}
        for path, sha256 in sources
        for name in ("none", "flip")
    ]
    file = tmp_path / "truth.json"
    file.write_bytes(orjson.dumps({"images": entries, "annotations": [{"id": 1}]}))
    assert file.stat().st_size > 5 * replay._READ_CHARACTERS
    assert list(replay._images(file)) == sources
