"""Reports: what was measured as files, for people and for other programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from detflow.client.connection import Connection
from detflow.client.saving import replacing
from detflow.errors import InvalidArgument
from detflow.v1 import common_pb2, report_pb2, report_pb2_grpc

FORMATS = {"html": report_pb2.REPORT_FORMAT_HTML, "zip": report_pb2.REPORT_FORMAT_ZIP}
"""What a report can be: one page, or a zip of it with its charts and tables."""

LANGUAGES = {"en": "en", "ko": "ko"}
"""Languages of its texts."""

CHARTS = {
    name.lower().replace("_", "-"): value
    for name, value in report_pb2.DownloadChartRequest.Chart.items()
    if value
}
"""Charts by name: losses, quality, precision-recall, confusion, ..."""

TABLES = {
    name.lower(): value for name, value in report_pb2.DownloadTableRequest.Table.items() if value
}
"""Tables by name: epochs, steps, evaluations, classes, detections, ..."""

_SPLITS = {"val": common_pb2.SPLIT_VAL, "test": common_pb2.SPLIT_TEST}
_SECONDS = 600.0
_Path = str | os.PathLike[str]
_Value = TypeVar("_Value")


class Reports:
    """Calls about reports, charts and tables of trainings.

    Example:
        client.reports.download(training.name, "report.html", language="ko")
        client.reports.comparison([old.name, new.name], "comparison.html")
        client.reports.chart(training.name, "confusion", "confusion.svg")
        client.reports.table(training.name, "detections", "detections.csv", threshold=0.5)
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = report_pb2_grpc.ReportServiceStub(connection.channel("metrics"))

    def download(
        self, training: str, path: _Path, *, format: str = "html", language: str = "en"
    ) -> Path:
        """Writes the report of a training: all that is known of it so far.

        Args:
            training: Resource name.
            path: File, or folder for one named after the training.
            format: One of `FORMATS`.
            language: One of `LANGUAGES`.

        Returns:
            The file.

        Raises:
            NotFound: There is no such training.
            InvalidArgument: UNWRITABLE_FILE; or a value is none of those above.
        """
        request = report_pb2.DownloadReportRequest(
            training=training,
            format=_choice("format", format, FORMATS),
            language=_choice("language", language, LANGUAGES),
        )
        chunks = self._connection.download(self._stub.DownloadReport, request, seconds=_SECONDS)
        return _save(chunks, path, f"report-{_last(training)}.{format}")

    def comparison(
        self,
        trainings: Sequence[str],
        path: _Path,
        *,
        split: str = "test",
        format: str = "html",
        language: str = "en",
    ) -> Path:
        """Writes a report that compares trainings with the first of them.

        Args:
            trainings: Resource names of 2 to 10 trainings of one project.
            path: As in `download`.
            split: "val" or "test".
            format: One of `FORMATS`.
            language: One of `LANGUAGES`.

        Raises:
            FailedPrecondition: They were not measured on the same data.
            DetflowError: As in `download`.
        """
        request = report_pb2.DownloadComparisonReportRequest(
            parent=trainings[0].split("/versions/")[0] if trainings else "",
            trainings=trainings,
            split=_choice("split", split, _SPLITS),
            format=_choice("format", format, FORMATS),
            language=_choice("language", language, LANGUAGES),
        )
        chunks = self._connection.download(
            self._stub.DownloadComparisonReport, request, seconds=_SECONDS
        )
        return _save(chunks, path, f"comparison.{format}")

    def chart(
        self, training: str, chart: str, path: _Path, *, split: str = "test", language: str = "en"
    ) -> Path:
        """Writes one chart, as SVG if the name of the file says so, else as PNG.

        Args:
            training: Resource name.
            chart: One of `CHARTS`.
            path: File, or folder for one named after chart and training.
            split: "val" or "test", for charts of an evaluation.
            language: One of `LANGUAGES`.

        Raises:
            FailedPrecondition: NOTHING_TO_DRAW.
            NotFound: There is no such training, or it has not been measured on this split.
            InvalidArgument: As in `download`.
        """
        request = report_pb2.DownloadChartRequest(
            training=training,
            chart=_choice("chart", chart, CHARTS),
            split=_choice("split", split, _SPLITS),
            svg=Path(path).suffix.lower() == ".svg",
            language=_choice("language", language, LANGUAGES),
        )
        chunks = self._connection.download(self._stub.DownloadChart, request, seconds=_SECONDS)
        return _save(chunks, path, f"{chart}-{_last(training)}.png")

    def table(
        self,
        training: str,
        table: str,
        path: _Path,
        *,
        split: str = "test",
        threshold: float | None = None,
    ) -> Path:
        """Writes one table, as JSON if the name of the file says so, else as CSV.

        Args:
            training: Resource name.
            table: One of `TABLES`.
            path: File, or folder for one named after table and training.
            split: "val" or "test", for tables of an evaluation.
            threshold: Detections of at least this confidence count; None means the one with the
                best F1.

        Raises:
            NotFound: There is no such training, or it has not been measured on this split.
            InvalidArgument: As in `download`.
        """
        json = Path(path).suffix.lower() == ".json"
        chunks = self.iter_table(training, table, json=json, split=split, threshold=threshold)
        return _save(chunks, path, f"{table}-{_last(training)}.csv")

    def iter_table(
        self,
        training: str,
        table: str,
        *,
        json: bool = False,
        split: str = "test",
        threshold: float | None = None,
    ) -> Generator[bytes, None, None]:
        """Yields one table in parts, as they are made.

        Args:
            training: Resource name.
            table: One of `TABLES`.
            json: JSON instead of CSV.
            split: As in `table`.
            threshold: As in `table`.

        Raises:
            DetflowError: As in `table`.
        """
        request = report_pb2.DownloadTableRequest(
            training=training,
            table=_choice("table", table, TABLES),
            split=_choice("split", split, _SPLITS),
            json=json,
            confidence_threshold=threshold,
        )
        return self._connection.download(self._stub.DownloadTable, request, seconds=_SECONDS)


def _save(chunks: Generator[bytes, None, None], path: _Path, name: str) -> Path:
    path = Path(path)
    if path.is_dir():
        path /= name
    with replacing(path) as file, contextlib.closing(chunks):
        for data in chunks:
            file.write(data)
    return path


def _choice(field: str, word: str, choices: Mapping[str, _Value]) -> _Value:
    if word not in choices:
        raise InvalidArgument(
            f"{field} {word!r} must be one of {', '.join(choices)}", reason="BAD_CHOICE"
        )
    return choices[word]


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]
