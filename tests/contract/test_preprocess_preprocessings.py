"""PreprocessService and the bundles it makes, through a real server."""

import asyncio
import hashlib
import io
import json
import tarfile
from typing import Any

import pytest
import simplejpeg

from detflow import channels
from detflow.errors import NotFound, from_status
from detflow.events import EVENTS_STREAM, delivered, fetch, subscribe_from
from detflow.v1 import events_pb2, preprocess_pb2, version_pb2
from detflow.v1.common_pb2 import StoredObject
from tests.preprocess_rig import PROJECT, PreprocessingState, Rig, rig, states, version_of
from tests.preprocess_samples import jpeg, pack, yolo_files

__all__ = ["rig"]

AUGMENTATIONS = [
    version_pb2.AUGMENTATION_FLIP_LEFT_RIGHT,
    version_pb2.AUGMENTATION_FLIP_UP_DOWN,
    version_pb2.AUGMENTATION_ROTATE_90,
    version_pb2.AUGMENTATION_ROTATE_180,
    version_pb2.AUGMENTATION_ROTATE_270,
]


def read_json(rig: Rig, obj: StoredObject) -> dict[str, Any]:
    """Reads a JSON object of the store, verified."""
    document: dict[str, Any] = json.loads(rig.service.store.get(obj))
    return document


def stored(entry: dict[str, Any]) -> StoredObject:
    """An object as the manifest names it."""
    return StoredObject(key=entry["key"], size_bytes=entry["size_bytes"], sha256=entry["sha256"])


def read_images(rig: Rig, split: dict[str, Any]) -> dict[str, bytes]:
    """Every image of a split, in order; each shard is verified."""
    images = {}
    for shard in split["shards"]:
        with tarfile.open(fileobj=io.BytesIO(rig.service.store.get(stored(shard)))) as tar:
            members = tar.getmembers()
            assert len(members) == shard["num_images"]
            for member in members:
                assert member.mtime == 0
                file = tar.extractfile(member)
                assert file is not None
                images[member.name] = file.read()
    return images


async def test_a_version_becomes_a_bundle(rig: Rig) -> None:
    files = yolo_files(20)
    dataset = await rig.import_archive(pack(files))
    recipe = version_pb2.Recipe(augmentations=AUGMENTATIONS[:1])
    done = await rig.preprocess(dataset.name, recipe)

    assert done.state == PreprocessingState.SUCCEEDED
    assert (done.num_images.train, done.num_images.val, done.num_images.test) == (28, 4, 2)
    assert done.revision == 3
    manifest = read_json(rig, done.manifest)
    assert done.manifest.key == f"bundles/manifests/{done.manifest.sha256}.json"
    assert manifest["format"] == "detflow-bundle/1"
    assert manifest["dataset_sha256"] == dataset.content_sha256
    assert manifest["class_names"] == ["disc", "square"]
    assert manifest["counts"] == {"train": 28, "val": 4, "test": 2}
    assert manifest["recipe"]["split"] == {"train": 70, "val": 20, "test": 10}
    assert set(manifest["libraries"]) == {"opencv", "simplejpeg", "numpy"}

    originals = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    sources: list[str] = []
    for name, split in manifest["splits"].items():
        images = read_images(rig, split)
        truth = read_json(rig, stored(split["ground_truth"]))
        assert list(images) == [f"{i:08d}.jpg" for i in range(1, split["num_images"] + 1)]
        assert len(truth["annotations"]) == split["num_boxes"] == split["num_images"]
        assert truth["categories"] == [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
        for entry in truth["images"]:
            data = images[entry["file_name"]]
            assert simplejpeg.decode_jpeg_header(data)[:2] == (entry["height"], entry["width"])
            if entry["source"]["augmentation"] == "none":
                assert data == originals[entry["source"]["sha256"]]
                sources.append(entry["source"]["path"])
            else:
                assert name == "train"
    assert sorted(sources) == sorted(path for path in files if path.startswith("images/"))


async def test_resize_gray_and_all_augmentations(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(10)))
    recipe = version_pb2.Recipe(
        split=version_pb2.SplitRatio(train=60, val=20, test=20),
        max_side_px=32,
        grayscale=True,
        augmentations=AUGMENTATIONS,
    )
    done = await rig.preprocess(dataset.name, recipe)
    manifest = read_json(rig, done.manifest)
    assert manifest["counts"] == {"train": 36, "val": 2, "test": 2}
    truth = read_json(rig, stored(manifest["splits"]["train"]["ground_truth"]))
    images = read_images(rig, manifest["splits"]["train"])
    for entry, annotation in zip(truth["images"], truth["annotations"], strict=True):
        assert max(entry["width"], entry["height"]) == 32
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0
        assert x + width <= entry["width"] and y + height <= entry["height"]
        assert annotation["area"] == pytest.approx(8 * 12)
        pixels = simplejpeg.decode_jpeg(images[entry["file_name"]], "BGR")
        assert (pixels[:, :, 0] == pixels[:, :, 1]).all()


async def test_the_same_recipe_gives_the_same_bytes(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(12)))
    recipe = version_pb2.Recipe(max_side_px=40, augmentations=AUGMENTATIONS[2:3], seed=3)
    one = await rig.preprocess(dataset.name, recipe, "v1")
    explicit = version_pb2.Recipe()
    explicit.CopyFrom(recipe)
    explicit.split.CopyFrom(version_pb2.SplitRatio(train=70, val=20, test=10))
    two = await rig.preprocess(dataset.name, explicit, "v2")
    recipe.seed = 4
    three = await rig.preprocess(dataset.name, recipe, "v3")
    assert one.manifest == two.manifest
    assert one.manifest != three.manifest


