"""The bundle cache of a machine."""

from __future__ import annotations

import fcntl
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest

from detflow.errors import DataLoss, FailedPrecondition
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.trainer.worker.bundle import Bundle, fetch_bundle
from tests.shapes_bundle import CLASS_NAMES, SIZE_PX, write_bundle

COUNTS = {"train": 3, "val": 2, "test": 0}


def fetch(store: ObjectStore, manifest: StoredObject, folder: Path) -> Bundle:
    return fetch_bundle(store, manifest, folder / "bundles", check=lambda: None)


def test_bundle_is_unpacked_with_its_labels_and_then_read_from_the_cache(
    store: ObjectStore, tmp_path: Path
) -> None:
    manifest = write_bundle(store, COUNTS)
    first = fetch(store, manifest, tmp_path)
    assert first.class_names == CLASS_NAMES
    assert {name: len(images) for name, images in first.splits.items()} == COUNTS
    for image in first.splits["train"]:
        assert (image.width, image.height) == SIZE_PX and image.path.stat().st_size > 0
        assert image.boxes.shape == (len(image.classes), 4)
    for key in list(store.list("bundles")):
        store.delete(key)
    again = fetch(store, manifest, tmp_path)
    assert [image.path for image in again.splits["val"]] == [
        image.path for image in first.splits["val"]
    ]


def test_cached_bundle_that_lost_content_is_fetched_again(
    store: ObjectStore, tmp_path: Path
) -> None:
    manifest = write_bundle(store, COUNTS)
    damaged = fetch(store, manifest, tmp_path).splits["train"][0].path
    content = damaged.read_bytes()
    damaged.write_bytes(b"")
    fetch(store, manifest, tmp_path)
    assert damaged.read_bytes() == content


def test_flipped_byte_in_a_shard_is_data_loss_and_leaves_nothing(
    store: ObjectStore, tmp_path: Path
) -> None:
    manifest = write_bundle(store, COUNTS)
    key = next(iter(store.list("bundles/shards")))
    content = bytearray((tmp_path / "store" / key).read_bytes())
    content[600] ^= 1
    store.put(key, bytes(content))
    with pytest.raises(DataLoss, match=key):
        fetch(store, manifest, tmp_path)
    assert not [path for path in (tmp_path / "bundles").iterdir() if path.is_dir()]


def replace_shard(store: ObjectStore, manifest: StoredObject, member: str) -> StoredObject:
    """Makes a manifest whose training shard holds one member of this name."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(member))
    shard = store.put("bundles/shards/evil.tar", tar.getvalue())
    content = json.loads(store.get(manifest))
    content["splits"]["train"]["shards"] = [
        {"key": shard.key, "size_bytes": shard.size_bytes, "sha256": shard.sha256}
    ]
    return store.put("bundles/manifests/evil.json", json.dumps(content).encode())


@pytest.mark.parametrize("member", ["../00000001.jpg", "/00000001.jpg", "x.jpg"])
def test_shard_with_an_unexpected_entry_is_refused(
    store: ObjectStore, tmp_path: Path, member: str
) -> None:
    manifest = replace_shard(store, write_bundle(store, COUNTS), member)
    with pytest.raises(DataLoss, match="unexpected entry"):
        fetch(store, manifest, tmp_path)


def test_shard_without_its_images_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    manifest = replace_shard(store, write_bundle(store, COUNTS), "00000001.jpg")
    with pytest.raises(DataLoss, match="do not match"):
        fetch(store, manifest, tmp_path)


def test_bundle_of_another_format_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    content = json.loads(store.get(write_bundle(store, COUNTS)))
    content["format"] = "detflow-bundle/9"
    manifest = store.put("bundles/manifests/new.json", json.dumps(content).encode())
    with pytest.raises(FailedPrecondition, match="detflow-bundle/9"):
        fetch(store, manifest, tmp_path)


def test_wait_for_another_worker_can_be_stopped(store: ObjectStore, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    manifest = write_bundle(store, COUNTS)
    cache = tmp_path / "bundles"
    cache.mkdir()
    with (cache / f".{manifest.sha256}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Stop):
            fetch_bundle(store, manifest, cache, check=stop)


def test_workers_that_start_together_share_one_download(store: ObjectStore, tmp_path: Path) -> None:
    manifest = write_bundle(store, COUNTS)
    found: list[Bundle] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(store, manifest, tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len({image.path for bundle in found for image in bundle.splits["val"]}) == 2
