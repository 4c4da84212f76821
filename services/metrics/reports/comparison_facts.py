"""What the page of a comparison says, as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detflow.v1.common_pb2 import Split
from detflow.v1.comparison_pb2 import Comparison
from services.metrics.reports.comparison_charts import METRICS, side
from services.metrics.reports.content import ComparisonContent
from services.metrics.reports.texts import text

_MAX_CLASS_ROWS = 200


def comparison_facts(content: ComparisonContent, language: str) -> dict[str, Any]:
    """Returns what the template of a comparison shows, by name."""
    comparison = content.comparison
    letters = {one.training: side(place) for place, one in enumerate(comparison.sides)}
    split = text("val" if comparison.split == Split.SPLIT_VAL else "test", language)
    return {
        "summary": text("compared_on", language).format(
            num=len(comparison.sides),
            images=f"{comparison.num_images:,}",
            split=split,
            draws=comparison.num_resamples,
            level=f"{100 * comparison.confidence_level:g}",
        ),
        "verdicts": list(_verdicts(comparison, letters, language)),
        "sides": [
            {"letter": letters[one.training], "version": version, "side": one}
            for one, version in zip(comparison.sides, content.versions, strict=True)
        ],
        "deltas": [
            {
                "name": text(METRICS[one.metric], language)
                if one.metric in METRICS
                else one.metric,
                "letter": letters[one.training],
                "delta": one,
                "look": _look(one),
            }
            for one in comparison.deltas
        ],
        "class_deltas": [
            {
                "name": one.class_name,
                "letter": letters[one.training],
                "delta": one,
                "look": _look(one),
            }
            for one in sorted(comparison.class_deltas, key=lambda one: -abs(one.delta))
            if one.num_ground_truths
        ][:_MAX_CLASS_ROWS],
        "letters": list(letters.values()),
        "parameters": comparison.parameters,
        "pairs": content.pairs,
    }


def _verdicts(
    comparison: Comparison, letters: dict[str, str], language: str
) -> Iterator[tuple[str, str]]:
    """Yields look and sentence about each training but the first."""
    for one in comparison.deltas:
        if one.metric != "map50_95":
            continue
        key = "no_difference"
        if one.significant:
            key = "better" if one.delta > 0 else "worse"
        yield (
            _look(one),
            text(key, language).format(
                side=letters[one.training],
                delta=f"{one.delta:+.3f}",
                low=f"{one.low:+.3f}",
                high=f"{one.high:+.3f}",
            ),
        )


def _look(one: Comparison.Delta | Comparison.ClassDelta) -> str:
    if not one.significant:
        return "same"
    return "better" if one.delta > 0 else "worse"
