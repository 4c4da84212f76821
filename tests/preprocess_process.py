"""The preprocess service as a process of its own, to be killed or measured."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from detflow.events import Bus
from detflow.postgres import Database
from tests.preprocess_rig import version_service

REPOSITORY = Path(__file__).parents[1]


class Process:
    """The service as a process of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process: asyncio.subprocess.Process | None = None
        self.address = ""

    async def start(self) -> None:
        """Starts it and waits until it serves."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.preprocess",
            cwd=REPOSITORY,
            env=os.environ | self.environment,
            stderr=asyncio.subprocess.PIPE,
        )
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            async for line in self.process.stderr:
                if found := re.search(rb'"address": "([^"]+)"', line):
                    self.address = found[1].decode()
                    break
        self._drain = asyncio.create_task(self.process.stderr.read())

    async def end(self, number: signal.Signals) -> None:
        """Sends a signal and waits for the end."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
            await asyncio.wait_for(self.process.wait(), 30)
            await self._drain


@pytest.fixture
async def process(
    make_database_url: Callable[[str], Awaitable[str]], nats_url: str, bus: Bus, tmp_path: Path
) -> AsyncIterator[tuple[Process, Database]]:
    """The service as a process, and its database."""
    url = await make_database_url("preprocess")
    database = await Database.connect(url, "preprocess")
    async with version_service() as version_address:
        process = Process(
            {
                "DETFLOW_VERSION_ADDRESS": version_address,
                "DETFLOW_DATABASE_URL": url,
                "DETFLOW_NATS_URL": nats_url,
                "DETFLOW_STORE_URL": f"file://{tmp_path}/store",
                "DETFLOW_DATA_DIR": str(tmp_path / "data"),
                "DETFLOW_LISTEN": "127.0.0.1:0",
                "DETFLOW_PREPROCESS_PROCESSES": "1",
                "DETFLOW_ACCESS": "open",
            }
        )
        await process.start()
        yield process, database
        await process.end(signal.SIGTERM)
    await database.close()
