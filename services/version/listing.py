"""What ListVersions can filter and sort by, and where its pages end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from detflow.errors import bad_field
from detflow.pagination import bad_token
from services.version.domain import METRICS, State, Version, name_key
from services.version.filter import Condition, Field

_EQUALITY, _COMPARISON = ("=", "!="), ("=", "!=", "<", "<=", ">", ">=")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TIME = 'a time such as "2026-01-31T08:00:00Z", or a day'


def _compare_state(key: str, operator: str, value: str) -> tuple[str, int]:
    return f"state_number {operator} {{}}", state_number(State(value))


def _compare_name(key: str, operator: str, value: str) -> tuple[str, str]:
    name = name_key(value)
    if "*" not in name:
        return f"name_key {operator} {{}}", name
    like = "like" if operator == "=" else "not like"
    return f"name_key {like} {{}}", re.sub(r"([\\%_])", r"\\\1", name).replace("*", "%")


def _compare_dataset(key: str, operator: str, value: str) -> tuple[str, str]:
    return f"dataset {operator} {{}}", value


def _compare_time(column: str) -> Callable[[str, str, str], tuple[str, datetime]]:
    def compare(key: str, operator: str, value: str) -> tuple[str, datetime]:
        time = datetime.fromisoformat(value)
        if time.tzinfo is None and len(value) > len("2026-01-31"):
            raise ValueError(value)
        time = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
        return f"{column} {operator} {{}}", time

    return compare


def _compare_metric(column: str) -> Callable[[str, str, str], tuple[str, float]]:
    def compare(key: str, operator: str, value: str) -> tuple[str, float]:
        if not _NUMBER.fullmatch(value) or not math.isfinite(float(value)):
            raise ValueError(value)
        return f"{column} {operator} {{}}", float(value)

    return compare


def _has_label(key: str, operator: str, value: str) -> tuple[str, str]:
    return "labels ? {}", value


def _compare_label(key: str, operator: str, value: str) -> tuple[str, str]:
    negation = "not " if operator == "!=" else ""
    return f"{negation}labels @> {{}}", json.dumps({key: value})


FIELDS = {
    "state": Field(_EQUALITY, f"a state ({', '.join(State)})", _compare_state),
    "display_name": Field(_EQUALITY, 'a name such as "V_0", or "V_*"', _compare_name),
    "dataset": Field(_EQUALITY, "the resource name of a dataset", _compare_dataset),
    "create_time": Field(_COMPARISON, _TIME, _compare_time("create_time")),
    "update_time": Field(_COMPARISON, _TIME, _compare_time("update_time")),
    **{f"metrics.{m}": Field(_COMPARISON, "a number", _compare_metric(m)) for m in METRICS},
    "labels": Field((":",), "the key of a label", _has_label),
    "labels.*": Field(_EQUALITY, "the value of a label", _compare_label),
}
"""What a filter can compare, by name."""


EVERYTHING = Condition("true", ())


@dataclass(frozen=True, slots=True)
class PageKey:
    """Where a page ended: what its last version was sorted by (None: it has none), and its id."""

    value: str | int | float | datetime | None
    id: str


@dataclass(frozen=True, slots=True)
class Part:
    """Versions that one index has in the order that is asked for.

    Attributes:
        condition: SQL of which they are.
        columns: What they are sorted by.
        direction: "asc" or "desc", of all columns.
        start: Values of the columns after which it begins; empty for its beginning.
    """

    condition: str
    columns: tuple[str, ...]
    direction: str
    start: tuple[Any, ...]

    @property
    def behind(self) -> str:
        """Operator between the columns of what comes later and `start`."""
        return "<" if self.direction == "desc" else ">"


@dataclass(frozen=True, slots=True)
class Order:
    """An order of versions; those with the same value are in the order of their ids.

    Attributes:
        expression: SQL of what is compared.
        is_metric: Not every version has it; those without come last.
        descending: Highest first.
        value: What is compared of a version.
    """

    expression: str
    is_metric: bool
    descending: bool
    value: Callable[[Version], Any]

    def parts(self, after: PageKey | None) -> list[Part]:
        """Returns what to read, one part after the other, behind the end of a page.

        Versions that have no figures come last whichever way the order goes, which no single index
        gives.
        """
        direction = "desc" if self.descending else "asc"
        start = (after.value, after.id) if after else ()
        if not self.is_metric:
            return [Part("true", (self.expression, "id"), direction, start)]
        measured = Part(
            "metrics_training_id is not null", (self.expression, "id"), direction, start
        )
        unmeasured = Part("metrics_training_id is null", ("id",), direction, ())
        if after is None or after.value is not None:
            return [measured, unmeasured]
        return [replace(unmeasured, start=(after.id,))]

    def key(self, version: Version) -> tuple[str, str]:
        """Returns what a page that ends with this version is continued by."""
        value = self.value(version)
        return json.dumps(value.isoformat() if isinstance(value, datetime) else value), version.id

    def parse_key(self, key: list[str | int]) -> PageKey:
        """Reads back what `key` returned; a token is no secret, so it can hold anything.

        Raises:
            InvalidArgument: BAD_PAGE_TOKEN.
        """
        try:
            text, version_id = map(str, key)
            return PageKey(self._parse(json.loads(text)), version_id)
        except (ValueError, OverflowError, RecursionError) as error:
            raise bad_token() from error

    def _parse(self, value: object) -> str | int | float | datetime | None:
        if self.is_metric:
            if value is None or isinstance(value, float):
                return value
        elif self.expression == "state_number":
            if type(value) is int and 0 < value <= len(State):
                return value
        elif isinstance(value, str) and "\0" not in value:
            value.encode()  # half a character is a ValueError
            is_time = self.expression in ("create_time", "update_time")
            return datetime.fromisoformat(value).astimezone(UTC) if is_time else value
        raise ValueError(value)


def parse_order(text: str) -> Order:
    """Reads an order such as "metrics.map50 desc"; empty means newest first.

    Raises:
        InvalidArgument: BAD_ORDER.
    """
    field, *rest = text.split() or ["create_time", "desc"]
    known = _ORDERS.get(field)
    if known is None or rest not in ([], ["desc"]):
        raise bad_field(
            "order_by",
            "BAD_ORDER",
            f'must be one of {", ".join(_ORDERS)}, or one followed by " desc", not {text!r}',
        )
    expression, value = known
    return Order(expression, field.startswith("metrics."), bool(rest), value)


def state_number(state: State) -> int:
    """Returns the number of a state in detflow.v1.Version.State: the order in which they come."""
    return [*State].index(state) + 1


def _metric(name: str) -> Callable[[Version], float | None]:
    return lambda version: getattr(version.metrics, name) if version.metrics else None


_ORDERS: dict[str, tuple[str, Callable[[Version], Any]]] = {
    "create_time": ("create_time", lambda version: version.create_time),
    "update_time": ("update_time", lambda version: version.update_time),
    "display_name": ('(display_name collate "C")', lambda version: version.display_name),
    "state": ("state_number", lambda version: state_number(version.state)),
    **{f"metrics.{metric}": (metric, _metric(metric)) for metric in METRICS},
}

NEWEST_FIRST = parse_order("")