async def test_states_are_published_once_each_in_order(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(5)))
    version = version_of(dataset.name)
    for _ in range(3):  # delivered again, with the same and with another event id
        await rig.tell("created", version, event_id="same")
    await rig.tell("created", version)
    await rig.watch_preprocessing(version.name)

    seen: list[tuple[int, int, str]] = []
    async with subscribe_from(
        rig.bus, EVENTS_STREAM, ["detflow.v1.preprocessing.v1.state_changed"], 1
    ) as subscription:
        while len(seen) < 3:
            for msg in await fetch(subscription):
                event = delivered(msg, events_pb2.Event.FromString)
                state = PreprocessingState.Name(event.message.preprocessing.state)
                seen.append((event.seq, event.message.preprocessing.revision, state))
        assert await fetch(subscription) == []
    assert seen == [(1, 1, "PENDING"), (2, 2, "RUNNING"), (3, 3, "SUCCEEDED")]


async def test_watch_gives_snapshot_then_changes_and_resumes_exactly(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(60)))
    version = version_of(dataset.name)
    watch = asyncio.create_task(rig.watch_preprocessing(version.name))  # before it is known
    await rig.tell("created", version)
    responses = await watch
    order = ["PENDING", "RUNNING", "SUCCEEDED"]
    seen = states(responses)
    assert seen == order[order.index(seen[0]) :]
    percents = [r.progress.percent for r in responses if r.HasField("progress")]
    assert percents == sorted(percents)

    changes = [r for r in responses if r.HasField("preprocessing")][1:]
    for number, change in enumerate(changes[:-1], start=1):
        again = await rig.watch_preprocessing(version.name, change.cursor)
        assert states(again) == seen[number + 1 :]
    assert states(await rig.watch_preprocessing(version.name)) == ["SUCCEEDED"]


async def test_an_unknown_version_is_not_found(rig: Rig) -> None:
    name = f"{PROJECT}/versions/nothing"
    with pytest.raises(NotFound, match=f"^{name} does not exist$"):
        await rig.watch_preprocessing(name)
    with pytest.raises(NotFound), channels.translate():
        await rig.preprocessings.GetPreprocessing(
            preprocess_pb2.GetPreprocessingRequest(version=name)
        )


async def test_too_few_images_fail_with_the_remedy(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(2)))
    failed = await rig.preprocess(dataset.name, version_pb2.Recipe())
    assert failed.state == PreprocessingState.FAILED
    error = from_status(failed.failure.status)
    assert (error.code.name, error.reason) == ("FAILED_PRECONDITION", "TOO_FEW_IMAGES")


async def test_a_missing_or_failed_dataset_fails_the_preprocessing(rig: Rig) -> None:
    failed = await rig.preprocess(f"{PROJECT}/datasets/nothing", version_pb2.Recipe())
    assert from_status(failed.failure.status).code.name == "NOT_FOUND"
    broken = await rig.import_archive(b"no zip")
    failed = await rig.preprocess(broken.name, version_pb2.Recipe(), "v2")
    assert from_status(failed.failure.status).reason == "DATASET_NOT_READY"


async def test_a_changed_source_is_data_loss_and_never_a_bundle(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(10)))
    store = rig.service.store
    for key in list(store.list(f"datasets/{dataset.name.split('/')[-1]}")):
        path = f"{store.url.removeprefix('file://')}/{key}"
        with open(path, "r+b") as file:  # noqa: ASYNC230
            file.seek(512 + 300)
            byte = file.read(1)[0]
            file.seek(512 + 300)
            file.write(bytes([byte ^ 1]))
    failed = await rig.preprocess(dataset.name, version_pb2.Recipe())
    assert failed.state == PreprocessingState.FAILED
    assert from_status(failed.failure.status).code.name == "DATA_LOSS"


async def test_deleting_the_version_cancels_and_a_final_state_stays(rig: Rig) -> None:
    files = yolo_files(0)
    for i in range(120):
        files[f"images/{i:03d}.jpg"] = jpeg(1600, 1200, seed=i % 3)
    files["labels/000.txt"] = b"0 0.5 0.5 0.5 0.5"
    dataset = await rig.import_archive(pack(files))
    version = version_of(dataset.name, version_pb2.Recipe(augmentations=AUGMENTATIONS))
    await rig.tell("created", version)
    request = preprocess_pb2.WatchPreprocessingRequest(version=version.name)
    seen = []
    async for response in rig.preprocessings.WatchPreprocessing(request):
        if response.HasField("preprocessing"):
            seen.append(response.preprocessing.state)
            if response.preprocessing.state == PreprocessingState.RUNNING:
                version.revision = 2
                await rig.tell("deleted", version)
    assert seen[-1] == PreprocessingState.CANCELLED

    version.revision = 3
    await rig.tell("undeleted", version)
    version.revision = 4
    await rig.tell("deleted", version)
    again = await rig.preprocess(dataset.name, version_pb2.Recipe(max_side_px=64), "v2")
    assert again.state == PreprocessingState.SUCCEEDED
    assert states(await rig.watch_preprocessing(version.name)) == ["CANCELLED"]


async def test_a_delete_that_overtakes_the_creation_still_cancels(rig: Rig) -> None:
    version = version_of(f"{PROJECT}/datasets/nothing")
    late = version_of(f"{PROJECT}/datasets/nothing")
    late.revision = 2
    await rig.tell("deleted", late)
    # Also while the creation is still to come.
    assert states(await rig.watch_preprocessing(version.name)) == ["CANCELLED"]
    await rig.tell("created", version)
    other = await rig.preprocess(f"{PROJECT}/datasets/nothing", version_pb2.Recipe(), "v2")
    assert other.state == PreprocessingState.FAILED
    assert states(await rig.watch_preprocessing(version.name)) == ["CANCELLED"]
