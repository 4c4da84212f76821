"""Faults on purpose happen where, how and as often as they were planned, and never by accident."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detflow import faults
from detflow.errors import InvalidArgument, Unavailable
from detflow.settings import Settings

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def disarmed(tmp_path: Path) -> Iterator[None]:
    yield
    faults.arm(Settings(data_dir=tmp_path))


def settings(folder: Path, planned: str, access: str = "open") -> Settings:
    return Settings(data_dir=folder, faults=planned, access=access)


def test_every_place_is_in_the_code_once_and_has_a_description() -> None:
    found = [
        name
        for package in ("detflow", "services", "gateway")
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r'faults\.point\("([a-z_.]+)"\)', path.read_text())
    ]
    assert set(found) == set(faults.POINTS)
    assert len(found) - found.count("store.after_put") == len(faults.POINTS) - 1


def test_nothing_is_armed_without_a_plan(tmp_path: Path) -> None:
    faults.arm(Settings(data_dir=tmp_path))
    for name in faults.POINTS:
        faults.point(name)
    assert not list(tmp_path.iterdir())


def test_faults_are_refused_where_access_is_required(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="DETFLOW_ACCESS=open"):
        faults.arm(settings(tmp_path, "store.before_put:kill", access="required"))
    faults.point("store.before_put")


@pytest.mark.parametrize(
    "planned", ["nowhere:kill", "store.before_put", "store.before_put:explode", "store.put:kill:x"]
)
def test_plan_that_cannot_be_read_says_what_can(tmp_path: Path, planned: str) -> None:
    with pytest.raises(InvalidArgument, match="outbox"):
        faults.arm(settings(tmp_path, planned))


def test_fault_happens_once_at_the_nth_time_and_not_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = settings(tmp_path, "store.before_put:enospc:3, outbox.before_publish:error")
    warned: list[str] = []
    monkeypatch.setattr(faults.log, "warning", lambda text, *what: warned.append(text % what))
    faults.arm(planned)
    assert "this process will fail on purpose: store.before_put:enospc:3" in warned
    for _ in range(2):
        faults.point("store.before_put")
    with pytest.raises(OSError, match="No space left"):
        faults.point("store.before_put")
    faults.point("store.before_put")
    assert (tmp_path / faults.JOURNAL).read_text() == "store.before_put:enospc:3\n"
    faults.arm(planned)  # as a process that is started again
    assert not faults.is_armed("store.before_put")
    with pytest.raises(Unavailable, match=r"outbox\.before_publish"):
        faults.point("outbox.before_publish")


def test_kill_is_noted_before_it_ends_the_process(tmp_path: Path) -> None:
    program = (
        "from detflow import faults; from detflow.settings import Settings\n"
        "faults.arm(Settings.load()); faults.point('store.after_put'); print('alive')"
    )
    told = {"DETFLOW_FAULTS": "store.after_put:kill", "DETFLOW_ACCESS": "open"}
    command = [sys.executable, "-c", program]
    environment = {**os.environ, **told, "DETFLOW_DATA_DIR": str(tmp_path)}
    first = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    assert (first.returncode, first.stdout) == (-signal.SIGKILL, b"")
    again = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    assert (again.returncode, again.stdout) == (0, b"alive\n")
