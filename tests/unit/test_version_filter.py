"""What a filter of versions may say, and that nothing else comes through."""

import re
from datetime import datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from detflow.errors import InvalidArgument
from services.version.filter import MAX_COMPARISONS, MAX_DEPTH, parse_filter
from services.version.listing import FIELDS, parse_order

# All that the parser may ever put into SQL: names of columns, operators, parameters.
_SQL = re.compile(
    r"(?:[ ()]|and|or|is not true|true|not|like|@>|\?|<=|>=|!=|[=<>]|\$[0-9]+"
    r"|state_number|name_key|dataset|create_time|update_time|labels|map50_95|map50|precision|recall)*"
)
_PIECES = [
    *[field.replace("*", "site") for field in FIELDS],
    *["AND", "OR", "NOT", "-", "(", ")", "=", "!=", "<", ">=", ":", '"', "'", "\\", ".", "*", ","],
    *[
        "READY",
        "V_0",
        '"x"',
        "'x'",
        "0.5",
        "1e400",
        "nan",
        "2026-01-31",
        "2026-01-31T08:00:00+09:00",
    ],
    *[
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
        "--",
        ";",
        "$1",
        "%",
        "_",
        "\0",
        "한글",
    ],
    *["drop table version", "{}", "{0}", "{", "\n", "\u2028"],
]


def sql(text: str) -> str:
    """Returns the condition of a filter, its parameters beginning with $2."""
    return parse_filter(text, FIELDS, first=2).sql


@given(
    st.one_of(st.text(max_size=60), st.lists(st.sampled_from(_PIECES), max_size=14).map(" ".join))
)
@example('state = READY) or true or (state = "READY"')
@example("labels.a = '\\' or 1=1 --'")
def test_any_text_is_a_filter_without_a_piece_of_it_or_refused(text: str) -> None:
    try:
        condition = parse_filter(text, FIELDS, first=2)
    except InvalidArgument as error:
        assert error.reason == "BAD_FILTER"
        (violation,) = error.violations
        assert violation.field == "filter"
        assert re.search(r"expected .+ at position [0-9]+, not ", violation.description)
    else:
        assert _SQL.fullmatch(condition.sql)
        assert condition.sql.count("$") == len(condition.parameters)
        for number in range(len(condition.parameters)):
            assert f"${number + 2}" in condition.sql


def test_or_binds_tighter_than_and_as_aip_160_says() -> None:
    assert sql("state=READY AND state=FAILED OR state=PAUSED") == (
        "((state_number = $2) and (state_number = $3 or state_number = $4))"
    )


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("stat = READY", 1, "a comparison of one of state,"),
        ("state", 6, "= or != after state"),
        ("state >= READY", 7, "= or != after state"),
        ("state = ready", 9, "a state (PREPROCESSING,"),
        ("metrics.map50 >= high", 18, "a number"),
        ("metrics.map75 > 0.5", 1, "metrics.map50"),
        ("create_time > yesterday", 15, "a time such as"),
        ("create_time > 2026-01-31T08:00:00", 15, "a time such as"),
        ("(state = READY", 15, "AND, OR or )"),
        ("state = READY state = FAILED", 15, "AND, OR or the end"),
        ("state = READY AND", 18, "a comparison"),
        ('labels.site = "hall', 15, "the value of a label"),
        ("labels.site > 3", 13, "= or != after labels.site"),
        ("labels.Site = x", 7, ": after labels"),
        ("display_name = a\0b", 17, "text without NUL"),
        ("(" * (MAX_DEPTH + 1) + "state = READY" + ")" * (MAX_DEPTH + 1), MAX_DEPTH + 2, "at most"),
        (" OR ".join(["state=READY"] * (MAX_COMPARISONS + 1)), 751, "at most"),
    ],
)
def test_wrong_filter_is_refused_with_the_place_and_what_was_expected(
    text: str, position: int, expected: str
) -> None:
    with pytest.raises(InvalidArgument, match=rf"at position {position}, not") as caught:
        sql(text)
    assert expected in caught.value.message


@pytest.mark.parametrize(
    "text", ["seed", "create_time asc", "create_time, state", "desc", "state DESC"]
)
def test_unknown_order_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_order(text)
    assert [violation.field for violation in caught.value.violations] == ["order_by"]


@given(
    st.text(max_size=40),
    st.sampled_from(["state", "update_time", "display_name", "metrics.recall"]),
)
@example("1e999", "state")
@example('"READY"', "state")
@example("true", "state")
@example("null", "metrics.recall")
@example('"0.5"', "metrics.recall")
@example('"\\ud800"', "display_name")
@example("[" * 40, "state")
@example('"0001-01-01T00:00:00+14:00"', "update_time")
def test_any_page_key_is_read_or_refused(text: str, order: str) -> None:
    kinds = {"state": int, "update_time": datetime, "display_name": str}
    try:
        value = parse_order(order).parse_key([text, "d1"]).value
        assert isinstance(value, kinds.get(order, float)) or (
            order == "metrics.recall" and not value
        )
    except InvalidArgument as error:
        assert error.reason == "BAD_PAGE_TOKEN"
