"""Pictures to compare and calibrate exported models with: some of the training split."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detflow.errors import DataLoss
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.trainer.worker.augment import PADDING_GREY
from services.trainer.worker.bundle import FORMAT, stored_object
from services.trainer.worker.evaluation import scaled

_SPLIT = "train"


def read_samples(
    store: ObjectStore, manifest: StoredObject, number: int, image_size: int
) -> NDArray[np.float32]:
    """Reads pictures of a bundle's training split; no more of it is fetched than needed.

    Args:
        store: The object store.
        manifest: Manifest of the bundle.
        number: Pictures, at most.
        image_size: Side of the square they are scaled to and padded, in pixels.

    Returns:
        RGB 0..1, shape (n, 3, image_size, image_size).

    Raises:
        DataLoss: The bundle is gone or damaged.
    """
    found = []
    for content in _contents(store, manifest):
        found.append(_letterbox(content, image_size))
        if len(found) == number:
            break
    if not found:
        raise DataLoss(f"bundle {manifest.key} has no training image", reason="BUNDLE_CORRUPT")
    return np.stack(found)


def draw_samples(number: int, image_size: int) -> NDArray[np.float32]:
    """Draws pictures of blobs with edges and noise, where there are no others: as above."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(number):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (image_size, image_size), interpolation=cv2.INTER_CUBIC)
        for _ in range(6):
            x, y, side = (int(value) for value in rng.integers(0, image_size, 3))
            colour = [int(value) for value in rng.integers(0, 256, 3)]
            cv2.rectangle(picture, (x, y), (x + side // 3, y + side // 2), colour, -1)
        noise = rng.integers(-10, 11, picture.shape)
        pixels = (picture.astype(np.int16) + noise).clip(0, 255).astype(np.float32) / 255
        drawn.append(pixels.transpose(2, 0, 1))
    return np.stack(drawn)


def samples_or_drawings(
    store: ObjectStore, manifest: StoredObject, number: int, image_size: int
) -> NDArray[np.float32]:
    """Returns pictures of the training split, or drawings if the bundle is not there any more."""
    try:
        return read_samples(store, manifest, number, image_size)
    except DataLoss as error:
        print(f"compared on drawings: {error}", file=sys.stderr)
        return draw_samples(number, image_size)


def _contents(store: ObjectStore, stored: StoredObject) -> Iterator[bytes]:
    """Yields the JPEG files of the split, shard by shard."""
    manifest: dict[str, Any] = json.loads(store.get(stored))
    if manifest.get("format") != FORMAT:
        raise DataLoss(
            f"bundle {stored.key} has format {manifest.get('format')!r}", reason="BUNDLE_FORMAT"
        )
    for shard in manifest["splits"][_SPLIT]["shards"]:
        with tarfile.open(fileobj=io.BytesIO(store.get(stored_object(shard)))) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    yield file.read()


def _letterbox(content: bytes, image_size: int) -> NDArray[np.float32]:
    """Decodes a picture, scales its longest side to `image_size` and pads it to a square."""
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise DataLoss("a bundle image cannot be decoded", reason="BUNDLE_CORRUPT")
    picture = scaled(pixels, image_size)
    height, width = picture.shape[:2]
    square = np.full((image_size, image_size, 3), PADDING_GREY, dtype=np.uint8)
    top, left = (image_size - height) // 2, (image_size - width) // 2
    square[top : top + height, left : left + width] = picture
    return np.divide(square.transpose(2, 0, 1), 255, dtype=np.float32)
