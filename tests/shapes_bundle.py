"""A bundle of drawn shapes, as the preprocess service would make it: for tests and benchmarks."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject

CLASS_NAMES = ("circle", "square", "triangle")
SIZE_PX = (160, 120)


@dataclass(frozen=True, slots=True)
class Shape:
    """A labelled shape: class index and its box (x, y, width, height) in pixels."""

    label: int
    box: tuple[int, int, int, int]


def draw(rng: np.random.Generator) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[Shape]]:
    """Draws one to four shapes on a textured background: BGR pixels and labels."""
    width, height = SIZE_PX
    coarse = rng.integers(60, 150, (height // 8, width // 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    image = np.clip(image + rng.integers(-12, 13, image.shape), 0, 255).astype(np.uint8)
    shapes: list[Shape] = []
    for _ in range(int(rng.integers(1, 5))):
        side = int(rng.integers(height // 5, height // 2))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        if any(
            x < left + other and left < x + side and y < top + other and top < y + side
            for left, top, other, _ in (shape.box for shape in shapes)
        ):
            continue
        label = int(rng.integers(len(CLASS_NAMES)))
        colour = [int(value) for value in rng.integers(0, 60, 3)]
        colour[label] = int(rng.integers(180, 256))
        corner = (x + side - 1, y + side - 1)
        if label == 0:
            cv2.circle(image, (x + side // 2, y + side // 2), side // 2, colour, -1, cv2.LINE_AA)
        elif label == 1:
            cv2.rectangle(image, (x, y), corner, colour, -1)
        else:
            points = np.array([(x, corner[1]), corner, (x + side // 2, y)])
            cv2.fillPoly(image, [points], colour, cv2.LINE_AA)
        shapes.append(Shape(label, (x, y, side, side)))
    return image, shapes


def write_bundle(
    store: ObjectStore, counts: Mapping[str, int], folder: Path | None = None, seed: int = 0
) -> StoredObject:
    """Puts a bundle of drawn shapes into a store and, for the library, the same images in YOLO's
    layout into a folder.

    Args:
        store: Where the bundle goes.
        counts: Images of train, val and test.
        folder: Where YOLO's layout goes, if anywhere.
        seed: Of the drawing.

    Returns:
        The manifest.
    """
    rng = np.random.default_rng(seed)
    splits: dict[str, Any] = {}
    for name, count in counts.items():
        tar, truth = io.BytesIO(), _Truth()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for image_id in range(1, count + 1):
                pixels, shapes = draw(rng)
                jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
                member = tarfile.TarInfo(f"{image_id:08d}.jpg")
                member.size = len(jpeg)
                archive.addfile(member, io.BytesIO(jpeg))
                truth.add(image_id, shapes)
                if folder is not None:
                    _write_yolo(folder / name, image_id, jpeg, shapes)
        shard = _put(store, "bundles/shards/{}.tar", tar.getvalue()) if count else None
        splits[name] = {
            "num_images": count,
            "num_boxes": len(truth.annotations),
            "shards": [_entry(shard) | {"num_images": count}] if shard else [],
            "ground_truth": _entry(
                _put(store, "bundles/ground-truth/{}.json", truth.to_json().encode())
            ),
        }
    if folder is not None:
        lines = [f"path: {folder}", *(f"{name}: {name}/images" for name in counts)]
        (folder / "data.yaml").write_text("\n".join([*lines, f"names: {list(CLASS_NAMES)}\n"]))
    manifest = {
        "format": "detflow-bundle/1",
        "dataset_sha256": "0" * 64,
        "recipe": {},
        "class_names": list(CLASS_NAMES),
        "counts": dict(counts),
        "splits": splits,
        "libraries": {},
    }
    return _put(store, "bundles/manifests/{}.json", json.dumps(manifest).encode())


class _Truth:
    """COCO ground truth of a split."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, image_id: int, shapes: list[Shape]) -> None:
        width, height = SIZE_PX
        name = f"{image_id:08d}.jpg"
        self.images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for shape in shapes:
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": shape.label + 1,
                    "bbox": [float(value) for value in shape.box],
                    "area": float(shape.box[2] * shape.box[3]),
                    "iscrowd": 0,
                }
            )

    def to_json(self) -> str:
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)]
        return json.dumps(
            {"images": self.images, "annotations": self.annotations, "categories": categories}
        )


def _write_yolo(folder: Path, image_id: int, jpeg: bytes, shapes: list[Shape]) -> None:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "images" / f"{image_id:08d}.jpg").write_bytes(jpeg)
    width, height = SIZE_PX
    rows = []
    for shape in shapes:
        x, y, w, h = shape.box
        centre = (x + w / 2) / width, (y + h / 2) / height
        numbers = " ".join(f"{value:.6f}" for value in (*centre, w / width, h / height))
        rows.append(f"{shape.label} {numbers}\n")
    (folder / "labels" / f"{image_id:08d}.txt").write_text("".join(rows))


def _put(store: ObjectStore, pattern: str, content: bytes) -> StoredObject:
    return store.put_if_absent(pattern.format(hashlib.sha256(content).hexdigest()), content)


def _entry(stored: StoredObject) -> dict[str, Any]:
    return {"key": stored.key, "size_bytes": stored.size_bytes, "sha256": stored.sha256}


def spec_json(
    manifest: StoredObject, *, epochs: int, hyperparameters: Mapping[str, Any], **more: Any
) -> str:
    """Writes a WorkerSpec for one attempt at training yolov8n; `more` replaces its fields."""
    spec = {
        "training": "projects/p/versions/v/trainings/t1",
        "attempt": 1,
        "model": "yolov8n",
        "batchSize": 16,
        "epochs": epochs,
        "hyperparameters": dict(hyperparameters),
        "manifest": {
            "key": manifest.key,
            "sizeBytes": str(manifest.size_bytes),
            "sha256": manifest.sha256,
        },
    }
    return json.dumps(spec | more)
