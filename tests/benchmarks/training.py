"""Our training worker against the `yolo train` command: same images, recipe and epochs."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detflow.local import nats as local_nats
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject

CLASS_NAMES = ("circle", "square", "triangle")
SIZE_PX = (160, 120)

_RECIPE: Mapping[str, float | bool | str] = {
    "image_size": 128,
    "optimizer": "AdamW",
    "lr0": 0.003,
    "warmup_epochs": 1,
    "cos_lr": True,
    "mosaic": 1,
    "close_mosaic": 2,
    "nominal_batch_size": 16,
    "momentum": 0.937,
}
_LIBRARY_RECIPE = (
    "imgsz=128 optimizer=AdamW lr0=0.003 warmup_epochs=1 cos_lr=True mosaic=1 close_mosaic=2 "
    "nbs=16 momentum=0.937 batch=16 pretrained=False device=cpu amp=False"
)


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


def run(quick: bool = False) -> dict[str, Any]:
    """Trains the quick recipe with both.

    Args:
        quick: Three epochs only, to see that it works.

    Returns:
        Seconds (wall and CPU, everything included) and last mAP50 of both, and the ratios ours /
        theirs.
    """
    epochs = 3 if quick else 12
    with tempfile.TemporaryDirectory(prefix="detflow-training-") as name:
        folder = Path(name)
        store_url = f"file://{folder / 'store'}"
        counts = {"train": 240, "val": 40, "test": 40}
        manifest = write_bundle(ObjectStore(store_url), counts, folder / "yolo")
        theirs = _run_library(folder, epochs)
        with _nats(folder / "nats") as nats_url:
            ours = _run_worker(folder, manifest, epochs, nats_url, store_url)
    return {
        "epochs": epochs,
        "counts": counts,
        "ours": ours,
        "yolo_train": theirs,
        "wall_ratio": round(ours["wall_seconds"] / theirs["wall_seconds"], 3),
        "cpu_ratio": round(ours["cpu_seconds"] / theirs["cpu_seconds"], 3),
    }


def _run_library(folder: Path, epochs: int) -> dict[str, float]:
    settings = folder / "settings"
    settings.mkdir()
    environment = {"YOLO_CONFIG_DIR": str(settings), "YOLO_OFFLINE": "true"}
    command = [
        str(Path(sys.executable).parent / "yolo"),
        "train",
        "model=yolov8n.yaml",
        f"data={folder / 'yolo' / 'data.yaml'}",
        f"epochs={epochs}",
        f"project={folder}",
        "name=theirs",
        "plots=False",
        *_LIBRARY_RECIPE.split(),
    ]
    figures = _measure(command, environment)
    with (folder / "theirs" / "results.csv").open() as file:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(file)]
    return figures | {"map50": float(rows[-1]["metrics/mAP50(B)"])}


def _run_worker(
    folder: Path, manifest: StoredObject, epochs: int, nats_url: str, store_url: str
) -> dict[str, float]:
    work = folder / "ours"
    work.mkdir()
    spec = work / "spec.json"
    spec.write_text(spec_json(manifest, epochs=epochs, hyperparameters=_RECIPE))
    environment = {
        "DETFLOW_NATS_URL": nats_url,
        "DETFLOW_STORE_URL": store_url,
        "DETFLOW_DATA_DIR": str(folder / "data"),
    }
    with _Records(nats_url) as records:
        figures = _measure(
            [sys.executable, "-m", "services.trainer.worker", str(spec)], environment
        )
    return figures | {"map50": records.last_map50}


def _measure(command: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Runs a command; returns its wall seconds and the CPU seconds of it and its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{command[:3]} exited with {done.returncode}: {done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


@contextlib.contextmanager
def _nats(folder: Path) -> Iterator[str]:
    server = local_nats.prepare(folder)
    process = server.start(folder / "nats.log")
    try:
        yield server.url
    finally:
        process.terminate()
        process.wait()


class _Records:
    """Reads the worker's records as the trainer would, to learn its last mAP50."""

    def __init__(self, url: str) -> None:
        self.last_map50 = 0.0
        self._url = url
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Records:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import asyncio

        asyncio.run(self._read())

    async def _read(self) -> None:
        import asyncio

        import nats

        from detflow.v1.worker_pb2 import WorkerRecord

        client = await nats.connect(self._url)
        stream = client.jetstream()
        await stream.add_stream(name="DETFLOW_RECORDS", subjects=["detflow.records.>"])
        self._ready.set()
        await asyncio.to_thread(self._stop.wait)
        info = await stream.stream_info("DETFLOW_RECORDS")
        for seq in range(1, info.state.messages + 1):
            message = await stream.get_msg("DETFLOW_RECORDS", seq)
            record = WorkerRecord.FromString(message.data or b"")
            if record.HasField("epoch"):
                self.last_map50 = round(record.epoch.metrics.values["val/map50"], 4)
        await client.close()


if __name__ == "__main__":
    print(json.dumps(run(quick="--quick" in sys.argv), indent=2))
