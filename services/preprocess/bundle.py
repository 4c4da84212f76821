"""The bundle of a version: what goes into which shard, and the bytes of shards and ground truth.

A bundle is a function of the dataset's images and the recipe alone: the same input gives the same
bytes. Image ids count from 1 within a split, in the order of the source paths; a source is followed
by its augmented copies in the order of the recipe.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson

from detflow import boxes as geometry
from detflow import images as pixels
from detflow.boxes import Boxes
from detflow.errors import DataLoss
from detflow.image_headers import Header
from detflow.resize import KEEP_SIZE, Placement, Resize, place_boxes, place_pixels
from detflow.store import ObjectStore
from services.preprocess.augment import (
    ORIGINAL,
    Copy,
    transform_boxes,
    transform_pixels,
    transform_size,
)
from services.preprocess.domain import Image
from services.preprocess.images import check_header, decode
from services.preprocess.shards import ShardWriter, divide

FORMAT = "detflow-bundle/1"

_MIN_SOURCES_PER_SHARD = 16
_SHARDS_PER_SPLIT = 16
_READ_AHEAD = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Transform:
    """The part of a recipe that changes images.

    Attributes:
        resize: What becomes of their sizes.
        grayscale: Whether they are made gray.
        copies: What is made of each image, `ORIGINAL` first.
    """

    resize: Resize = KEEP_SIZE
    grayscale: bool = False
    copies: tuple[Copy, ...] = (ORIGINAL,)


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A finished shard in the object store."""

    key: str
    size_bytes: int
    sha256: str
    num_images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """Which sources a shard holds: a slice of the split's positions.

    Attributes:
        split: "train", "val" or "test".
        position: Number of the shard in its split, from 0.
        first: Index of its first source within the split's sources.
        sources: Positions of its sources in the dataset.
    """

    split: str
    position: int
    first: int
    sources: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """One unit of preprocessing work; picklable, complete in itself.

    Attributes:
        plan: Which shard it is.
        store_url: Object store.
        scratch: Folder for the file that is being written.
        first_image_id: Id of the first image of the shard.
        sources: The images to transform.
        transform: What to do to them.
    """

    plan: ShardPlan
    store_url: str
    scratch: Path
    first_image_id: int
    sources: tuple[Image, ...]
    transform: Transform


def plan_shards(
    split: str, sources: Sequence[int], source_bytes: Sequence[int], num_copies: int
) -> list[ShardPlan]:
    """Divides the sources of a split into shards, in order.

    Args:
        split: Name of the split.
        sources: Positions of the images in the dataset.
        source_bytes: Their sizes.
        num_copies: Images made of each source.
    """
    shards = divide(
        [size * num_copies for size in source_bytes],
        num_shards=_SHARDS_PER_SPLIT,
        min_sources=_MIN_SOURCES_PER_SHARD,
    )
    return [
        ShardPlan(
            split=split,
            position=position,
            first=shard.start,
            sources=tuple(sources[shard.start : shard.stop]),
        )
        for position, shard in enumerate(shards)
    ]


def make_shard(job: ShardJob) -> StoredShard:
    """Reads, transforms and stores the images of one shard. Runs in a process of the pool.

    Raises:
        DataLoss: A source is gone or differs from its recorded hash.
    """
    store = open_store(job.store_url)
    path = job.scratch / f"{job.plan.split}-{job.plan.position}.tar"
    image_id = job.first_image_id
    try:
        with ShardWriter(path) as writer:
            for image, data in _read_sources(store, job.sources):
                for encoded in transform_image(image, data, job.transform):
                    writer.add(f"{image_id:08d}.jpg", encoded)
                    image_id += 1
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        stored = store.put_if_absent(f"bundles/shards/{sha256}.tar", path)
    finally:
        path.unlink(missing_ok=True)
    return StoredShard(stored.key, stored.size_bytes, stored.sha256, image_id - job.first_image_id)


def transform_image(image: Image, data: bytes, transform: Transform) -> Iterator[bytes]:
    """Yields the JPEG of each copy of an image; an unchanged upright JPEG is the original bytes.

    Args:
        image: The source.
        data: Its original bytes.
        transform: What to do.
    """
    header = check_header(image.path, data)
    placement = transform.resize.place(image.width, image.height)
    keep = (
        placement == Placement(image.width, image.height, image.width, image.height)
        and not transform.grayscale
        and pixels.is_plain_jpeg(data, header)
    )
    copies = transform.copies
    if keep and copies[0] == ORIGINAL:
        yield data
        copies = copies[1:]
    for copied in make_copies(image, data, header, replace(transform, copies=copies)):
        yield pixels.encode_jpeg(copied)


def make_copies(
    image: Image, data: bytes, header: Header, transform: Transform
) -> Iterator[pixels.Pixels]:
    """Yields the pixels of each copy of an image.

    Args:
        image: The source.
        data: Its original bytes.
        header: Their header.
        transform: What to do.
    """
    placed: dict[Placement, pixels.Pixels] = {}
    for copy in transform.copies:
        placement = transform.resize.place(image.width, image.height, turned=copy.is_turned)
        if placement not in placed:
            target = (placement.width, placement.height)
            decoded = decode(image.path, data, header, target)
            resized = place_pixels(decoded, placement)
            placed[placement] = pixels.to_gray(resized) if transform.grayscale else resized
        yield transform_pixels(placed[placement], copy)


