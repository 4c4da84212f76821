"""A worker killed while it saves: what was recorded is whole, and one at most is lost."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.chaos.test_every_place import IN_THE_REAL_WORKER

ROOT = Path(__file__).parent.parent.parent
# How many of the first checkpoints are recorded by the time of the kill, at the third.
RECORDED = {
    "checkpoint.before_store": 2,
    "store.before_put": 2,
    "store.half_put": 2,
    "store.after_put": 2,
    "checkpoint.after_store": 2,
    "checkpoint.after_record": 3,
}


def test_every_recorded_checkpoint_can_be_loaded_wherever_the_worker_is_killed(
    tmp_path: Path,
) -> None:
    assert set(RECORDED) >= IN_THE_REAL_WORKER
    command = [sys.executable, "-m", "tests.chaos.checkpoint_player", str(tmp_path), *RECORDED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for place, found in json.loads(done.stdout).items():
        epochs = list(range(1, RECORDED[place] + 1))
        assert found == {"code": -signal.SIGKILL, "recorded": epochs, "loaded": epochs}, place
