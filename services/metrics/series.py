"""Points to series."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from services.metrics.domain import Point, Series


def to_series(points: Iterable[Point]) -> list[Series]:
    """Groups points into one series per name, sorted by name, epochs increasing."""
    ordered = sorted(points, key=lambda point: (point.name, point.epoch))
    found = []
    for name, group in itertools.groupby(ordered, key=lambda point: point.name):
        members = list(group)
        found.append(
            Series(
                name=name,
                epochs=tuple(point.epoch for point in members),
                values=tuple(point.value for point in members),
            )
        )
    return found
