"""One advanced hyper-parameter: its type, what each model family allows and takes by default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from detflow.errors import Violation
from services.trainer.models import FAMILIES

Value: TypeAlias = float | bool | str
"""Value in force; whole numbers travel as doubles (google.protobuf.Value)."""

FIELD = "training.hyperparameters"


class Type(Enum):
    """Type of a value."""

    INTEGER = auto()
    NUMBER = auto()
    BOOLEAN = auto()
    CHOICE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Numbers that are allowed.

    Attributes:
        minimum: Least allowed value.
        maximum: Greatest allowed value.
        multiple_of: The value must be a multiple of this, for whole numbers.
    """

    minimum: float
    maximum: float
    multiple_of: int = 1

    def holds(self, number: float, type_: Type) -> bool:
        """Says whether a number is allowed; NaN and infinities never are."""
        if not math.isfinite(number) or not self.minimum <= number <= self.maximum:
            return False
        return type_ is Type.NUMBER or number % self.multiple_of == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameter:
    """One entry of the schema.

    Attributes:
        name: As in `Training.hyperparameters` and `--set name=value`.
        type: Type of the value.
        default: Default of every family that `family_defaults` does not name.
        range: Allowed values, for numbers.
        choices: Allowed values, for CHOICE.
        only: Families in which it has an effect; empty means all.
        family_defaults: Defaults of the families that differ.
        family_ranges: Ranges of the families that differ.
        help_en: Help in English.
        help_ko: Help in Korean.
    """

    name: str
    type: Type
    default: Value
    range: Range | None = None
    choices: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    family_defaults: Mapping[str, Value] = field(default_factory=dict)
    family_ranges: Mapping[str, Range] = field(default_factory=dict)
    help_en: str
    help_ko: str

    @property
    def families(self) -> list[str]:
        """Families of the catalogue in which it has an effect."""
        return [family for family in FAMILIES if self.supports(family)]

    def supports(self, family: str) -> bool:
        """Says whether it has an effect in a model family."""
        return not self.only or family in self.only

    def default_of(self, family: str) -> Value:
        """Returns the default of a model family."""
        return self.family_defaults.get(family, self.default)

    def defaults(self) -> dict[str, Value]:
        """Returns the default of every family in which it has an effect."""
        return {family: self.default_of(family) for family in self.families}

    def range_of(self, family: str) -> Range:
        """Returns what a model family allows; for numbers only."""
        allowed = self.family_ranges.get(family, self.range)
        assert allowed is not None
        return allowed

    def range_text(self, family: str) -> str:
        """Says in words what a model family allows."""
        if self.type is Type.BOOLEAN:
            return "true or false"
        if self.type is Type.CHOICE:
            return f"one of {', '.join(self.choices)}"
        kind = "a whole number" if self.type is Type.INTEGER else "a number"
        allowed = self.range_of(family)
        text = f"{kind} from {allowed.minimum:g} to {allowed.maximum:g}"
        if allowed.multiple_of != 1:
            text += f", a multiple of {allowed.multiple_of}"
        return f"{text}, for {family}" if family in self.family_ranges else text

    def check(self, value: object, family: str) -> Violation | None:
        """Checks one value for a model family; returns what is wrong with it, if anything."""
        if not self.supports(family):
            having = " and ".join(self.only)
            problem = f"{self.name} has no effect on {family}, only on {having}; leave it out"
            return Violation(f"{FIELD}.{self.name}", "UNSUPPORTED_HYPERPARAMETER", problem)
        reason = self._reason_against(value, family)
        if reason is None:
            return None
        problem = f"{self.name} is {value!r}; it must be {self.range_text(family)}"
        return Violation(f"{FIELD}.{self.name}", reason, problem)

    def typed(self, value: object) -> Value:
        """Returns a value that `check` found good, a whole number as an int."""
        assert isinstance(value, int | float | str)  # a bool is an int too
        return int(value) if self.type is Type.INTEGER else value

    def _reason_against(self, value: object, family: str) -> str | None:
        if self.type is Type.BOOLEAN:
            return None if isinstance(value, bool) else "WRONG_TYPE"
        if self.type is Type.CHOICE:
            if not isinstance(value, str):
                return "WRONG_TYPE"
            return None if value in self.choices else "OUT_OF_RANGE"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "WRONG_TYPE"
        holds = self.range_of(family).holds(float(value), self.type)
        return None if holds else "OUT_OF_RANGE"
