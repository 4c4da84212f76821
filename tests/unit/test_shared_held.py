"""The lock that says whether all who work in a folder are gone."""

import subprocess
import sys
from pathlib import Path

from detflow.held import hold, is_abandoned

_CHILD = "import sys; print(flush=True); sys.stdin.read()"


def test_folder_is_abandoned_once_its_holder_has_let_go(tmp_path: Path) -> None:
    held = hold(tmp_path)
    assert not is_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".held"]
    held.close()
    assert is_abandoned(tmp_path)
    assert is_abandoned(tmp_path)  # to look is not to hold


def test_folder_that_nobody_held_or_that_is_gone_is_not_abandoned(tmp_path: Path) -> None:
    assert not is_abandoned(tmp_path)
    (tmp_path / ".held.new").touch()  # about to be held
    assert not is_abandoned(tmp_path)
    assert not is_abandoned(tmp_path / "gone")


def test_child_that_outlives_its_parent_holds_on(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(held.fileno(),),
        )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        assert not is_abandoned(tmp_path)
        child.kill()
        child.wait()
    assert is_abandoned(tmp_path)
