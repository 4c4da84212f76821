"""All that is needed to make a version again elsewhere, as one JSON document made while it is sent.

Everything comes from the bundle: its manifest, and of the ground truth which images each split has.
So it can be had for as long as the version is there, whatever became of its dataset.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shlex
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import orjson

from detflow.errors import FailedPrecondition
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.preprocess.domain import SPLITS, Dataset, Preprocessing, PreprocessingState

FORMAT = "detflow-replay/1"

_READ_CHARACTERS = 1 << 20
_ENTRY_CHARACTERS = 1 << 16  # more than the entry of an image has
_IMAGES_AT_ONCE = 5000


async def replay(
    store: ObjectStore, folder: Path, preprocessing: Preprocessing, dataset: Dataset | None
) -> AsyncIterator[bytes]:
    """Yields the document piece by piece; the images come last, one in a line.

    Args:
        store: Object store.
        folder: Empty folder for what is read.
        preprocessing: That of the version.
        dataset: Its dataset; None if that was deleted.

    Raises:
        FailedPrecondition: VERSION_HAS_NO_BUNDLE.
        DataLoss: A part of the bundle is gone or differs from its hash.
    """
    if preprocessing.state is not PreprocessingState.SUCCEEDED or not preprocessing.manifest:
        raise FailedPrecondition(
            f"{preprocessing.version_name} has no bundle: its preprocessing is"
            f" {preprocessing.state}; wait for it, or make another version",
            reason="VERSION_HAS_NO_BUNDLE",
            metadata={"state": preprocessing.state},
        )
    stored = StoredObject.FromString(preprocessing.manifest)
    manifest = orjson.loads(await asyncio.to_thread(store.get, stored))
    head = orjson.dumps(
        _describe(preprocessing, stored, manifest, dataset), option=orjson.OPT_INDENT_2
    )
    yield head.removesuffix(b"\n}") + b',\n  "images": ['
    separator = b"\n"
    for split in SPLITS:
        truth = manifest["splits"][split]["ground_truth"]
        path = folder / f"{split}.json"
        await asyncio.to_thread(store.download, StoredObject(**truth), path)
        images = _images(path)
        while batch := await asyncio.to_thread(_take, images):
            lines = [
                orjson.dumps({"path": path, "sha256": sha256, "split": split})
                for path, sha256 in batch
            ]
            yield separator + b",\n".join(lines)
            separator = b",\n"
        path.unlink()
    yield b"\n  ]\n}\n"


def _describe(
    preprocessing: Preprocessing,
    stored: StoredObject,
    manifest: dict[str, Any],
    dataset: Dataset | None,
) -> dict[str, Any]:
    """Returns everything but the images."""
    name = shlex.quote(dataset.display_name) if dataset else "DATASET"
    download = [f"detflow datasets download {name} -o ARCHIVE.zip"] if dataset else []
    return {
        "format": FORMAT,
        "version": preprocessing.version_name,
        "detflow": installed_version("detflow"),
        "libraries": manifest["libraries"],
        "commands": [
            *download,
            f"detflow datasets import ARCHIVE.zip --name {name}",
            f"detflow versions create --replay THIS_FILE --dataset {name}",
        ],
        "dataset": {
            "display_name": dataset.display_name if dataset else None,
            "content_sha256": manifest["dataset_sha256"],
        },
        "class_names": manifest["class_names"],
        "recipe": manifest["recipe"],
        "seed": int(manifest["recipe"]["seed"]),
        "manifest": {
            "key": stored.key,
            "size_bytes": stored.size_bytes,
            "sha256": stored.sha256,
        },
        "num_images": manifest["counts"],
        "shards": [
            {"split": split, **shard}
            for split in SPLITS
            for shard in manifest["splits"][split]["shards"]
        ],
    }


def _images(path: Path) -> Iterator[tuple[str, str]]:
    """Yields path and hash of the images that a split was made of, without their copies.

    The list of images is the first thing in a ground truth, and the rest is not read: it can be
    much larger than the list.
    """
    decoder = json.JSONDecoder()
    before = ""
    with path.open(encoding="utf-8") as file:
        text = file.read(_READ_CHARACTERS)
        position = text.index("[") + 1
        while text[position] != "]":
            if text[position] == ",":
                position += 1
            entry, position = decoder.raw_decode(text, position)
            source = entry["source"]
            if source["path"] != before:  # a source is followed by its copies
                yield source["path"], source["sha256"]
                before = source["path"]
            if len(text) - position < _ENTRY_CHARACTERS:
                text, position = text[position:] + file.read(_READ_CHARACTERS), 0


def _take(images: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(itertools.islice(images, _IMAGES_AT_ONCE))
