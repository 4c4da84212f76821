"""The bundle on the worker's disk: downloaded once, verified, shared by all its trainings."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detflow.errors import DataLoss, FailedPrecondition
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject

FORMAT = "detflow-bundle/1"
_LOCK_SECONDS = 0.2
SPLITS = ("train", "val", "test")
_IMAGE_NAME = re.compile(r"[0-9]{8}\.jpg")


@dataclass(frozen=True, slots=True)
class Image:
    """One labelled image of a split.

    Attributes:
        id: From 1 within the split.
        path: JPEG file.
        width: Pixels.
        height: Pixels.
        classes: Class indices, shape (n,), int64.
        boxes: x, y, width, height in pixels from the top left corner, shape (n, 4), float64.
    """

    id: int
    path: Path
    width: int
    height: int
    classes: NDArray[np.int64]
    boxes: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A version's images and labels.

    Attributes:
        class_names: Name by class index.
        splits: Images of train, val and test, ordered by id.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[Image, ...]]


def fetch_bundle(
    store: ObjectStore,
    manifest: StoredObject,
    cache: Path,
    *,
    check: Callable[[], None],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bundle:
    """Reads a bundle from the cache, which it is downloaded to if it is not there.

    Args:
        store: The object store.
        manifest: Manifest of the bundle.
        cache: Folder of the machine's bundles.
        check: Called between objects; raises to stop.
        on_progress: Told how many shards of how many are there.

    Raises:
        DataLoss: An object is gone or is not what was recorded.
        FailedPrecondition: EMPTY_SPLIT or NO_BOXES: there is nothing to learn from, or nothing to
            choose the best weights by.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / manifest.sha256
    with _locked(cache / f".{manifest.sha256}.lock", check):
        if not _is_intact(folder):
            shutil.rmtree(folder, ignore_errors=True)
            part = cache / f".{manifest.sha256}.part"
            shutil.rmtree(part, ignore_errors=True)  # left by a worker that was killed
            part.mkdir()
            try:
                _download(store, manifest, part, check, on_progress)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return _read(folder)


@contextmanager
def _locked(path: Path, check: Callable[[], None]) -> Iterator[None]:
    """Holds a lock between processes; the kernel frees it when its holder dies.

    It asks again and again: a call that waits could not be stopped.
    """
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check()
                time.sleep(_LOCK_SECONDS)
        yield


def _download(
    store: ObjectStore,
    stored_manifest: StoredObject,
    folder: Path,
    check: Callable[[], None],
    on_progress: Callable[[int, int], None],
) -> None:
    content = store.get(stored_manifest)
    manifest: dict[str, Any] = json.loads(content)
    if manifest.get("format") != FORMAT:
        raise FailedPrecondition(
            f"bundle {stored_manifest.key} has format {manifest.get('format')!r}, this worker "
            f"reads {FORMAT}; run a worker of the same release as the preprocess service",
            reason="BUNDLE_FORMAT",
        )
    (folder / "manifest.json").write_bytes(content)
    num_shards = sum(len(split["shards"]) for split in manifest["splits"].values())
    num_done = 0
    shard_file = folder / "shard.tar"
    for name in SPLITS:
        images = folder / name
        images.mkdir()
        split = manifest["splits"][name]
        store.download(stored_object(split["ground_truth"]), folder / f"{name}.json")
        for shard in split["shards"]:
            check()
            store.download(stored_object(shard), shard_file)
            _unpack(shard_file, images, shard["key"])
            num_done += 1
            on_progress(num_done, num_shards)
        expected = {
            image["file_name"]
            for image in json.loads((folder / f"{name}.json").read_bytes())["images"]
        }
        if expected != {path.name for path in images.iterdir()}:
            raise _corrupt(stored_manifest.key, f"images and labels of split {name} do not match")
    shard_file.unlink(missing_ok=True)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    (folder / "sizes.json").write_text(json.dumps(sizes))


def _unpack(shard: Path, folder: Path, key: str) -> None:
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                source = archive.extractfile(member)
                if source is None or not _IMAGE_NAME.fullmatch(member.name):
                    raise _corrupt(key, f"has an unexpected entry {member.name!r}")
                with (folder / member.name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except tarfile.TarError as error:
        raise _corrupt(key, f"is no readable tar file: {error}") from error


def _is_intact(folder: Path) -> bool:
    """Checks the sizes of a cached bundle: files may have lost their content with the power."""
    try:
        sizes: dict[str, int] = json.loads((folder / "sizes.json").read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError):
        return False


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _read(folder: Path) -> Bundle:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    bundle = Bundle(
        class_names=tuple(manifest["class_names"]),
        splits={
            name: _read_split(folder / name, json.loads((folder / f"{name}.json").read_bytes()))
            for name in SPLITS
        },
    )
    for name in ("train", "val"):
        if not bundle.splits[name]:
            raise FailedPrecondition(
                f"split {name} has no images; create a version with a larger share for it",
                reason="EMPTY_SPLIT",
            )
    if not any(len(image.classes) for image in bundle.splits["train"]):
        raise FailedPrecondition(
            "the training split has no boxes; label some of its images and create a new version",
            reason="NO_BOXES",
        )
    return bundle


def _read_split(folder: Path, truth: dict[str, Any]) -> tuple[Image, ...]:
    boxes_of: dict[int, list[list[float]]] = {}
    for annotation in truth["annotations"]:
        if annotation["iscrowd"]:  # a region of many things is no box to learn from
            continue
        row = [annotation["category_id"] - 1, *annotation["bbox"]]
        boxes_of.setdefault(annotation["image_id"], []).append(row)
    images = []
    for entry in sorted(truth["images"], key=lambda entry: int(entry["id"])):
        rows = np.array(boxes_of.get(entry["id"], ()), dtype=np.float64).reshape(-1, 5)
        images.append(
            Image(
                id=entry["id"],
                path=folder / entry["file_name"],
                width=entry["width"],
                height=entry["height"],
                classes=rows[:, 0].astype(np.int64),
                boxes=rows[:, 1:],
            )
        )
    return tuple(images)


def stored_object(entry: Mapping[str, Any]) -> StoredObject:
    """Returns the object that an entry of a manifest names."""
    return StoredObject(key=entry["key"], size_bytes=entry["size_bytes"], sha256=entry["sha256"])


def _corrupt(key: str, what: str) -> DataLoss:
    return DataLoss(
        f"bundle object {key} {what}; create the version again",
        reason="BUNDLE_CORRUPT",
        metadata={"key": key},
    )
