"""Images out of tar shards: exact, read once, and never what was damaged."""

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from detflow.errors import DataLoss
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.metrics.bundle_images import BundleImages
from services.metrics.kept import Kept

IMAGES = [bytes([number]) * (700 * number) for number in range(1, 8)]


@pytest.fixture
def shards(store: ObjectStore) -> list[StoredObject]:
    """Seven images in shards of three."""
    return [put_shard(store, first, IMAGES[first : first + 3]) for first in (0, 3, 6)]


@pytest.fixture
def manifest(store: ObjectStore, shards: list[StoredObject]) -> StoredObject:
    entries = [
        {"key": one.key, "size_bytes": one.size_bytes, "sha256": one.sha256, "num_images": count}
        for one, count in zip(shards, (3, 3, 1), strict=True)
    ]
    return put_manifest(store, {"val": {"shards": entries}, "test": {"shards": []}})


def put_shard(store: ObjectStore, first: int, images: list[bytes]) -> StoredObject:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, data in enumerate(images, start=first + 1):
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return store.put(f"bundles/shards/{first}.tar", file.getvalue())


def put_manifest(store: ObjectStore, splits: Any) -> StoredObject:
    data = json.dumps({"splits": splits}).encode()
    return store.put(f"bundles/manifests/{hashlib.sha256(data).hexdigest()}.json", data)


class Counting(ObjectStore):
    """Counts reads."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.ranges: list[tuple[str, int]] = []

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.ranges.append((key, length))
        return super().get_range(key, start, length)


def test_every_image_is_what_was_packed_and_a_shard_is_read_once(
    store: ObjectStore, shards: list[StoredObject], manifest: StoredObject
) -> None:
    objects = Counting(store.url)
    images = BundleImages(objects)
    for number, data in [*enumerate(IMAGES, start=1)] * 2:
        assert images.read(manifest, "val", number) == data
    whole = sum(one.size_bytes for one in shards)
    assert sum(length for _, length in objects.ranges) == whole + 2 * sum(map(len, IMAGES))


def test_many_readers_of_one_shard_read_it_once(
    store: ObjectStore, shards: list[StoredObject], manifest: StoredObject
) -> None:
    objects = Counting(store.url)
    images = BundleImages(objects)
    together = threading.Barrier(6)

    def read(number: int) -> bytes:
        together.wait()
        return images.read(manifest, "val", number)

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(read, [1, 2, 3, 1, 2, 3]))
    assert found == IMAGES[:3] * 2
    read_bytes = sum(length for _, length in objects.ranges)
    assert read_bytes == shards[0].size_bytes + 2 * sum(map(len, IMAGES[:3]))


@pytest.mark.parametrize("split", ["val", "test", "other"])
@pytest.mark.parametrize("image_id", [0, 8])
def test_image_that_is_not_in_the_bundle_is_lost(
    store: ObjectStore, manifest: StoredObject, split: str, image_id: int
) -> None:
    with pytest.raises(DataLoss, match=f"has no image {image_id} of the {split} split") as raised:
        BundleImages(store).read(manifest, split, image_id)
    assert raised.value.reason == "BAD_MANIFEST"


def gone(store: ObjectStore, shard: StoredObject) -> None:
    store.delete(shard.key)


def shorter(store: ObjectStore, shard: StoredObject) -> None:
    store.put(shard.key, store.get(shard)[:-512])


def flipped(store: ObjectStore, shard: StoredObject) -> None:
    data = bytearray(store.get(shard))
    data[600] ^= 1  # in the first image
    store.put(shard.key, bytes(data))


def scrambled(store: ObjectStore, shard: StoredObject) -> None:
    data = bytearray(store.get(shard))
    data[:512] = b"x" * 512  # the first header
    store.put(shard.key, bytes(data))


@pytest.mark.parametrize("damage", [gone, shorter, flipped, scrambled])
@pytest.mark.parametrize("known", [False, True], ids=["first read", "later read"])
def test_damaged_shard_is_told_by_its_key_and_works_when_restored(
    store: ObjectStore,
    shards: list[StoredObject],
    manifest: StoredObject,
    damage: Callable[[ObjectStore, StoredObject], None],
    known: bool,
) -> None:
    images, content = BundleImages(store), store.get(shards[0])
    if known:
        images.read(manifest, "val", 1)
    damage(store, shards[0])
    if known and damage in (shorter, scrambled):  # the bytes of the image itself are whole
        assert images.read(manifest, "val", 1) == IMAGES[0]
        return
    with pytest.raises(DataLoss) as raised:
        images.read(manifest, "val", 1)
    assert raised.value.reason == "OBJECT_LOST"
    assert raised.value.metadata == {"key": shards[0].key}
    assert images.read(manifest, "val", 4) == IMAGES[3]  # the others are there
    store.put(shards[0].key, content)
    assert images.read(manifest, "val", 1) == IMAGES[0]


@pytest.mark.parametrize("splits", [None, {"val": {}}, {"val": {"shards": [{"key": "a"}]}}])
def test_manifest_without_shards_is_named(store: ObjectStore, splits: Any) -> None:
    manifest = put_manifest(store, splits)
    with pytest.raises(DataLoss, match=manifest.key) as raised:
        BundleImages(store).read(manifest, "val", 1)
    assert raised.value.reason == "BAD_MANIFEST"


def test_what_is_kept_stays_within_its_bound_and_the_oldest_goes() -> None:
    made: list[str] = []

    def make(key: str) -> Callable[[], bytes]:
        return lambda: made.append(key) or bytes(40)  # type: ignore[func-returns-value]

    kept: Kept[str, bytes] = Kept(100, len)
    for key in ("a", "b", "a", "c", "a", "b"):
        kept.get(key, make(key))
    assert made == ["a", "b", "c", "b"]
    for _ in range(2):
        assert len(kept.get("large", lambda: made.append("large") or bytes(101))) == 101  # type: ignore[func-returns-value]
    kept.get("a", make("a"))
    assert made[4:] == ["large", "large"]  # what is larger than the bound is not kept


def test_what_fails_is_tried_again() -> None:
    kept: Kept[int, int] = Kept(10, lambda _: 1)
    with pytest.raises(ZeroDivisionError):
        kept.get(1, lambda: 1 // 0)
    assert kept.get(1, lambda: 5) == 5
