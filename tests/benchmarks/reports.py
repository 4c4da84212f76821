"""What a report, a chart and a table of a large evaluation take, and what the event loop feels."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detflow.store import ObjectStore
from detflow.v1.metrics_pb2 import Evaluation
from detflow.v1.training_pb2 import Training
from services.metrics.analysis_service import evaluation_analysis, evaluation_curves
from services.metrics.domain import Evaluation as MeasuredEvaluation
from services.metrics.matches import Matches
from services.metrics.measure import measure
from services.metrics.reports import tables
from services.metrics.reports.content import SplitContent, TrainingContent
from services.metrics.reports.jobs import Chart, ChartJob, Job, ReportJob
from services.metrics.reports.renderer import Renderer
from services.metrics.series import Series
from services.metrics.service import to_evaluation
from tests.benchmarks.metrics import _make
from tests.metrics_fakes import put_bundle

_NUM_EPOCHS = 100
_TICK_SECONDS = 0.002


def run(quick: bool = False) -> dict[str, Any]:
    """Makes the files of an evaluation of 5,000 images, 80 classes and 100,000 detections.

    Args:
        quick: 500 images only, to see that it works.

    Returns:
        Seconds of each file by the service's child process, its start included, and its size; rows
        per second of the table of detections as CSV and JSON; and by how much a timer of 2 ms in
        the event loop was late meanwhile, in ms.
    """
    with tempfile.TemporaryDirectory() as folder:
        evaluation, matches = _measure(Path(folder), 500 if quick else 5000)
        content = _content(evaluation, matches)
        figures = asyncio.run(_render(Path(folder), content))
    for name, write in (("csv", tables.to_csv), ("json", tables.to_json)):
        num_rows, seconds = _time_table(matches, write)
        figures[f"{name}_rows_per_second"] = round(num_rows / seconds)
        figures["num_rows"] = num_rows
    return figures


def _measure(folder: Path, num_images: int) -> tuple[Evaluation, Matches]:
    truth, predictions = _make(num_images)
    store = ObjectStore(folder.as_uri())
    manifest = put_bundle(store, {"test": json.loads(truth)})
    stored = store.put("predictions.parquet", predictions)
    measured = measure(store, manifest, stored, "test", "test.npz")
    evaluation = MeasuredEvaluation(
        training="projects/p/versions/v/trainings/t",
        split="test",
        attempt=1,
        measurement=measured.measurement,
        failure=None,
        create_time=Evaluation().create_time.ToDatetime(),
    )
    return to_evaluation(evaluation), Matches.from_bytes(store.get(measured.matches))


def _content(evaluation: Evaluation, matches: Matches) -> TrainingContent:
    rng, epochs = np.random.default_rng(0), np.arange(1, _NUM_EPOCHS + 1)
    names = ("train/box_loss", "train/cls_loss", "val/box_loss", "val/cls_loss", "val/map50", "lr")
    series = tuple(
        Series(
            name=name,
            epochs_N=epochs,
            positions_N=epochs.astype(np.float64),
            values_N=rng.random(_NUM_EPOCHS),
            num_points=_NUM_EPOCHS,
        )
        for name in names
    )
    split = SplitContent(
        evaluation=evaluation,
        curves=evaluation_curves(matches, range(len(matches.class_names))),
        analysis=evaluation_analysis(matches, 0.25),
        matches=matches,
    )
    training = Training(name="projects/p/versions/v/trainings/t", model="yolov8n")
    return TrainingContent(training=training, version="V_0", series=series, splits=(split,))


async def _render(folder: Path, content: TrainingContent) -> dict[str, Any]:
    renderer = Renderer(folder)
    # As the service does: matches and curves of single classes are for tables only.
    without = replace(
        content,
        splits=tuple(
            replace(one, matches=None, curves=evaluation_curves(one.matches, ()))
            for one in content.splits
            if one.matches is not None
        ),
    )
    chart = ChartJob(chart=Chart.CONFUSION, language="en", svg=False, split=without.splits[0])
    (await renderer.render(chart)).close()  # lists the fonts of the machine, once
    jobs: dict[str, Job] = {
        "html": ReportJob(content=without, language="en"),
        "zip": ReportJob(content=content, language="en", in_zip=True),
        "chart": chart,
    }
    figures: dict[str, Any] = {}
    late: list[float] = []
    ticking = asyncio.create_task(_tick(late))
    for name, job in jobs.items():
        start = time.perf_counter()
        with await renderer.render(job) as file:
            figures[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
            figures[f"{name}_kb"] = round(file.seek(0, 2) / 1000)
    ticking.cancel()
    figures["timer_late_p99_ms"] = round(1000 * float(np.quantile(late, 0.99)), 1)
    figures["timer_late_max_ms"] = round(1000 * max(late), 1)
    return figures


async def _tick(late: list[float]) -> None:
    while True:
        start = time.perf_counter()
        await asyncio.sleep(_TICK_SECONDS)
        late.append(time.perf_counter() - start - _TICK_SECONDS)


def _time_table(
    matches: Matches, write: Callable[[tables.Table], Iterator[bytes]]
) -> tuple[int, float]:
    """Returns rows and seconds of the table of every detection."""
    num_rows = sum(1 for _ in tables.detections_table(matches, 0.0).rows)
    start = time.perf_counter()
    for _ in write(tables.detections_table(matches, 0.0)):
        pass
    return num_rows, time.perf_counter() - start
