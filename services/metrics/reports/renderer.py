"""Has files made by a child process; the service's event loop only waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import IO

from detflow import telemetry
from detflow.errors import ResourceExhausted
from services.metrics.reports.jobs import Job

log = telemetry.get_logger(__name__)

_MAX_AT_ONCE = 2
_MAX_WAITING = 16
_DEADLINE_SECONDS = 120.0


class Renderer:
    """Makes files, two at a time; 16 more may wait.

    Args:
        data_dir: Scratch space. Files in it have no name, so nothing of them outlives the process.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._slots = asyncio.Semaphore(_MAX_AT_ONCE)
        self._num_waiting = 0

    async def render(self, job: Job) -> IO[bytes]:
        """Makes a file; the caller closes it.

        Raises:
            ResourceExhausted: BUSY: too many wait; REPORT_FAILED: it takes too long, or the process
                was killed, most likely for want of memory.
        """
        if self._num_waiting >= _MAX_WAITING:
            raise ResourceExhausted(
                f"{_MAX_WAITING} reports and charts wait to be made; ask again in a few seconds",
                reason="BUSY",
                retry_seconds=5,
            )
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        try:
            return await self._render(job)
        finally:
            self._slots.release()

    async def _render(self, job: Job) -> IO[bytes]:
        data = await asyncio.to_thread(pickle.dumps, job)
        file: IO[bytes] = tempfile.TemporaryFile(dir=self._data_dir)
        try:
            async with asyncio.timeout(_DEADLINE_SECONDS):
                code = await self._run(data, file)
        except TimeoutError as error:
            file.close()
            raise _failed(f"it takes longer than {_DEADLINE_SECONDS:.0f} s") from error
        except BaseException:
            file.close()
            raise
        if code != 0:
            file.close()
            log.error("the process that draws failed", returncode=code)
            raise _failed(f"the process that draws it ended with {code}")
        file.seek(0)
        return file

    async def _run(self, data: bytes, file: IO[bytes]) -> int:
        # matplotlib lists the fonts of the machine once, which takes seconds, and keeps the list.
        environ = {"MPLCONFIGDIR": str(self._data_dir / "matplotlib"), **os.environ}
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.metrics.reports"),
            stdin=PIPE,
            stdout=file,
            env=environ,
        )
        assert child.stdin is not None
        try:
            child.stdin.write(len(data).to_bytes(8, "big") + data)
            with contextlib.suppress(ConnectionError):  # it is gone: its return code tells
                await child.stdin.drain()
            return await child.wait()
        finally:
            await _end(child)


async def _end(child: Process) -> None:
    """Leaves no process behind, whatever happened."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    await child.wait()
    if child.stdin is not None:
        child.stdin.close()


def _failed(why: str) -> ResourceExhausted:
    return ResourceExhausted(
        f"the file could not be made: {why}; ask again when less is going on, or give the metrics"
        " service more memory",
        reason="REPORT_FAILED",
    )
