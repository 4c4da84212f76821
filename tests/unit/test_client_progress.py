"""Bars and lines of progress."""

import io
import sys

import pytest

from detflow.client.progress import Progress, TrainingProgress, shown
from detflow.v1 import common_pb2, training_pb2


def given(progress: Progress) -> Progress:
    """Gives what a caller may give, for the type checker."""
    return progress


def given_training(progress: TrainingProgress) -> TrainingProgress:
    return progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_function_is_called_and_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[common_pb2.Progress] = []
    with shown(given(told.append)) as update:
        assert update is not None
        update(common_pb2.Progress(stage="check"))
    for nothing in (None, False):
        with shown(given(nothing)) as update:
            assert update is None
    assert [one.stage for one in told] == ["check"]
    assert capsys.readouterr() == ("", "")


def test_away_from_a_terminal_there_is_a_line_for_each_ten_percent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shown(given(True)) as update:
        assert update is not None
        for percent in (0.0, 4.0, 9.0, 11.0, 100.0):
            update(common_pb2.Progress(stage="upload", percent=percent))
        update(common_pb2.Progress(stage="download", num_done=2_500_000))
    with shown(given_training(True)) as train:
        assert train is not None
        train(training_pb2.TrainingProgress(stage="train", percent=50, epoch=2, num_epochs=4))
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        *("upload 0%", "upload 11%", "upload 100%"),
        *("download, 2.5 MB 0%", "train, epoch 2/4 50%"),
    ]
    assert out == ""


def test_terminal_has_a_bar_and_stages_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with shown(given(True)) as update:
        assert update is not None
        update(common_pb2.Progress(stage="[red]odd[/red]", percent=40.0))
    assert "[red]odd[/red]" in terminal.getvalue() and "40%" in terminal.getvalue()
