"""Our evaluation of a split against pycocotools: same ground truth, same predictions file."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
import pyarrow.parquet
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.metrics.analysis_service import evaluation_analysis, evaluation_curves
from services.metrics.matches import Matches
from services.metrics.measure import measure
from tests.metrics_fakes import put_bundle

T = TypeVar("T")

_NUM_CLASSES = 80
_BOXES_PER_IMAGE = 7
_DETECTIONS_PER_IMAGE = 20
_TRIES = 3


def run(quick: bool = False) -> dict[str, Any]:
    """Measures 5,000 images with 20 predictions each, from stored objects to figures and matches.

    Args:
        quick: 500 images only, to see that it works.

    Returns:
        Seconds of both (best of three of ours, one of pycocotools), their ratio ours / theirs, the
        same of processor time, which says more on a machine that does other things too, and whether
        the twelve figures are equal to the last bit; seconds and peak memory of the process that
        measures, its start included; and seconds of curves and analysis (best of three).
    """
    num_images = 500 if quick else 5000
    truth, predictions = _make(num_images)
    with tempfile.TemporaryDirectory() as folder:
        store = ObjectStore(Path(folder).as_uri())
        manifest = put_bundle(store, {"val": json.loads(truth)})
        stored = store.put("predictions.parquet", predictions)
        cpu = time.process_time()
        seconds, measured = _best(lambda: measure(store, manifest, stored, "val", "val.npz"))
        cpu = (time.process_time() - cpu) / _TRIES
        process_seconds, process_bytes = _measure_in_process(store, manifest, stored)
        matches = Matches.from_bytes(store.get(measured.matches))
    start, cpu_start = time.perf_counter(), time.process_time()
    stats = _pycocotools(truth, predictions)
    theirs, their_cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "num_images": num_images,
        "num_predictions": measured.measurement.num_predictions,
        "detflow_seconds": round(seconds, 3),
        "pycocotools_seconds": round(theirs, 3),
        "ratio": round(seconds / theirs, 4),
        "detflow_cpu_seconds": round(cpu, 3),
        "pycocotools_cpu_seconds": round(their_cpu, 3),
        "cpu_ratio": round(cpu / their_cpu, 4),
        "figures_equal": list(dataclasses.astuple(measured.measurement.coco)) == stats,
        "process_seconds": round(process_seconds, 2),
        "process_peak_mib": round(process_bytes / 2**20),
        "matches_mib": round(measured.matches.size_bytes / 2**20, 1),
        "curves_seconds": round(
            _best(lambda: evaluation_curves(matches, range(_NUM_CLASSES)))[0], 3
        ),
        "analysis_seconds": round(_best(lambda: evaluation_analysis(matches, 0.25))[0], 3),
    }


def _best(work: Callable[[], T]) -> tuple[float, T]:
    """Returns the shortest of three times, in seconds, and the last result."""
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def _measure_in_process(
    store: ObjectStore, manifest: StoredObject, predictions: StoredObject
) -> tuple[float, int]:
    """Has the service's child process measure; returns its seconds and peak resident bytes."""
    request = {
        "store_url": store.url,
        "manifest": base64.b64encode(manifest.SerializeToString()).decode(),
        "predictions": base64.b64encode(predictions.SerializeToString()).decode(),
        "split": "val",
        "matches_key": "val.npz",
    }
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "services.metrics.measure"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps(request).encode() + b"\n")
    child.stdin.flush()
    answer = json.loads(child.stdout.read())
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdin.close()
    child.stdout.close()
    assert "measurement" in answer, answer
    return seconds, usage.ru_maxrss * 1024


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
