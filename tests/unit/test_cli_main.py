import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str | bytes, stdout: int | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs the command as a shell would; nothing listens where it looks."""
    return subprocess.run(
        [sys.executable, "-m", "detflow.cli", *arguments],
        stdout=stdout if stdout is not None else subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )


def test_full_disk_under_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = run("--help", stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == b"detflow: No space left on device\n"


def test_argument_that_is_no_text_is_one_line() -> None:
    done = run("datasets", "list", "--address", "127.0.0.1:1", "--project", b"\xff")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(b"detflow: ") and b"UTF-8" in line


@pytest.mark.parametrize("name", ["한국어", "👩"])
def test_error_is_one_line_in_any_locale(name: str) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "detflow.cli", "datasets", "show", name, "--address", "x"],
        env={**os.environ, **plain},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert b"host:port" in done.stderr and b"Traceback" not in done.stderr
