"""What reports and charts say, in English and Korean; the words are those of the glossary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from detflow.v1.analysis_pb2 import ErrorKind
from detflow.v1.training_pb2 import Training

_ALL: dict[str, dict[str, dict[str, str]]] = json.loads(
    (Path(__file__).parent / "texts.json").read_text(encoding="utf-8")
)


def text(key: str, language: str) -> str:
    """Returns a text in a language: en or ko."""
    return _ALL["texts"][key][language]


def texts(language: str) -> Mapping[str, str]:
    """Returns all texts in a language, by key."""
    return {key: one[language] for key, one in _ALL["texts"].items()}


def figure_meaning(name: str, language: str) -> str:
    """Says what a figure means, by its name in CocoSummary or OperatingPoint."""
    return _ALL["figures"][name][language]


def error_kind(kind: ErrorKind.ValueType, language: str) -> str:
    """Names a kind of error."""
    return _ALL["errors"][ErrorKind.Name(kind)][language]


def error_remedy(kind: ErrorKind.ValueType, language: str) -> str:
    """Says what helps against a kind of error."""
    return _ALL["remedies"][ErrorKind.Name(kind)][language]


def state(of: Training.State.ValueType, language: str) -> str:
    """Names a state of a training."""
    return _ALL["states"][Training.State.Name(of)][language]
