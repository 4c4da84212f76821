"""Import and preprocessing, images per second, with the code the service runs.

Measured per process of the pool, without Postgres and NATS: both are a constant few milliseconds
per shard.
"""

from __future__ import annotations

import tempfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np

from detflow.resize import Resize
from services.preprocess.archive import Limits, list_entries, read_entry
from services.preprocess.augment import ORIGINAL, Augmentation, Copy
from services.preprocess.bundle import ShardJob, Transform, make_shard, plan_shards
from services.preprocess.checking import CheckJob, SampleEntry, check_samples
from services.preprocess.domain import Image
from services.preprocess.formats import find_layout

NUM_IMAGES = 64
SIZE = (1920, 1080)
LABEL = b"0 0.5 0.5 0.25 0.25\n1 0.2 0.3 0.1 0.2\n"


def run() -> dict[str, float]:
    """Measures one process on generated 1080p JPEGs.

    Returns:
        Images per second by what was done. Augmented copies count as images made.
    """
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        return _measure(Path(folder))


def _measure(folder: Path) -> dict[str, float]:
    archive = folder / "archive.zip"
    _write_archive(archive)
    store_url = f"file://{folder}/store"
    start = time.perf_counter()
    entries = list_entries(archive, Limits())
    with archive.open("rb") as file:
        layout = find_layout(entries, lambda path: read_entry(file, entries[path], Limits()))
    job = CheckJob(
        archive=archive,
        limits=Limits(),
        layout_format=layout.format,
        num_classes=2,
        samples=tuple(
            SampleEntry(entries[s.image], entries[s.label] if s.label else None)
            for s in layout.samples
        ),
        store_url=store_url,
        shard_key="datasets/d/00000.tar",
        scratch=folder,
    )
    checked = check_samples(job).images
    results = {"import": NUM_IMAGES / (time.perf_counter() - start)}

    sources = tuple(
        Image(
            path=i.path,
            sha256=i.sha256,
            width=i.width,
            height=i.height,
            shard_key=i.shard_key,
            offset=i.offset,
            size_bytes=i.size_bytes,
            class_ids=tuple(int(c) for c in i.classes),
            boxes=i.boxes,
        )
        for i in checked
    )
    (plan, *_) = plan_shards("train", range(NUM_IMAGES), [1] * NUM_IMAGES, 1)
    as_it_is = Transform()
    recipes = {
        "copy": as_it_is,
        "resize to 640": Transform(resize=Resize(640)),
        "resize to 640, six copies": Transform(
            resize=Resize(640), copies=(ORIGINAL, *map(Copy, list(Augmentation)[1:6]))
        ),
    }
    for name, transform in recipes.items():
        start = time.perf_counter()
        shard = make_shard(
            ShardJob(
                plan=plan,
                store_url=store_url,
                scratch=folder,
                first_image_id=1,
                sources=sources,
                transform=transform,
            )
        )
        results[name] = shard.num_images / (time.perf_counter() - start)
    return results


def _write_archive(path: Path) -> None:
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("data.yaml", "names: [a, b]\n")
        for i in range(NUM_IMAGES):
            noise = rng.integers(0, 256, (68, 120, 3), dtype=np.uint8)
            pixels = cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC)
            grain = rng.integers(0, 8, pixels.shape, dtype=np.uint8)
            encoded = cv2.imencode(".jpg", pixels // 2 + grain, [cv2.IMWRITE_JPEG_QUALITY, 90])
            archive.writestr(f"images/{i:04d}.jpg", bytes(encoded[1]))
            archive.writestr(f"labels/{i:04d}.txt", LABEL)
