"""The ReportService servicer: reports, charts and tables as files."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import IO, Any

from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import Message

from detflow import names
from detflow.errors import FailedPrecondition, ResourceExhausted
from detflow.postgres import Database
from detflow.v1 import comparison_pb2, report_pb2, report_pb2_grpc
from detflow.v1.common_pb2 import FileInfo
from detflow.v1.metrics_pb2 import Evaluation
from services.metrics import store
from services.metrics.comparison_service import ComparisonService
from services.metrics.report_sources import SPLITS, ReportSources
from services.metrics.reports import tables
from services.metrics.reports.content import SplitContent
from services.metrics.reports.jobs import Chart, ChartJob, ReportJob, chart_name, is_of_series
from services.metrics.reports.renderer import Renderer
from services.metrics.reports.tables import Table
from services.metrics.series import Series
from services.metrics.series_reader import iterate_step_series
from services.metrics.service import to_evaluation

_Table = report_pb2.DownloadTableRequest.Table
_OF_SPLIT = (_Table.CLASSES, _Table.CURVES, _Table.CONFUSION, _Table.ERRORS, _Table.DETECTIONS)
_CHUNK_BYTES = 1 << 20
_MAX_STEP_VALUES = 10_000_000  # 80 MB


class ReportService(report_pb2_grpc.ReportServiceServicer):
    """Makes files of what was measured.

    Args:
        db: Database of the service.
        sources: What the files are made from.
        comparisons: Compares trainings.
        renderer: Draws charts and pages.
    """

    def __init__(
        self,
        db: Database,
        sources: ReportSources,
        comparisons: ComparisonService,
        renderer: Renderer,
    ) -> None:
        self._db = db
        self._sources = sources
        self._comparisons = comparisons
        self._renderer = renderer

    async def DownloadReport(
        self, request: report_pb2.DownloadReportRequest, context: Any
    ) -> AsyncIterator[HttpBody]:
        """A report of one training."""
        in_zip = request.format == report_pb2.REPORT_FORMAT_ZIP
        content = await self._sources.training(request.training, with_tables=in_zip)
        job = ReportJob(content=content, language=request.language or "en", in_zip=in_zip)
        name = f"report-{content.version}-{names.last_segment(request.training)}"
        async for chunk in self._report(job, name):
            yield chunk

    async def DownloadComparisonReport(
        self, request: report_pb2.DownloadComparisonReportRequest, context: Any
    ) -> AsyncIterator[HttpBody]:
        """A report of a comparison."""
        compare = comparison_pb2.CompareTrainingsRequest(
            parent=request.parent, trainings=request.trainings, split=request.split
        )
        comparison = await self._comparisons.CompareTrainings(compare, context)
        job = ReportJob(
            content=await self._sources.comparison(comparison),
            language=request.language or "en",
            in_zip=request.format == report_pb2.REPORT_FORMAT_ZIP,
        )
        ids = "-".join(names.last_segment(training) for training in request.trainings)
        async for chunk in self._report(job, f"comparison-{ids}"[:120]):
            yield chunk

    async def DownloadChart(
        self, request: report_pb2.DownloadChartRequest, context: Any
    ) -> AsyncIterator[HttpBody]:
        """One chart."""
        language, svg, split = request.language or "en", request.svg, SPLITS[request.split]
        if is_of_series(request.chart):
            job = ChartJob(
                chart=request.chart,
                language=language,
                svg=svg,
                series=await self._sources.series(request.training),
            )
        else:
            if request.chart == Chart.CLASSES:  # the figures are enough, an earlier release's too
                content = SplitContent(evaluation=await self._evaluation(request.training, split))
            else:
                content = await self._sources.split(request.training, split)
            job = ChartJob(chart=request.chart, language=language, svg=svg, split=content)
        file = await self._renderer.render(job)
        with file:
            if not await asyncio.to_thread(file.read, 1):
                raise _nothing_to_draw(request)
            extension, kind = ("svg", "image/svg+xml") if svg else ("png", "image/png")
            name = f"{chart_name(request.chart)}-{names.last_segment(request.training)}"
            async for chunk in _send(file, f"{name}.{extension}", kind, inline=True):
                yield chunk

    async def DownloadTable(
        self, request: report_pb2.DownloadTableRequest, context: Any
    ) -> AsyncIterator[HttpBody]:
        """One table, sent while it is made."""
        if request.table in _OF_SPLIT:
            table, source = await self._split_table(request)
        elif request.table == _Table.EVALUATIONS:
            found = [
                to_evaluation(one) for one in await self._sources.evaluations(request.training)
            ]
            table, source = tables.evaluations_table(found), _digest(*found)
        else:
            series = await self._series(request)
            table = await asyncio.to_thread(tables.series_table, series)
            source = await asyncio.to_thread(_series_digest, series)
        parts = [_Table.Name(request.table).lower(), names.last_segment(request.training)]
        if request.table in _OF_SPLIT:
            parts.insert(1, SPLITS[request.split])
        extension, kind = ("json", "application/json") if request.json else ("csv", "text/csv")
        info = FileInfo(
            file_name=f"{'-'.join(parts)}.{extension}",
            etag=hashlib.sha256(_digest(request) + source).hexdigest()[:32],
        )
        chunks = tables.to_json(table) if request.json else tables.to_csv(table)
        first = HttpBody(content_type=kind)
        first.extensions.add().Pack(info)
        while (data := await asyncio.to_thread(next, chunks, None)) is not None:
            first.data = data
            yield first
            first = HttpBody()

    async def _report(self, job: ReportJob, name: str) -> AsyncIterator[HttpBody]:
        extension, kind = (".zip", "application/zip") if job.in_zip else (".html", "text/html")
        file = await self._renderer.render(job)
        with file:
            # Shown in a sandbox: the page needs neither scripts nor anything from elsewhere.
            async for chunk in _send(file, name + extension, kind, inline=not job.in_zip):
                yield chunk

    async def _split_table(self, request: report_pb2.DownloadTableRequest) -> tuple[Table, bytes]:
        """Returns a table of a split, and a digest of what it is made from."""
        name, split = request.training, SPLITS[request.split]
        if request.table == _Table.CLASSES:
            evaluation = await self._evaluation(name, split)
            return tables.classes_table(evaluation.classes), _digest(evaluation)
        measured = await self._sources.measured(name, split)
        source = _digest(to_evaluation(measured.evaluation))
        stated = request.HasField("confidence_threshold")
        threshold = measured.threshold(request.confidence_threshold if stated else None)
        if request.table == _Table.DETECTIONS:
            return tables.detections_table(measured.matches, threshold), source
        if request.table == _Table.CURVES:
            content = await self._sources.split(name, split, every_class=True)
            assert content.curves is not None
            return tables.curves_table(content.curves), source
        analysis = await self._sources.analysis(measured, threshold)
        if request.table == _Table.CONFUSION:
            return tables.confusion_table(analysis), source
        return tables.errors_table(analysis), source

    async def _evaluation(self, name: str, split: str) -> Evaluation:
        """Finds an evaluation, be it of a release that kept the figures only."""
        for one in await self._sources.evaluations(name):
            if one.split == split and one.measurement is not None:
                return to_evaluation(one)
        # Whatever is in the way is said by whoever reads all of it.
        return to_evaluation((await self._sources.measured(name, split)).evaluation)

    async def _series(self, request: report_pb2.DownloadTableRequest) -> tuple[Series, ...]:
        if request.table == _Table.EPOCHS:
            return await self._sources.series(request.training)
        async with self._db.connection() as conn:
            training = await store.find_training(conn, request.training)
        found, num_values = [], 0
        async for one in iterate_step_series(self._db, training):
            num_values += len(one.values_N)
            if num_values > _MAX_STEP_VALUES:
                raise ResourceExhausted(
                    f"the table would hold more than {_MAX_STEP_VALUES} values; read the series as"
                    " columns (ReadMetricColumns)",
                    reason="TOO_MANY_VALUES",
                )
            found.append(one)
        return tuple(found)


async def _send(file: IO[bytes], name: str, kind: str, *, inline: bool) -> AsyncIterator[HttpBody]:
    """Sends a file that is there as a whole; what it is in the first chunk."""
    digest, size_bytes = await asyncio.to_thread(_measure, file)
    info = FileInfo(file_name=name, size_bytes=size_bytes, etag=digest, inline=inline)
    chunk = HttpBody(content_type=kind)
    chunk.extensions.add().Pack(info)
    while data := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        chunk.data = data
        yield chunk
        chunk = HttpBody()


def _measure(file: IO[bytes]) -> tuple[str, int]:
    """Returns hash and size of a file, and goes to its beginning."""
    file.seek(0)
    digest = hashlib.sha256()
    while data := file.read(_CHUNK_BYTES):
        digest.update(data)
    size_bytes = file.tell()
    file.seek(0)
    return digest.hexdigest()[:32], size_bytes


def _digest(*messages: Message) -> bytes:
    digest = hashlib.sha256()
    for message in messages:
        digest.update(message.SerializeToString(deterministic=True))
    return digest.digest()


def _series_digest(series: tuple[Series, ...]) -> bytes:
    digest = hashlib.sha256()
    for one in series:
        digest.update(one.name.encode() + one.positions_N.tobytes() + one.values_N.tobytes())
    return digest.digest()


def _nothing_to_draw(request: report_pb2.DownloadChartRequest) -> FailedPrecondition:
    if is_of_series(request.chart):
        what = "no epoch has measured it yet; ask again when an epoch is finished"
    else:
        what = (
            f"the {SPLITS[request.split]} split has nothing to draw in it: no boxes or detections"
        )
    return FailedPrecondition(
        f"there is no chart {Chart.Name(request.chart)} of {request.training}: {what}",
        reason="NOTHING_TO_DRAW",
    )
