"""Our evaluation of a split against pycocotools: same ground truth, same predictions file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from services.metrics.evaluate import evaluate

_NUM_CLASSES = 80
_BOXES_PER_IMAGE = 7
_DETECTIONS_PER_IMAGE = 20


def run(quick: bool = False) -> dict[str, Any]:
    """Measures 5,000 images with 20 predictions each, from the stored bytes to all figures.

    Args:
        quick: 500 images only, to see that it works.

    Returns:
        Seconds of both (best of three of ours, one of pycocotools), the ratio ours / theirs, and
        whether the twelve figures are equal to the last bit.
    """
    num_images = 500 if quick else 5000
    truth, predictions = _make(num_images)
    ours = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        measured, _ = evaluate(json.loads(truth), predictions)
        ours = min(ours, time.perf_counter() - start)
    start = time.perf_counter()
    stats = _pycocotools(truth, predictions)
    theirs = time.perf_counter() - start
    return {
        "num_images": num_images,
        "num_predictions": measured.num_predictions,
        "detflow_seconds": round(ours, 3),
        "pycocotools_seconds": round(theirs, 3),
        "ratio": round(ours / theirs, 4),
        "figures_equal": list(dataclasses.astuple(measured.coco)) == stats,
    }


def _make(num_images: int) -> tuple[bytes, bytes]:
    """Makes ground truth (JSON) and predictions (parquet): jittered copies of boxes, and noise."""
    rng = np.random.default_rng(0)
    count = num_images * _BOXES_PER_IMAGE
    image = np.repeat(np.arange(1, num_images + 1), _BOXES_PER_IMAGE)
    index = rng.integers(0, _NUM_CLASSES, count)
    corner, size = rng.random((count, 2)) * 480, np.exp(rng.uniform(2, 5.5, (count, 2)))
    annotations = [
        {
            "id": n + 1,
            "image_id": int(image[n]),
            "category_id": int(index[n]) + 1,
            "bbox": [*corner[n].tolist(), *size[n].tolist()],
            "area": float(size[n].prod()),
            "iscrowd": 0,
        }
        for n in range(count)
    ]
    truth = {
        "images": [
            {"id": n + 1, "width": 640, "height": 640, "file_name": f"{n + 1:08d}.jpg"}
            for n in range(num_images)
        ],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(_NUM_CLASSES)],
    }
    total = num_images * _DETECTIONS_PER_IMAGE
    by = np.repeat(np.arange(1, num_images + 1), _DETECTIONS_PER_IMAGE)
    source = (by - 1) * _BOXES_PER_IMAGE + rng.integers(0, _BOXES_PER_IMAGE, total)
    is_wrong = rng.random(total) < 0.2
    near = corner[source] + rng.normal(0, 0.1, (total, 2)) * size[source]
    extent = size[source] * np.exp(rng.normal(0, 0.15, (total, 2)))
    confidence = rng.random(total).astype(np.float32)
    order = np.lexsort((-confidence, by))
    classes = np.where(is_wrong, rng.integers(0, _NUM_CLASSES, total), index[source])
    ends = near + extent
    columns = {
        "image_id": by.astype(np.int32),
        "class_id": classes.astype(np.int32),
        "confidence": confidence,
        "x1": near[:, 0].astype(np.float32),
        "y1": near[:, 1].astype(np.float32),
        "x2": ends[:, 0].astype(np.float32),
        "y2": ends[:, 1].astype(np.float32),
    }
    sink = io.BytesIO()
    table = pyarrow.table({name: values[order] for name, values in columns.items()})
    pyarrow.parquet.write_table(table, sink)
    return json.dumps(truth).encode(), sink.getvalue()


def _pycocotools(truth: bytes, predictions: bytes) -> list[float]:
    """Reads and measures as pycocotools' own demo does; returns its twelve figures."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(truth)
        gt.createIndex()
        table = pyarrow.parquet.read_table(io.BytesIO(predictions)).to_pydict()
        columns = zip(*table.values(), strict=True)
        rows = [
            {
                "image_id": image,
                "category_id": index + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": confidence,
            }
            for image, index, confidence, x1, y1, x2, y2 in columns
        ]
        evaluation = COCOeval(gt, gt.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures: list[float] = evaluation.stats.tolist()
    return figures
