"""The command line in this process, against the fakes of tests.surface_rig."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detflow.cli import main
from tests.stack_rig import Done
from tests.surface_rig import Surface, serving


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> Done:
    """Runs a command in this process, where it starts sooner."""
    monkeypatch.setattr(sys, "argv", ["detflow", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    printed = capsys.readouterr()
    assert isinstance(exited.value.code, int)
    return Done(exited.value.code, printed.out, printed.err)


class Rig:
    """Runs commands in this process against fakes."""

    def __init__(
        self,
        fakes: Surface,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.fakes = fakes
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, *arguments: str) -> Done:
        command = (*arguments, "--address", "127.0.0.1:1")
        return run_here(self._monkeypatch, self._capsys, *command)


@pytest.fixture
def rig(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Rig]:
    with serving() as fakes:
        for name, value in fakes.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield Rig(fakes, monkeypatch, capsys)
