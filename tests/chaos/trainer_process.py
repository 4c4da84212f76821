"""The trainer service with workers and jobs that learn nothing and do all else: `player.py`."""

import dataclasses
import functools
import os
import sys

from detflow import server
from detflow.settings import Settings
from services.trainer import __main__ as trainer
from services.trainer.attempt import Deadlines
from services.trainer.executors.local import LocalExecutor
from services.trainer.jobs import run_job

LEASE_SECONDS = "CHAOS_LEASE_SECONDS"
PLAYER = (sys.executable, "-m", "tests.chaos.player")


async def start() -> None:
    """Serves until the process is told to stop."""
    settings = Settings.load()
    job = functools.partial(run_job, command=PLAYER)
    trainer.add_exports = functools.partial(trainer.add_exports, run=job)
    await trainer.serve(
        server.Service("trainer", migrations=trainer.MIGRATIONS, settings=settings),
        LocalExecutor(settings, command=PLAYER),
        dataclasses.replace(Deadlines(), queued=0.0, lease=float(os.environ[LEASE_SECONDS])),
        run_job=job,
        run_queued=job,
    )


def main() -> None:
    """Runs the process."""
    server.run(start)


if __name__ == "__main__":
    main()
