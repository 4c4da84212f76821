"""What the commands about access read and print."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from detflow.cli import access, projects
from tests.cli_rig import Rig, rig

__all__ = ["rig"]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("90d", timedelta(days=90)),
        ("12h", timedelta(hours=12)),
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T12:00+09:00", datetime(2027, 1, 31, 3, tzinfo=UTC)),
        ("never", None),
        ("", None),
    ],
)
def test_end_is_a_time_from_now_or_a_day(text: str, end: datetime | timedelta | None) -> None:
    assert access.parse_end(text) == end


@pytest.mark.parametrize("text", ["90", "d", "-1d", "1y", "tomorrow", "99999999d", "2027-13-01"])
def test_end_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="90d or 12h"):
        access.parse_end(text)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("0", 0), ("500", 500), ("500GB", 500 * 10**9), ("1.5 TB", 1_500_000_000_000)],
)
def test_size_has_a_unit_or_is_in_bytes(text: str, num_bytes: int) -> None:
    assert projects.bytes_of(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 GiB", "1e9", "99999999999"])
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="500GB"):
        projects.bytes_of(text)


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "create", "ci", "--role", "boss"),
        ("keys", "create", "ci", "--expires", "soon"),
        ("members", "set", "kim@example.com", "--role", ""),
        ("projects", "quota", "p", "--max-storage", "much"),
    ],
)
def test_bad_words_are_refused_before_anything_is_called(rig: Rig, words: tuple[str, ...]) -> None:
    done = rig.run(*words)
    assert done.code == 2 and done.out == ""


def test_browser_is_given_a_file_and_not_the_link(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DETFLOW_DATA_DIR", str(tmp_path / "data"))
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    for ticket in ("first", "second"):
        access.show(f"http://127.0.0.1:7100/login?ticket={ticket}")
    page = tmp_path / "data" / "open.html"
    assert opened == [page.as_uri()] * 2
    assert "ticket=second" in page.read_text()
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
