"""Filters (AIP-160) as conditions in SQL with parameters.

    filter      = [ expression ]
    expression  = factor { "AND" factor }
    factor      = term { "OR" term }                  OR binds tighter than AND: so says AIP-160
    term        = [ "NOT" | "-" ] ( "(" expression ")" | comparison )
    comparison  = field operator value

What a user writes becomes a parameter or picks one of the texts in this file; it is never a part of
the SQL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from detflow.errors import bad_field

MAX_DEPTH = 20
"""Parentheses and negations inside one another."""

MAX_COMPARISONS = 50

_FIELD = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_-]{0,62})?")
_OPERATOR = re.compile(r"!=|<=|>=|[=<>:]")
_VALUE = re.compile(r"""\"(?:[^"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s()"'=<>!]+""", re.DOTALL)
_KEYWORD = re.compile(r"(?:AND|OR|NOT)(?=[\s(]|$)")


@dataclass(frozen=True, slots=True)
class Field:
    """Something that can be compared.

    Attributes:
        operators: Those that it has.
        expected: What stands on their right side.
        compare: From what follows the dot in its name, operator and value to the SQL, `{}` for the
            parameter, and the parameter; a ValueError or OverflowError refuses the value.
    """

    operators: tuple[str, ...]
    expected: str
    compare: Callable[[str, str, str], tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on the rows of a table.

    Attributes:
        sql: With parameters from `$first` on, as asked for.
        parameters: Their values.
    """

    sql: str
    parameters: tuple[Any, ...]


def parse_filter(text: str, fields: Mapping[str, Field], first: int) -> Condition:
    """Reads a filter; an empty one lets everything through.

    Args:
        text: What the user wrote.
        fields: What can be compared, by name; "labels.*" stands for whatever follows the dot.
        first: Number of the first parameter in the SQL.

    Raises:
        InvalidArgument: BAD_FILTER, with the position and what was expected there.
    """
    parser = _Parser(text, fields, first)
    return Condition(parser.parse(), tuple(parser.parameters))


class _Parser:
    """Recursive descent over the text; `position` counts from 0 and is what comes next."""

    def __init__(self, text: str, fields: Mapping[str, Field], first: int) -> None:
        self._text = text
        self._fields = fields
        self._first = first
        self._position = 0
        self.parameters: list[Any] = []

    def parse(self) -> str:
        if "\0" in self._text:
            self._fail(self._text.index("\0"), "text without NUL characters")
        self._skip_space()
        if self._position == len(self._text):
            return "true"
        sql = self._expression(0)
        if self._position < len(self._text):
            self._fail(self._position, "AND, OR or the end")
        return sql

    def _expression(self, depth: int) -> str:
        parts = [self._factor(depth)]
        while self._keyword("AND"):
            parts.append(self._factor(depth))
        return f"({' and '.join(parts)})"

    def _factor(self, depth: int) -> str:
        parts = [self._term(depth)]
        while self._keyword("OR"):
            parts.append(self._term(depth))
        return f"({' or '.join(parts)})"

    def _term(self, depth: int) -> str:
        if depth > MAX_DEPTH:
            self._fail(self._position, f"at most {MAX_DEPTH} parentheses and NOT inside each other")
        if self._keyword("NOT") or self._symbol("-"):
            # A comparison with what a version does not have is null, and its negation true.
            return f"({self._term(depth + 1)} is not true)"
        if not self._symbol("("):
            return self._comparison()
        sql = self._expression(depth + 1)
        if not self._symbol(")"):
            self._fail(self._position, "AND, OR or )")
        return sql

    def _comparison(self) -> str:
        start = self._position
        if len(self.parameters) == MAX_COMPARISONS:
            self._fail(start, f"at most {MAX_COMPARISONS} comparisons")
        name = _FIELD.match(self._text, start)
        parent, _, key = name[0].partition(".") if name else ("", "", "")
        field = self._fields.get(name[0] if name else "") or self._fields.get(f"{parent}.*")
        if name is None or field is None:
            self._fail(start, f"a comparison of one of {', '.join(self._fields)}")
        self._move(name.end())
        operator = _OPERATOR.match(self._text, self._position)
        if operator is None or operator[0] not in field.operators:
            self._fail(self._position, f"{' or '.join(field.operators)} after {name[0]}")
        self._move(operator.end())
        start = self._position
        value = _VALUE.match(self._text, start)
        if value is None or _KEYWORD.match(self._text, start):
            self._fail(start, field.expected)
        try:
            sql, parameter = field.compare(key, operator[0], _unquoted(value[0]))
        except (ValueError, OverflowError):
            self._fail(start, field.expected)
        self._move(value.end())
        self.parameters.append(parameter)
        return sql.format(f"${self._first + len(self.parameters) - 1}")

    def _keyword(self, word: str) -> bool:
        match = _KEYWORD.match(self._text, self._position)
        if match is None or match[0] != word:
            return False
        self._move(match.end())
        return True

    def _symbol(self, symbol: str) -> bool:
        if not self._text.startswith(symbol, self._position):
            return False
        self._move(self._position + 1)
        return True

    def _move(self, position: int) -> None:
        self._position = position
        self._skip_space()

    def _skip_space(self) -> None:
        while self._position < len(self._text) and self._text[self._position].isspace():
            self._position += 1

    def _fail(self, position: int, expected: str) -> NoReturn:
        found = self._text[position : position + 20] or "the end"
        raise bad_field(
            "filter", "BAD_FILTER", f"expected {expected} at position {position + 1}, not {found!r}"
        )


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL) if value[0] in "\"'" else value
