"""Training from 1920x1080 images: what preprocessing them once saves in every epoch.

`yolo train` decodes and scales the files in every epoch; ours trains from a bundle made with
max_side_px. Measured are whole epochs, where the network computes too, and loaders alone: what a
device that computes faster than images are made would wait for.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import nats
import numpy as np
import psutil

from detflow.resize import Resize
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import WorkerRecord
from services.preprocess.bundle import GroundTruth, Transform, render_manifest, transform_image
from services.preprocess.domain import Image
from tests.benchmarks.training import _nats
from tests.shapes_bundle import spec_json

_SIZE = (1920, 1080)
_CLASSES = ("a", "b")
_NUM_BOXES = 4
BATCH_SIZE = 4
"""The library keeps the images of the last eight batches: these must be few of all."""
_POLL_SECONDS = 0.02
_RECIPE: Mapping[str, float | str] = {"optimizer": "AdamW", "lr0": 0.002, "warmup_epochs": 0}
HYPERPARAMETERS = {**_RECIPE, "close_mosaic": 0, "nominal_batch_size": BATCH_SIZE, "patience": 0}
_LIBRARY_ARGUMENTS = (
    *(f"{name}={value}" for name, value in _RECIPE.items()),
    *("close_mosaic=0", f"nbs={BATCH_SIZE}", f"batch={BATCH_SIZE}", "device=cpu", "amp=False"),
    *("plots=False", "pretrained=False", "model=yolov8n.yaml"),
)


def run(quick: bool = False) -> dict[str, Any]:
    """Trains yolov8n at 640 and at 160 px with both, epoch by epoch in turn; then loads only.

    Args:
        quick: Few images and two epochs, to see that it works.

    Returns:
        Seconds of an epoch after the first (medians), of all until the end of the first, and of
        preprocessing once; images per CPU second of each loader; and the ratios ours / theirs.
    """
    counts = {"train": 16, "val": 4} if quick else {"train": 128, "val": 32}
    epochs = 2 if quick else 4
    figures: dict[str, Any] = {"counts": counts, "epochs": epochs}
    with tempfile.TemporaryDirectory(prefix="detflow-large-") as name:
        folder = Path(name)
        sources = {split: _write_sources(folder, split, count) for split, count in counts.items()}
        for side in (640, 160):
            work = folder / str(side)
            bundle = _preprocess(folder, work, sources, side)
            figures[f"preprocess_{side}"] = bundle.figures
            if side == 640:
                figures["loaders_640"] = _loaders(folder, bundle.manifest)
            figures[f"epoch_{side}"] = asyncio.run(
                _race(folder, work, bundle.manifest, side, epochs)
            )
    return figures


def _write_sources(folder: Path, split: str, count: int) -> list[Image]:
    """Writes JPEGs with some rectangles, in YOLO's layout; returns them as a dataset has them."""
    rng = np.random.default_rng(len(split))
    sources = []
    for kind in ("images", "labels"):
        (folder / "yolo" / split / kind).mkdir(parents=True)
    for number in range(count):
        coarse = rng.integers(0, 256, (68, 120, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, _SIZE, interpolation=cv2.INTER_CUBIC) // 2
        pixels += rng.integers(0, 24, pixels.shape, dtype=np.uint8)
        classes, boxes, rows = [], [], []
        for _ in range(_NUM_BOXES):
            width, height = (int(rng.integers(60, 300)) for _ in "wh")
            x, y = int(rng.integers(_SIZE[0] - width)), int(rng.integers(_SIZE[1] - height))
            label = int(rng.integers(len(_CLASSES)))
            colour = (255, 0, 0) if label else (0, 0, 255)
            cv2.rectangle(pixels, (x, y), (x + width - 1, y + height - 1), colour, -1)
            classes.append(label)
            boxes += [float(x), float(y), float(x + width), float(y + height)]
            shares = (x + width / 2) / _SIZE[0], (y + height / 2) / _SIZE[1]
            rows.append(f"{label} {shares[0]} {shares[1]} {width / _SIZE[0]} {height / _SIZE[1]}\n")
        path = folder / "yolo" / split / "images" / f"{number:04d}.jpg"
        path.write_bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
        path.parent.with_name("labels").joinpath(f"{number:04d}.txt").write_text("".join(rows))
        sources.append(
            Image(
                path=str(path),
                sha256="",
                width=_SIZE[0],
                height=_SIZE[1],
                shard_key="",
                offset=0,
                size_bytes=path.stat().st_size,
                class_ids=tuple(classes),
                boxes=tuple(boxes),
            )
        )
    (folder / "yolo" / "data.yaml").write_text(
        f"path: {folder / 'yolo'}\ntrain: train/images\nval: val/images\nnames: {list(_CLASSES)}\n"
    )
    return sources


@dataclass(frozen=True, slots=True)
class _Preprocessed:
    manifest: StoredObject
    figures: dict[str, float]


def _preprocess(
    folder: Path, work: Path, sources: Mapping[str, Sequence[Image]], side: int
) -> _Preprocessed:
    """Makes a bundle with the code of the service, in one process; and YOLO's layout of it."""
    store = ObjectStore(f"file://{folder / 'store'}")
    transform = Transform(resize=Resize(side))
    cv2.setNumThreads(1)
    seconds, splits = 0.0, dict[str, Any]()
    for split, images in (*sources.items(), ("test", ())):
        tar = io.BytesIO()
        (work / split / "images").mkdir(parents=True)
        if images:
            os.symlink(folder / "yolo" / split / "labels", work / split / "labels")
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for number, image in enumerate(images, start=1):
                data, began = Path(image.path).read_bytes(), time.process_time()
                (jpeg,) = transform_image(image, data, transform)
                seconds += time.process_time() - began
                (work / split / "images" / Path(image.path).name).write_bytes(jpeg)
                member = tarfile.TarInfo(f"{number:08d}.jpg")
                member.size = len(jpeg)
                archive.addfile(member, io.BytesIO(jpeg))
        shard = store.put(f"{side}/{split}.tar", tar.getvalue())
        truth = GroundTruth(work / "images.json", work / "annotations.json")
        truth.extend(images, transform)
        truth.finish(_CLASSES, work / "truth.json")
        for part in ("images.json", "annotations.json"):
            (work / part).unlink(missing_ok=True)
        splits[split] = {
            "num_images": len(images),
            "num_boxes": truth.num_boxes,
            "shards": [_entry(shard) | {"num_images": len(images)}] if images else [],
            "ground_truth": _entry(store.put(f"{side}/{split}.json", work / "truth.json")),
        }
    manifest = render_manifest(
        dataset_sha256="0" * 64, recipe={}, class_names=_CLASSES, splits=splits
    )
    (work / "data.yaml").write_text(
        f"path: {work}\ntrain: train/images\nval: val/images\nnames: {list(_CLASSES)}\n"
    )
    stored = store.put(f"{side}/manifest.json", manifest)
    num_images = sum(map(len, sources.values()))
    return _Preprocessed(
        stored,
        {"cpu_seconds": round(seconds, 2), "images_per_cpu_second": round(num_images / seconds, 1)},
    )


def _entry(stored: StoredObject) -> dict[str, Any]:
    return {"key": stored.key, "size_bytes": stored.size_bytes, "sha256": stored.sha256}


class _Racer:
    """A training as a process that is stopped while it is not its turn.

    Args:
        command: What to run.
        environment: Added to this process's.
        log: Where its output goes.
        next_epoch: Waits for the end of its next epoch.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        next_epoch: Callable[[], Awaitable[None]],
    ) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=output, stderr=output
            )
        self._process.send_signal(signal.SIGSTOP)
        self._usage = psutil.Process(self._process.pid)
        self._next_epoch = next_epoch
        self._log = log
        self.wall_seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    async def run_epoch(self) -> None:
        """Lets it run until an epoch ends: training, validation and what is saved."""
        began, cpu_before = time.monotonic(), self._cpu_seconds()
        self._process.send_signal(signal.SIGCONT)
        waiting = asyncio.ensure_future(self._next_epoch())
        while not waiting.done():
            await asyncio.wait([waiting], timeout=1)
            if self._process.poll() is not None and not waiting.done():
                waiting.cancel()
                raise RuntimeError(f"ended early: {self._log.read_text()[-2000:]}")
        await waiting
        self._process.send_signal(signal.SIGSTOP)
        self.wall_seconds.append(time.monotonic() - began)
        self.cpu_seconds.append(self._cpu_seconds() - cpu_before)

    def end(self) -> None:
        """Kills it."""
        self._process.kill()
        self._process.wait()

    def figures(self) -> dict[str, float]:
        """Returns the seconds until the end of the first epoch and those of one after it."""
        return {
            "first_wall_seconds": round(self.wall_seconds[0], 2),
            "first_cpu_seconds": round(self.cpu_seconds[0], 2),
            "wall_seconds": round(statistics.median(self.wall_seconds[1:]), 2),
            "cpu_seconds": round(statistics.median(self.cpu_seconds[1:]), 2),
        }

    def _cpu_seconds(self) -> float:
        times = self._usage.cpu_times()
        return float(times.user + times.system)


async def _race(
    folder: Path, work: Path, manifest: StoredObject, side: int, epochs: int
) -> dict[str, Any]:
    """Trains with both from the start of the process, an epoch each in turn."""
    spec = work / "spec.json"
    hyperparameters = {**HYPERPARAMETERS, "image_size": side}
    spec.write_text(
        spec_json(manifest, epochs=epochs, hyperparameters=hyperparameters, batchSize=BATCH_SIZE)
    )
    settings = work / "settings"
    settings.mkdir()
    with _nats(work / "nats") as url:
        client = await nats.connect(url)
        await client.jetstream().add_stream(name="RECORDS", subjects=["detflow.records.>"])
        records = await client.subscribe("detflow.records.>")

        last_epoch = 0

        async def next_record() -> None:
            nonlocal last_epoch
            while True:
                message = await records.next_msg(timeout=None)
                epoch = WorkerRecord.FromString(message.data).epoch.metrics.epoch
                # A record comes twice if its receipt came while the worker was stopped.
                if epoch > last_epoch:
                    last_epoch = epoch
                    return

        results, num_seen = work / "theirs" / "results.csv", 0

        async def next_row() -> None:
            nonlocal num_seen
            while not results.exists() or results.read_text().count("\n") < num_seen + 2:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_SECONDS)  # nobody is told
            num_seen += 1

        ours = _Racer(
            [sys.executable, "-m", "services.trainer.worker", str(spec)],
            {
                "DETFLOW_NATS_URL": url,
                "DETFLOW_STORE_URL": f"file://{folder / 'store'}",
                "DETFLOW_DATA_DIR": str(work / "data"),
            },
            work / "ours.log",
            next_record,
        )
        theirs = _Racer(
            [
                *(str(Path(sys.executable).with_name("yolo")), "train"),
                *(f"data={folder / 'yolo' / 'data.yaml'}", f"imgsz={side}", f"epochs={epochs}"),
                *(f"project={work}", "name=theirs", *_LIBRARY_ARGUMENTS),
            ],
            {"YOLO_CONFIG_DIR": str(settings), "YOLO_OFFLINE": "true"},
            work / "theirs.log",
            next_row,
        )
        try:
            for _ in range(epochs):
                await ours.run_epoch()
                await theirs.run_epoch()
        finally:
            ours.end()
            theirs.end()
        await client.close()
    return _compared(ours.figures(), theirs.figures())


def _compared(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    return {
        "ours": ours,
        "yolo_train": theirs,
        **{
            f"{kind}_ratio": round(ours[f"{kind}_seconds"] / theirs[f"{kind}_seconds"], 3)
            for kind in ("wall", "cpu")
        },
    }


def _loaders(folder: Path, manifest: StoredObject) -> dict[str, Any]:
    """Measures the loaders alone, in a process as the worker's is."""
    stored = json.dumps(_entry(manifest))
    command = [sys.executable, "-m", "tests.benchmarks.large_image_loaders", str(folder), stored]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"loaders: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
