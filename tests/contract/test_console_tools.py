"""The console's bundles are those of their packages, and its types fit."""

import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools" / "console"


def npm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ("npm", *arguments)
    return subprocess.run(
        command, cwd=TOOLS, capture_output=True, text=True, timeout=120, check=False
    )


def test_bundles_are_those_of_their_packages_and_types_fit() -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    installed = npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")
    if installed.returncode != 0:
        pytest.skip(f"npm ci failed: {installed.stderr[-500:]}")
    done = npm("run", "check")
    assert done.returncode == 0, done.stdout + done.stderr