def copy_boxes(image: Image, transform: Transform) -> Iterator[tuple[Copy, int, int, Boxes]]:
    """Yields each copy of an image with its width, its height and its boxes, in pixels."""
    boxes = geometry.as_boxes(image.boxes)
    for copy in transform.copies:
        placement = transform.resize.place(image.width, image.height, turned=copy.is_turned)
        width, height = placement.canvas_width, placement.canvas_height
        placed = place_boxes(boxes, image.width, image.height, placement)
        moved = transform_boxes(placed, width, height, copy)
        width, height = transform_size(width, height, copy)
        yield copy, width, height, geometry.clip(moved, width, height)


@dataclass(slots=True)
class GroundTruth:
    """The COCO ground truth of one split, written as it is fed.

    Attributes:
        num_images: Images so far, copies included.
        num_boxes: Boxes so far.
    """

    images_path: Path
    annotations_path: Path
    num_images: int = 0
    num_boxes: int = 0

    def extend(self, sources: Iterable[Image], transform: Transform) -> None:
        """Appends the copies of some sources; sizes and boxes follow from the recipe alone."""
        with self.images_path.open("ab") as images, self.annotations_path.open("ab") as annotations:
            for source in sources:
                for entry, marks in self._copies(source, transform):
                    images.write((b"," if self.num_images else b"") + orjson.dumps(entry))
                    self.num_images += 1
                    for mark in marks:
                        annotations.write((b"," if self.num_boxes else b"") + orjson.dumps(mark))
                        self.num_boxes += 1

    def finish(self, class_names: Sequence[str], path: Path) -> None:
        """Writes the whole JSON document to `path`."""
        categories = [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)]
        with path.open("wb") as out:
            out.write(b'{"images":[')
            for part, following in (
                (self.images_path, b'],"annotations":['),
                (self.annotations_path, b'],"categories":' + orjson.dumps(categories) + b"}"),
            ):
                if part.exists():
                    with part.open("rb") as file:
                        while chunk := file.read(1 << 20):
                            out.write(chunk)
                out.write(following)

    def _copies(
        self, source: Image, transform: Transform
    ) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        for copy, width, height, boxes in copy_boxes(source, transform):
            image_id = self.num_images + 1
            entry = {
                "id": image_id,
                "file_name": f"{image_id:08d}.jpg",
                "width": width,
                "height": height,
                "source": {
                    "path": source.path,
                    "sha256": source.sha256,
                    "augmentation": copy.name,
                },
            }
            rows = zip(
                geometry.to_xywh(boxes).tolist(),
                geometry.areas(boxes).tolist(),
                source.class_ids,
                source.crowds or (False,) * len(source.class_ids),
                strict=True,
            )
            yield (
                entry,
                [
                    {
                        "id": self.num_boxes + number,
                        "image_id": image_id,
                        "category_id": class_id + 1,
                        "bbox": bbox,
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                    for number, (bbox, area, class_id, crowd) in enumerate(rows, start=1)
                ],
            )


def render_manifest(
    *,
    dataset_sha256: str,
    recipe: dict[str, Any],
    class_names: Sequence[str],
    splits: dict[str, dict[str, Any]],
) -> bytes:
    """Renders the manifest; keys are sorted, and it holds no names of resources and no times."""
    return orjson.dumps(
        {
            "format": FORMAT,
            "dataset_sha256": dataset_sha256,
            "recipe": recipe,
            "class_names": list(class_names),
            "counts": {name: split["num_images"] for name, split in splits.items()},
            "splits": splits,
            "libraries": {
                "opencv": cv2.__version__,
                "simplejpeg": installed_version("simplejpeg"),
                "numpy": np.__version__,
            },
        },
        option=orjson.OPT_SORT_KEYS,
    )


@lru_cache(maxsize=4)
def open_store(url: str) -> ObjectStore:
    """Opens an object store once per process."""
    return ObjectStore(url)


def _read_sources(store: ObjectStore, sources: Sequence[Image]) -> Iterator[tuple[Image, bytes]]:
    """Reads a few sources ahead, so that a slow store does not hold up the decoder."""
    waiting: deque[tuple[Image, Future[bytes]]] = deque()
    with ThreadPoolExecutor(_READ_AHEAD) as readers:
        for source in sources:
            waiting.append((source, readers.submit(read_source, store, source)))
            if len(waiting) >= _READ_AHEAD:
                image, reading = waiting.popleft()
                yield image, reading.result()
        for image, reading in waiting:
            yield image, reading.result()


def read_source(store: ObjectStore, source: Image) -> bytes:
    """Reads the original bytes of an image.

    Raises:
        DataLoss: They are gone or differ from their recorded hash.
    """
    data = store.get_range(source.shard_key, source.offset, source.size_bytes)
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise DataLoss(
            f"image {source.path} in stored object {source.shard_key} differs from what was"
            " imported; restore the object from a backup or import the dataset again",
            reason="OBJECT_LOST",
            metadata={"key": source.shard_key},
        )
    return data
