"""The trainer service with a worker that does nothing: the benchmark plays the worker itself."""

import sys
from pathlib import Path

from detflow.server import Service, run
from detflow.settings import Settings
from services.trainer.__main__ import MIGRATIONS, serve
from services.trainer.executors.local import LocalExecutor


async def main() -> None:
    """Runs the service with the settings of the environment."""
    settings = Settings.load()
    executor = LocalExecutor(
        settings, command=(sys.executable, "-c", "import signal; signal.pause()")
    )
    await serve(Service("trainer", migrations=Path(MIGRATIONS), settings=settings), executor)


if __name__ == "__main__":
    run(main)
