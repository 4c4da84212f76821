"""What is asked of the process that draws; nothing of it is loaded by who asks."""

from __future__ import annotations

from dataclasses import dataclass

from detflow.v1.report_pb2 import DownloadChartRequest
from services.metrics.reports.content import ComparisonContent, SplitContent, TrainingContent
from services.metrics.series import Series

Chart = DownloadChartRequest.Chart


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob:
    """A report, in a zip with its charts and tables if wanted."""

    content: TrainingContent | ComparisonContent
    language: str
    in_zip: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartJob:
    """One chart, of series or of a split."""

    chart: Chart.ValueType
    language: str
    svg: bool
    series: tuple[Series, ...] = ()
    split: SplitContent | None = None


Job = ReportJob | ChartJob


def is_of_series(chart: Chart.ValueType) -> bool:
    """Says whether a chart is drawn from series by epoch, not from an evaluation."""
    return chart in (Chart.LOSSES, Chart.QUALITY, Chart.LEARNING_RATE, Chart.PERFORMANCE)


def chart_name(chart: Chart.ValueType) -> str:
    """Names a chart in files: precision-recall."""
    return Chart.Name(chart).lower().replace("_", "-")
