"""Reports as one HTML file: everything is inside, nothing runs and nothing is fetched."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from services.metrics.reports import texts
from services.metrics.reports.comparison_facts import comparison_facts
from services.metrics.reports.content import ComparisonContent, TrainingContent
from services.metrics.reports.facts import training_facts
from services.metrics.reports.gallery import comparison_charts, training_charts
from services.metrics.reports.style import render, styled

_TEMPLATES = Path(__file__).parent / "templates"


def training_page(content: TrainingContent, language: str) -> bytes:
    """Makes the report of a training."""
    charts = training_charts(content, language)
    facts = training_facts(content, language)
    return _page("training.html", language, charts, facts)


def comparison_page(content: ComparisonContent, language: str) -> bytes:
    """Makes the report of a comparison."""
    charts = comparison_charts(content.comparison, language)
    return _page("comparison.html", language, charts, comparison_facts(content, language))


def _page(template: str, language: str, charts: dict[str, Figure], facts: dict[str, Any]) -> bytes:
    style = (_TEMPLATES / "report.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    html = (
        _environment()
        .get_template(template)
        .render(
            facts,
            language=language,
            t=texts.texts(language),
            style=Markup(style),
            style_sha256=digest,
            charts={name: _data_url("image/svg+xml", _svg(one)) for name, one in charts.items()},
        )
    )
    return html.encode()


def _svg(drawing: Figure) -> bytes:
    with styled():
        return render(drawing, svg=True)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=number, signed=signed, jpeg=lambda data: _data_url("image/jpeg", data)
    )
    return environment


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def number(value: float) -> str:
    """Renders a figure of 0..1; a dash where there is nothing to measure."""
    return f"{value:.3f}" if math.isfinite(value) and value >= 0 else "–"


def signed(value: float) -> str:
    """Renders a difference."""
    return f"{value:+.3f}" if math.isfinite(value) else "–"
