"""What the shell completes on Tab."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("line", "completed"),
    [("detflow metr", ["metrics"]), ("detflow trainings st", ["stop"])],
)
def test_commands_are_completed(line: str, completed: list[str]) -> None:
    environ = {
        **os.environ,
        "_DETFLOW_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": f"{len(line.split()) - 1}",
    }
    code = "import sys; sys.argv = ['detflow']; from detflow.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.stdout.split(), done.stderr) == (completed, "")
