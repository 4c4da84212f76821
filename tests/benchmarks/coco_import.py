"""Import of a COCO file with a million boxes: seconds and peak memory of one process.

The code of the service, without Postgres and NATS. It runs in a process of its own, so that the
peak is that of the import alone.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

NUM_BOXES = 1_000_000
NUM_IMAGES = 20_000
NUM_CLASSES = 80
SIZE = (64, 48)


def run(*, quick: bool = False) -> dict[str, float]:
    """Measures an archive of small images, with a polygon of eight points for each box.

    Returns:
        Megabytes of the JSON; seconds and peak resident megabytes of the file alone (found in the
        archive, read, paired with the images) and of the whole import with every image decoded.
    """
    scale = 50 if quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size_bytes = _write_archive(folder / "archive.zip", scale)
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_import, args=(folder, sender))
        process.start()
        sender.close()
        try:
            measured: dict[str, float] = receiver.recv()
        finally:
            process.join()
    return {"JSON, MB": size_bytes / 1e6, **measured}


def _import(folder: Path, sender: multiprocessing.connection.Connection) -> None:
    from services.preprocess.archive import Limits, list_entries, read_entry
    from services.preprocess.checking import (
        CheckedImage,
        CheckJob,
        SampleEntry,
        check_samples,
        group_samples,
    )
    from services.preprocess.domain import describe
    from services.preprocess.formats import find_layout
    from services.preprocess.importer import number_classes
    from services.preprocess.statistics import count_dataset

    cv2.setNumThreads(1)
    archive, limits = folder / "archive.zip", Limits()
    start = time.perf_counter()
    entries = list_entries(archive, limits)
    with archive.open("rb") as file:
        layout = find_layout(entries, lambda path: read_entry(file, entries[path], limits))
    measured = {
        "file, s": time.perf_counter() - start,
        "file, CPU s": time.process_time(),
        "file, peak MB": _peak_mb(),
    }
    samples = [
        SampleEntry(entries[s.image], entries[s.label] if s.label else None, s.split, s.rows)
        for s in layout.samples
    ]
    checked: list[CheckedImage] = []
    for number, group in enumerate(group_samples(samples)):
        job = CheckJob(
            archive=archive,
            limits=limits,
            layout_format=layout.format,
            num_classes=NUM_CLASSES,
            samples=group,
            store_url=f"file://{folder}/store",
            shard_key=f"datasets/d/{number:05d}.tar",
            scratch=folder,
        )
        checked.extend(check_samples(job).images)
    names, images = number_classes(layout, checked)
    statistics = describe(images, len(names))
    count_dataset(images, names)
    sender.send(
        {
            **measured,
            "whole import, s": time.perf_counter() - start,
            "whole import, CPU s": time.process_time(),
            "whole import, peak MB": _peak_mb(),
            "boxes": float(statistics.num_boxes),
        }
    )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _write_archive(path: Path, scale: int) -> int:
    image = cv2.imencode(".jpg", np.full((SIZE[1], SIZE[0], 3), 90, np.uint8))[1].tobytes()
    num_images = NUM_IMAGES // scale
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        size_bytes = 0
        with archive.open("annotations/instances_train.json", "w") as file:
            for part in _document(num_images, NUM_BOXES // scale):
                size_bytes += file.write(part.encode())
        for i in range(num_images):
            archive.writestr(f"train/{i:08d}.jpg", image)
    return size_bytes


def _document(num_images: int, num_boxes: int) -> Iterator[str]:
    rng = random.Random(0)
    yield '{"info": {}, "licenses": [], "images": [\n'
    for i in range(num_images):
        entry = {"id": i, "file_name": f"{i:08d}.jpg", "width": SIZE[0], "height": SIZE[1]}
        yield ("," if i else "") + json.dumps(entry)
    yield '], "annotations": [\n'
    for i in range(num_boxes):
        x, y = rng.random() * 40, rng.random() * 30
        width, height = 2 + rng.random() * 20, 2 + rng.random() * 15
        entry = {
            "id": i,
            "image_id": i * num_images // num_boxes,
            "category_id": rng.randrange(NUM_CLASSES),
            "segmentation": [[round(rng.random() * 48, 2) for _ in range(16)]],
            "area": width * height,
            "bbox": [round(v, 2) for v in (x, y, width, height)],
            "iscrowd": int(i % 500 == 0),
        }
        yield ("," if i else "") + json.dumps(entry)
    categories = [{"id": i, "name": f"class {i}"} for i in range(NUM_CLASSES)]
    yield f'], "categories": {json.dumps(categories)}}}'
