"""What is asked of the process that draws, and the files it makes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO

from matplotlib.figure import Figure

from services.metrics.reports import gallery, tables
from services.metrics.reports.content import ComparisonContent, SplitContent, TrainingContent
from services.metrics.reports.gallery import Chart
from services.metrics.reports.page import comparison_page, training_page
from services.metrics.reports.style import render, styled
from services.metrics.reports.tables import Table
from services.metrics.series import Series

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every file in a zip, so that the same content makes the same bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob:
    """Makes a report, in a zip with its charts and tables if wanted."""

    content: TrainingContent | ComparisonContent
    language: str
    in_zip: bool = False

    def write(self, file: IO[bytes]) -> None:
        """Writes the report to a file that can seek."""
        content = self.content
        if isinstance(content, TrainingContent):
            page = training_page(content, self.language)
        else:
            page = comparison_page(content, self.language)
        if not self.in_zip:
            file.write(page)
            return
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            _put(archive, "report.html", [page])
            for name, drawing in self._charts().items():
                _put(archive, f"charts/{name}.png", [_png(drawing)])
            for name, make in _tables(content):
                _put(archive, f"tables/{name}.csv", tables.to_csv(make()))
                _put(archive, f"tables/{name}.json", tables.to_json(make()))

    def _charts(self) -> dict[str, Figure]:
        if isinstance(self.content, TrainingContent):
            return gallery.training_charts(self.content, self.language)
        return gallery.comparison_charts(self.content.comparison, self.language)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartJob:
    """Draws one chart; an empty file if there is nothing to be drawn."""

    chart: Chart.ValueType
    language: str
    svg: bool
    series: tuple[Series, ...] = ()
    split: SplitContent | None = None

    def write(self, file: IO[bytes]) -> None:
        """Writes the chart to a file."""
        if self.split is not None:
            drawing = gallery.split_chart(self.chart, self.split, self.language)
        else:
            drawing = gallery.series_chart(self.chart, self.series, self.language)
        if drawing is not None:
            with styled():
                file.write(render(drawing, svg=self.svg))


Job = ReportJob | ChartJob
_Make = Callable[[], Table]


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
