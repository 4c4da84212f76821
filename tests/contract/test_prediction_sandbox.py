"""What the process that reads pictures of strangers can no longer do."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from detflow.events import Bus
from tests import prediction_rig
from tests.prediction_rig import Rig
from tests.preprocess_samples import encode


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    url = await make_database_url("trainer")
    async with prediction_rig.running(nats_url=nats_url, database_url=url, folder=tmp_path) as one:
        yield one


def statuses_of_threads(process: psutil.Process) -> list[str]:
    return [file.read_text() for file in Path(f"/proc/{process.pid}/task").glob("*/status")]


@pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only")
async def test_every_thread_that_predicts_is_behind_the_filter_and_its_memory_limited(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A thread that is there before the filter, whatever other tests have left in the environment.
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    name = await rig.ready()
    picture = encode(".png", np.full((64, 64, 3), 255, np.uint8))
    assert (await rig.predict(name, picture)).width_px == 64
    (child,) = [
        one
        for one in psutil.Process().children(recursive=True)
        if "services.metrics.prediction" in one.cmdline()
    ]
    statuses = statuses_of_threads(child)
    assert len(statuses) >= 2
    for status in statuses:
        assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status
    assert child.rlimit(psutil.RLIMIT_DATA)[0] < 16 << 30
    assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
