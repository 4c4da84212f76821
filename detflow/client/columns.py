"""Whole series as columns of numbers, without a Python object for each."""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from detflow.v1 import metrics_pb2


@dataclass(frozen=True, slots=True)
class Columns:
    """One series, positions increasing; `numpy.asarray` makes an array of each without a copy.

    Attributes:
        values: The values: float64.
        epochs: Epoch in which each was measured, from 1: int32.
        steps: Step within the epoch, from 1: int32; empty of a series by epoch.
        positions: Epochs finished when it was measured, 2.25 is a quarter into the third: float64;
            empty of a series by epoch.
    """

    values: memoryview[float]
    epochs: memoryview[int]
    steps: memoryview[int]
    positions: memoryview[float]


def join(messages: Iterable[metrics_pb2.MetricColumns]) -> dict[str, Columns]:
    """Puts the parts of each series together."""
    parts: dict[str, list[metrics_pb2.MetricColumns]] = {}
    for message in messages:
        parts.setdefault(message.name, []).append(message)
    return {
        name: Columns(
            values=_native("d", b"".join(part.values for part in found)),
            epochs=_native("i", b"".join(part.epochs for part in found)),
            steps=_native("i", b"".join(part.steps for part in found)),
            positions=_native("d", b"".join(part.positions for part in found)),
        )
        for name, found in parts.items()
    }


def _native(code: Literal["d", "i"], content: bytes) -> memoryview[Any]:
    """Returns little-endian numbers as this machine's."""
    if sys.byteorder == "little":
        return memoryview(content).cast(code)
    numbers = array.array(code, content)
    numbers.byteswap()
    return memoryview(numbers)
