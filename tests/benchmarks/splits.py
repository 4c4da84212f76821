"""Splits and near duplicates: CPU time for 100,000 images, how even classes are, what is found.

What is found is measured on the blood-cell images beside the repository, if they are there: each
image with a copy of it that was changed.
"""

from __future__ import annotations

import re
import time
import zipfile
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detflow.images import to_gray
from services.preprocess.duplicates import find_duplicates
from services.preprocess.images import verify
from services.preprocess.looks import perceptual_hash
from services.preprocess.outlines import Outlines
from services.preprocess.split import Split, assign
from tests.preprocess_samples import BCCD

NUM_IMAGES = 100_000
NUM_CLASSES = 80
SHARES = (70, 20, 10)
_TWICE = ("BloodImage_00037", "BloodImage_00038")  # one scene, photographed twice

_Pixels = NDArray[np.uint8]


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measures one process.

    Args:
        quick: Fewer images.

    Returns:
        Processor seconds; the largest and the mean distance of a class's share of a split from the
        split's share of the images, in percentage points; by change, the share of copies found.
    """
    num_images = NUM_IMAGES // 50 if quick else NUM_IMAGES
    outlines = _made_up(num_images)
    hashes = np.random.default_rng(1).integers(0, 1 << 63, num_images, dtype=np.int64)
    start = time.process_time()
    find_duplicates(hashes, outlines.contents)
    found = time.process_time()
    split = assign(outlines, SHARES, 0)
    figures: dict[str, Any] = {
        "images": num_images,
        "near duplicates, CPU s": round(found - start, 1),
        "split, CPU s": round(time.process_time() - found, 1),
        "classes, points off": _points_off(outlines, split),
        "at random": _points_off(outlines, _at_random(num_images)),
    }
    if BCCD.exists():
        figures |= _cells(quick)
    return figures


def _cells(quick: bool) -> dict[str, Any]:
    with zipfile.ZipFile(BCCD) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))[: 40 if quick else None]
        data = {name: archive.read(name) for name in names}
        marks = [
            archive.read(name.replace("JPEGImages", "Annotations").replace(".jpg", ".xml"))
            for name in names
        ]
    outlines = Outlines()
    classes: dict[bytes, int] = {}
    for number, xml in enumerate(marks):
        of_image = re.findall(rb"<name>(\w+)</name>", xml)
        outlines.add(
            names[number],
            sha256=f"{number:064x}",
            class_ids=[classes.setdefault(name, len(classes)) for name in of_image],
        )
    looks = [_look(item) for item in data.values()]
    found: dict[str, Any] = {}
    wrong = 0
    for name, change in CHANGES.items():
        copies = [_look(_changed(item, change)) for item in data.values()]
        labels = find_duplicates(
            np.array([*looks, *copies]), np.arange(2 * len(names), dtype=np.uint64)
        )[-1]
        found[name] = round(float((labels[: len(names)] == labels[len(names) :]).mean()), 3)
        wrong += len(names) - len(np.unique(labels[: len(names)]))
    wrong -= len(CHANGES) * all(any(one in name for name in names) for one in _TWICE)
    split, random = assign(outlines, SHARES, 0), _at_random(len(names))
    return {
        "cells: classes, points off": _points_off(outlines, split),
        "cells: at random": _points_off(outlines, random),
        "cells: copies found": found,
        "cells: others taken for the same": wrong,
    }


def _made_up(num_images: int) -> Outlines:
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, NUM_CLASSES + 1) ** 1.3
    outlines = Outlines()
    for number in range(num_images):
        class_ids = random.choice(NUM_CLASSES, random.poisson(7), p=weights / weights.sum())
        outlines.add(
            f"{number:06}.jpg", sha256=f"{number:016x}{0:048x}", class_ids=class_ids.tolist()
        )
    return outlines


def _at_random(num_images: int) -> Split:
    order = np.random.default_rng(0).permutation(num_images).tolist()
    ends = [num_images * 70 // 100, num_images * 90 // 100]
    return Split(tuple(order[: ends[0]]), tuple(order[ends[0] : ends[1]]), tuple(order[ends[1] :]))


def _points_off(outlines: Outlines, split: Split) -> str:
    totals = np.array(outlines.num_boxes_by_class(range(len(outlines)), NUM_CLASSES))
    there = totals > 0
    off = [
        np.abs(
            np.array(outlines.num_boxes_by_class(positions, NUM_CLASSES))[there] / totals[there]
            - len(positions) / len(outlines)
        )
        for positions in (split.train, split.val, split.test)
    ]
    return f"{100 * np.max(off):.2f} at most, {100 * np.mean(off):.3f} on average"


def _look(data: bytes) -> int:
    looks = perceptual_hash(verify("a.jpg", data)[1])
    return -1 if looks is None else looks


def _changed(data: bytes, change: Callable[[_Pixels], Any]) -> bytes:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    changed = np.clip(change(np.asarray(pixels, np.uint8)), 0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", changed, [cv2.IMWRITE_JPEG_QUALITY, 85])[1])


def _cropped(pixels: _Pixels, percent: int) -> _Pixels:
    height, width = (side * percent // 100 for side in pixels.shape[:2])
    return pixels[height:-height, width:-width]


CHANGES: dict[str, Callable[[_Pixels], Any]] = {
    "encoded again": lambda p: p,
    "a third of its size": lambda p: cv2.resize(p, (213, 160), interpolation=cv2.INTER_LINEAR),
    "stretched": lambda p: cv2.resize(p, (160, 160), interpolation=cv2.INTER_AREA),
    "brightness +40": lambda p: p.astype(int) + 40,
    "brightness -60": lambda p: p.astype(int) - 60,
    "contrast 1.5": lambda p: (p.astype(float) - 127) * 1.5 + 127,
    "contrast 0.6": lambda p: (p.astype(float) - 127) * 0.6 + 127,
    "blurred": lambda p: cv2.GaussianBlur(p, (0, 0), 2),
    "gray": to_gray,
    "flipped": lambda p: cv2.flip(p, 1),
    "turned": lambda p: cv2.rotate(p, cv2.ROTATE_90_CLOCKWISE),
    "moved by 8 px": lambda p: p[:, 8:],
    "cropped by 2 %": lambda p: _cropped(p, 2),
    "cropped by 5 %": lambda p: _cropped(p, 5),
}
