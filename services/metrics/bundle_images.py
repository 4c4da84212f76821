"""Single images of a bundle, read from its tar shards in the object store.

The first image of a shard costs reading the shard once: it is checked against its hash, and where
each image lies and the image's own hash are remembered. Every other image is one small read.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from detflow.errors import DataLoss
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.metrics.kept import Kept

_MAX_KEPT_SHARDS = 256  # of at most a few hundred images each: about 20 MB
_MAX_KEPT_MANIFESTS = 64
_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Member:
    start: int
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class _Split:
    shards: tuple[StoredObject, ...]
    last_ids: tuple[int, ...]  # id of the last image of each shard


class BundleImages:
    """Reads images of bundles; safe to be used by several threads.

    Args:
        objects: Object store.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._manifests: Kept[str, Mapping[str, _Split]] = Kept(_MAX_KEPT_MANIFESTS, lambda _: 1)
        self._shards: Kept[str, Mapping[str, _Member]] = Kept(_MAX_KEPT_SHARDS, lambda _: 1)

    def read(self, manifest: StoredObject, split: str, image_id: int) -> bytes:
        """Reads the JPEG of an image as it is in the bundle. Blocks.

        Args:
            manifest: Manifest of the bundle.
            split: train, val or test.
            image_id: Id of the image in its split, from 1.

        Raises:
            DataLoss: OBJECT_LOST: the manifest or the shard is gone or differs from its recorded
                hash. BAD_MANIFEST: there is no such image in the bundle.
            Unavailable: The object store is away.
        """
        shard = self._find_shard(manifest, split, image_id)
        members = self._shards.get(shard.sha256, lambda: self._index(shard))
        member = members.get(f"{image_id:08d}.jpg")
        if member is None:
            raise _bad_bundle(manifest, f"has no image {image_id} of the {split} split")
        data = self._objects.get_range(shard.key, member.start, member.size_bytes)
        if hashlib.sha256(data).digest() != member.sha256:
            raise _lost(shard)
        return data

    def _find_shard(self, manifest: StoredObject, split: str, image_id: int) -> StoredObject:
        splits = self._manifests.get(manifest.sha256, lambda: self._read_manifest(manifest))
        found = splits.get(split, _Split((), ()))
        position = bisect.bisect_left(found.last_ids, image_id)
        if position == len(found.shards) or image_id < 1:
            raise _bad_bundle(manifest, f"has no image {image_id} of the {split} split")
        return found.shards[position]

    def _read_manifest(self, manifest: StoredObject) -> Mapping[str, _Split]:
        try:
            splits = orjson.loads(self._objects.get(manifest))["splits"]
            return {
                name: _Split(
                    tuple(
                        StoredObject(
                            key=one["key"], size_bytes=one["size_bytes"], sha256=one["sha256"]
                        )
                        for one in split["shards"]
                    ),
                    tuple(itertools.accumulate(one["num_images"] for one in split["shards"])),
                )
                for name, split in splits.items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _bad_bundle(manifest, "lists no shards") from error

    def _index(self, shard: StoredObject) -> Mapping[str, _Member]:
        content = _Content(self._objects, shard)
        members: dict[str, _Member] = {}
        try:
            with tarfile.open(fileobj=content, mode="r|", bufsize=_READ_BYTES) as archive:
                for entry in archive:
                    file = archive.extractfile(entry)
                    data = file.read() if file else b""
                    digest = hashlib.sha256(data).digest()
                    members[entry.name] = _Member(entry.offset_data, len(data), digest)
        except tarfile.TarError as error:
            raise _lost(shard) from error
        while content.read(_READ_BYTES):
            pass
        if content.sha256 != shard.sha256:
            raise _lost(shard)
        return members


class _Content(io.RawIOBase):
    """An object read from front to back; what was read is hashed."""

    def __init__(self, objects: ObjectStore, obj: StoredObject) -> None:
        self._objects = objects
        self._obj = obj
        self._position = 0
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._obj.size_bytes - self._position)
        if length:
            data = self._objects.get_range(self._obj.key, self._position, length)
            self._position += length
            self._digest.update(data)
            buffer[:length] = data
        return length

    @property
    def sha256(self) -> str:
        """Hash of what was read so far, in hex."""
        return self._digest.hexdigest()


def _lost(shard: StoredObject) -> DataLoss:
    return DataLoss(
        f"stored object {shard.key} differs from its recorded SHA-256; restore it from a backup of"
        " the object store",
        reason="OBJECT_LOST",
        metadata={"key": shard.key},
    )


def _bad_bundle(manifest: StoredObject, what: str) -> DataLoss:
    return DataLoss(
        f"bundle {manifest.key} {what}; preprocess the version again",
        reason="BAD_MANIFEST",
        metadata={"key": manifest.key},
    )
