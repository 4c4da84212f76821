"""Comparing two models: how long the bootstrap takes, and whether its intervals can be believed."""

from __future__ import annotations

import dataclasses
import io
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from services.metrics.bootstrap import FIGURES, Resampled, Side, resample
from services.metrics.evaluate import evaluate
from services.metrics.matches import Matches
from tests.benchmarks.metrics import _make
from tests.metrics_fakes import Row, ground_truth, parquet

_THRESHOLD = 0.5
_LEVEL = 0.95


def run(quick: bool = False) -> dict[str, Any]:
    """Times 1,000 resamples of 5,000 images with 20 detections in 80 classes, of two models.

    Then it draws splits of 200 images from a population of 20,000, of which the true differences of
    two models are known, and counts how often the intervals of 1,000 resamples hold them.

    Args:
        quick: 500 images, and few splits, to see that it works.

    Returns:
        Seconds (of the processor too, of ours and of hotcoco's `compare`, which has the mAPs only),
        memory, and the share of splits whose 95 % interval holds the truth.
    """
    truth, first = _make(500 if quick else 5000)
    second = _shifted(first)
    sides = [Side(evaluate(json.loads(truth), data)[1], _THRESHOLD) for data in (first, second)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_start = time.perf_counter(), time.process_time()
    resample(sides, num_resamples=1000, seed=0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    reference = _hotcoco_cpu_seconds(truth, first, second)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "hotcoco_cpu_seconds": round(reference, 1),
        "ratio": round(cpu_seconds / reference, 3),
        "peak_growth_mib": round(growth / 1024, 1),
        "coverage": _coverage(5 if quick else 400, 2_000 if quick else 20_000),
    }


def _hotcoco_cpu_seconds(truth: bytes, *predictions: bytes) -> float:
    """Estimates 1,000 resamples by hotcoco from 20; matching is done before."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        Path(file.name).write_bytes(truth)
        gt = hotcoco.COCO(file.name)
    evaluations = []
    for data in predictions:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        image, label, confidence, x1, y1, x2, y2 = (
            column.to_numpy().astype(np.float64) for column in table.columns
        )
        rows = np.column_stack([image, x1, y1, x2 - x1, y2 - y1, confidence, label + 1])
        evaluation = hotcoco.COCOeval(gt, gt.load_res(rows), "bbox")
        evaluation.evaluate()
        evaluations.append(evaluation)
    start = time.process_time()
    hotcoco.compare(evaluations[0], evaluations[1], n_bootstrap=20)
    return (time.process_time() - start) * 50


def _shifted(predictions: bytes) -> bytes:
    """Makes another model's predictions: other confidences, a few pixels to the side."""
    random = np.random.default_rng(1)
    table = pyarrow.parquet.read_table(io.BytesIO(predictions))
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    shift = random.normal(0, 3, len(columns["x1"])).astype(np.float32)
    columns |= {name: columns[name] + shift for name in ("x1", "x2")}
    columns["confidence"] = random.random(len(shift)).astype(np.float32)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def _coverage(num_splits: int, num_images: int) -> dict[str, Any]:
    """Counts how often the interval of a split of 200 images holds what is true of all images."""
    population = [_population(num_images, skill) for skill in (0.62, 0.68)]
    everything = np.ones((1, num_images), np.uint8)
    before, after = (Side(one, _THRESHOLD).measure(everything)[0][0] for one in population)
    truth = dict(zip(FIGURES, after - before, strict=True))
    random = np.random.default_rng(5)
    held = dict.fromkeys(FIGURES, 0)
    found = dict.fromkeys(FIGURES, 0)
    for number in range(num_splits):
        chosen = np.sort(random.choice(num_images, 200, replace=False))
        sides = [Side(_part(one, chosen), _THRESHOLD) for one in population]
        first, second = resample(sides, num_resamples=1000, seed=number)
        for name in FIGURES:
            low, high = _interval(first, second, name)
            held[name] += low <= truth[name] <= high
            found[name] += low > 0
    return {
        name: f"{held[name] / num_splits:.3f} (true difference {truth[name]:+.4f},"
        f" told as such in {found[name] / num_splits:.2f})"
        for name in FIGURES
    }


def _interval(first: Resampled, second: Resampled, name: str) -> tuple[float, float]:
    tails = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
    low, high = np.quantile(second.figures[name] - first.figures[name], tails)
    return float(low), float(high)


def _population(num_images: int, skill: float) -> Matches:
    """Measures a model on images that are hard or easy, the same ones for every model.

    A box is found with the probability `skill`, more or less as its image is easy; the better a
    model, the more exactly it finds it. Every image has something that looks like a box besides.
    """
    images, finding = np.random.default_rng(0), np.random.default_rng(round(skill * 100))
    boxes: list[tuple[int, int, list[float], int]] = []
    rows: list[Row] = []
    for image in range(1, num_images + 1):
        easy = images.normal(0, 0.2)
        for _ in range(images.integers(1, 5)):
            index, (x, y) = int(images.integers(0, 3)), images.uniform(0, 400, 2)
            boxes.append((image, index, [x, y, 60, 60], 0))
            confidence = float(np.clip(finding.normal(skill + easy, 0.15), 0.01, 0.99))
            if finding.random() < skill + easy:
                left, top = np.array([x, y]) + finding.normal(0, 12 * (1 - skill), 2)
                rows.append((image, index, confidence, left, top, left + 60, top + 60))
        wrong = float(np.clip(finding.normal(0.45 - easy, 0.15), 0.01, 0.99))
        rows.append((image, int(finding.integers(0, 3)), wrong, 500, 400, 560, 460))
    return evaluate(ground_truth(num_images, 3, boxes), parquet(rows))[1]


def _part(matches: Matches, chosen: npt.NDArray[np.int64]) -> Matches:
    """Takes some images out of a split, with as much of them as a bootstrap looks at."""
    is_in_N, is_in_M = np.isin(matches.image_N, chosen), np.isin(matches.image_M, chosen)
    return dataclasses.replace(
        matches,
        id_I=matches.id_I[chosen],
        image_N=np.searchsorted(chosen, matches.image_N[is_in_N]).astype(np.int32),
        class_N=matches.class_N[is_in_N],
        confidence_N=matches.confidence_N[is_in_N],
        counted_N=matches.counted_N[is_in_N],
        truth_N=matches.truth_N[is_in_N],
        right_N=matches.right_N[is_in_N],
        ignored_N=matches.ignored_N[is_in_N],
        image_M=np.searchsorted(chosen, matches.image_M[is_in_M]).astype(np.int32),
        class_M=matches.class_M[is_in_M],
        crowd_M=matches.crowd_M[is_in_M],
    )
