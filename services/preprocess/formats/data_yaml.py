"""The data.yaml of YOLO archives: names of classes, and hints at splits; nothing is followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from services.preprocess.domain import SPLITS, InvalidData, Reason
from services.preprocess.formats.layout import check_class_names
from services.preprocess.formats.splits import split_of_name

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 10
_MAX_HINTS = 100


@dataclass(frozen=True, slots=True)
class DataYaml:
    """What is read of a data.yaml.

    Attributes:
        names: The classes.
        hints: Paths as they are written in it, by split.
    """

    names: tuple[str, ...]
    hints: dict[str, tuple[str, ...]]


def read_data_yaml(path: str, data: bytes) -> DataYaml:
    """Reads a data.yaml with a safe loader, without aliases.

    Raises:
        InvalidData: BAD_DATA_YAML: it is too large or too deep, no plain YAML, or its names are
            wrong.
    """

    def bad(description: str) -> InvalidData:
        return InvalidData(path, Reason.BAD_DATA_YAML, description)

    if len(data) > _MAX_BYTES:
        raise bad(f"files above {_MAX_BYTES} bytes are not read; keep names and nc only")
    try:
        _check_events(path, data)
        content = yaml.load(data, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OverflowError) as error:
        line = str(error).splitlines()[0] if str(error) else "unreadable"
        raise bad(f"not plain YAML ({line}); keep names and nc only") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise bad("names must be numbered 0, 1, 2, ... without gaps")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise bad("names is missing; list the class names there")
    if not all(isinstance(name, str | int | float) for name in names):
        raise bad("names must be a list of texts")
    num_classes = content.get("nc", len(names))
    if num_classes != len(names):
        raise bad(f"nc is {num_classes!r:.40} but there are {len(names)} names; correct one")
    return DataYaml(check_class_names(path, [str(name) for name in names]), _hints(content))


def _hints(content: dict[Any, Any]) -> dict[str, tuple[str, ...]]:
    hints: dict[str, tuple[str, ...]] = {}
    for key, value in content.items():
        split = split_of_name(key) if isinstance(key, str) else None
        values = value if isinstance(value, list) else [value]
        if split in SPLITS:
            hints[split] = tuple(v for v in values[:_MAX_HINTS] if isinstance(v, str))
    return hints


def _check_events(path: str, data: bytes) -> None:
    """Refuses aliases and deep nesting before anything is built."""
    depth = 0
    for event in yaml.parse(data, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise InvalidData(path, Reason.BAD_DATA_YAML, "aliases are not read; write it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise InvalidData(path, Reason.BAD_DATA_YAML, "it is nested too deeply; flatten it")
