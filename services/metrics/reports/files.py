"""Writes the files that jobs ask for."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import IO

from matplotlib.figure import Figure

from services.metrics.reports import gallery, tables
from services.metrics.reports.content import ComparisonContent, TrainingContent
from services.metrics.reports.jobs import ChartJob, Job, ReportJob
from services.metrics.reports.page import comparison_page, training_page
from services.metrics.reports.style import render, styled
from services.metrics.reports.tables import Table

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every file in a zip, so that the same content makes the same bytes."""

_Make = Callable[[], Table]


def write(job: Job, file: IO[bytes]) -> None:
    """Does a job.

    Args:
        job: What is wanted.
        file: Empty, and able to seek; it stays so if there is nothing to be drawn.
    """
    if isinstance(job, ChartJob):
        _write_chart(job, file)
    elif job.in_zip:
        _write_zip(job, file)
    else:
        file.write(_page(job))


def _write_chart(job: ChartJob, file: IO[bytes]) -> None:
    if job.split is not None:
        drawing = gallery.split_chart(job.chart, job.split, job.language)
    else:
        drawing = gallery.series_chart(job.chart, job.series, job.language)
    if drawing is not None:
        with styled():
            file.write(render(drawing, svg=job.svg))


def _write_zip(job: ReportJob, file: IO[bytes]) -> None:
    content = job.content
    if isinstance(content, TrainingContent):
        charts = gallery.training_charts(content, job.language)
    else:
        charts = gallery.comparison_charts(content.comparison, job.language)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        _put(archive, "report.html", [_page(job)])
        for name, drawing in charts.items():
            _put(archive, f"charts/{name}.png", [_png(drawing)])
        for name, make in _tables(content):
            _put(archive, f"tables/{name}.csv", tables.to_csv(make()))
            _put(archive, f"tables/{name}.json", tables.to_json(make()))


def _page(job: ReportJob) -> bytes:
    if isinstance(job.content, TrainingContent):
        return training_page(job.content, job.language)
    return comparison_page(job.content, job.language)


def _tables(content: TrainingContent | ComparisonContent) -> Iterator[tuple[str, _Make]]:
    """Yields name and maker of each table; it is made once for each format."""
    if isinstance(content, ComparisonContent):
        yield "deltas", partial(tables.deltas_table, content.comparison)
        yield "class-deltas", partial(tables.class_deltas_table, content.comparison)
        yield "parameters", partial(tables.parameters_table, content.comparison)
        yield "images", partial(tables.images_table, content.comparison)
        return
    yield "epochs", partial(tables.series_table, content.series)
    evaluations = [one.evaluation for one in content.splits]
    yield "evaluations", partial(tables.evaluations_table, evaluations)
    for one in content.splits:
        split = one.evaluation.name.rsplit("/", 1)[-1]
        yield f"classes-{split}", partial(tables.classes_table, one.evaluation.classes)
        if one.curves is not None:
            yield f"curves-{split}", partial(tables.curves_table, one.curves)
        if one.analysis is not None:
            yield f"confusion-{split}", partial(tables.confusion_table, one.analysis)
            yield f"errors-{split}", partial(tables.errors_table, one.analysis)
        if one.analysis is not None and one.matches is not None:
            threshold = one.analysis.confidence_threshold
            make = partial(tables.detections_table, one.matches, threshold)
            yield f"detections-{split}", make


def _put(archive: zipfile.ZipFile, name: str, chunks: Iterable[bytes]) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    with archive.open(info, "w") as member:
        for chunk in chunks:
            member.write(chunk)


def _png(drawing: Figure) -> bytes:
    with styled():
        return render(drawing, svg=False)
