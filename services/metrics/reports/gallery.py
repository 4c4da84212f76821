"""Which charts there are, by the name that files and pages give them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from detflow.v1.comparison_pb2 import Comparison
from services.metrics.reports import charts
from services.metrics.reports import comparison_charts as comparing
from services.metrics.reports.confusion import confusion
from services.metrics.reports.content import SplitContent, TrainingContent
from services.metrics.reports.jobs import Chart, chart_name, is_of_series
from services.metrics.series import Series

_OF_SERIES = {
    Chart.LOSSES: charts.losses,
    Chart.QUALITY: charts.quality,
    Chart.LEARNING_RATE: charts.learning_rate,
    Chart.PERFORMANCE: charts.performance,
}
_OF_CURVES = {
    Chart.PRECISION_RECALL: charts.precision_recall,
    Chart.CONFIDENCE: charts.confidence,
    Chart.CALIBRATION: charts.calibration,
}
_OF_ANALYSIS = {Chart.CONFUSION: confusion, Chart.ERRORS: charts.errors}


def series_chart(chart: Chart.ValueType, series: Sequence[Series], language: str) -> Figure | None:
    """Draws a chart of series; None if there is nothing to be drawn."""
    return _OF_SERIES[chart](series, language)


def split_chart(chart: Chart.ValueType, content: SplitContent, language: str) -> Figure | None:
    """Draws a chart of a split; None if there is nothing to be drawn."""
    if chart == Chart.CLASSES:
        return charts.classes(content.evaluation.classes, language)
    if chart in _OF_CURVES:
        return _OF_CURVES[chart](content.curves, language) if content.curves else None
    return _OF_ANALYSIS[chart](content.analysis, language) if content.analysis else None


def training_charts(content: TrainingContent, language: str) -> dict[str, Figure]:
    """Draws every chart that there is something for; those of splits of the one that counts."""
    drawn: dict[str, Figure | None] = {}
    for chart in Chart.values():
        if is_of_series(chart):
            drawn[chart_name(chart)] = series_chart(chart, content.series, language)
        elif chart and content.main_split:
            drawn[chart_name(chart)] = split_chart(chart, content.main_split, language)
    return {name: one for name, one in drawn.items() if one is not None}


def comparison_charts(comparison: Comparison, language: str) -> dict[str, Figure]:
    """Draws every chart of a comparison."""
    drawn = {
        "deltas": comparing.deltas(comparison, language),
        "class-deltas": comparing.class_deltas(comparison, language),
    }
    return {name: one for name, one in drawn.items() if one is not None}
