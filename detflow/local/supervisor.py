"""Keeps child processes running: readiness, logs, restart with back-off, stop in reverse order.

A child leads a process group of its own, so that Ctrl-C in a terminal reaches the supervisor alone,
and is told by the kernel when the supervisor dies, so that even kill -9 leaves nothing behind.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detflow.local.logs import Log
from detflow.local.running import StackError
from detflow.processes import dying_with_parent
from detflow.tasks import wait

_FIRST_BACKOFF_SECONDS = 0.2
_MAX_BACKOFF_SECONDS = 10.0
_STABLE_SECONDS = 30.0
_MAX_EARLY_EXITS = 3


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process of the stack.

    Attributes:
        name: Name in logs and messages.
        command: Program and arguments.
        is_ready: Asked until it says yes.
        environment: Its whole environment; None inherits.
        before_start: Called before every start, to clear what a crash has left.
        stop_signal: Asks it to end.
        death_signal: Sent by the kernel when the supervisor dies.
        stop_seconds: Time it has to end before it is killed.
    """

    name: str
    command: Sequence[str]
    is_ready: Callable[[], Awaitable[bool]]
    environment: Mapping[str, str] | None = None
    before_start: Callable[[], None] | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    stop_seconds: float = 20.0


class Supervisor:
    """Runs programs until it is stopped.

    Args:
        logs: Folder of the log files, one per program.
        directory: Working directory of the programs.
        on_line: Called with (program name, line) for everything they print.
        on_event: Called with a sentence when a program crashes.
    """

    def __init__(
        self,
        *,
        logs: Path,
        directory: Path,
        on_line: Callable[[str, str], None] | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self._logs = logs
        self._directory = directory
        self._on_line = on_line
        self._on_event = on_event or (lambda text: None)
        self._groups: list[list[_Kept]] = []

    async def start(self, programs: Sequence[Program], *, timeout_seconds: float = 60.0) -> None:
        """Starts programs at once and waits until all are ready; they will be stopped together.

        Raises:
            StackError: One ended three times before it was ready, or is not ready in time.
        """
        group = [self._keep(program) for program in programs]
        self._groups.append(group)
        waits = [asyncio.create_task(kept.wait_until_ready()) for kept in group]
        try:
            done, late = await asyncio.wait(
                waits, timeout=timeout_seconds, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
        finally:
            for task in waits:
                task.cancel()
        if late:
            slow = next(kept for kept in group if not kept.ready)
            raise StackError(
                f"{slow.program.name} is not ready after {timeout_seconds:.0f} s, see"
                f" {slow.log.path}"
            )

    async def stop(self) -> None:
        """Stops everything, the group started last first."""
        while self._groups:
            await asyncio.gather(*(kept.stop() for kept in self._groups[-1]))
            self._groups.pop()

    def kill(self) -> None:
        """Cuts the wait of `stop` short: whatever still runs is killed."""
        for group in self._groups:
            for kept in group:
                kept.signal(signal.SIGKILL)

    def pids(self) -> dict[str, int]:
        """Returns the process id of every program that runs."""
        return {
            kept.program.name: kept.process.pid
            for group in self._groups
            for kept in group
            if kept.process is not None and kept.process.returncode is None
        }

    def _keep(self, program: Program) -> "_Kept":
        on_line = self._on_line
        log = Log(
            self._logs / f"{program.name}.log",
            None if on_line is None else lambda line: on_line(program.name, line),
        )
        return _Kept(program, log, self._directory, self._on_event)


class _Kept:
    """One program, started again whenever it ends, until it is stopped."""

    def __init__(
        self, program: Program, log: Log, directory: Path, on_event: Callable[[str], None]
    ) -> None:
        self.program = program
        self.log = log
        self.process: asyncio.subprocess.Process | None = None
        self.ready = False
        self._directory = directory
        self._on_event = on_event
        self._early_exits = 0
        self._stopping = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"keep {program.name}")

    async def wait_until_ready(self) -> None:
        while True:
            if self._task.done():
                await self._task
            if self._early_exits >= _MAX_EARLY_EXITS:
                raise StackError(
                    f"{self.program.name} does not start, see {self.log.path}: "
                    + self.log.tail(1).strip()
                )
            running = self.process is not None and self.process.returncode is None
            if running and await self.program.is_ready():
                self.ready = True
                return
            await asyncio.sleep(0.03)

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    async def stop(self) -> None:
        self._stopping.set()
        self.signal(self.program.stop_signal)
        done, _ = await asyncio.wait([self._task], timeout=self.program.stop_seconds)
        if not done:
            self._on_event(f"{self.program.name} did not stop in time: killed")
            self.signal(signal.SIGKILL)
        await self._task

    async def _run(self) -> None:
        backoff_seconds = _FIRST_BACKOFF_SECONDS
        try:
            while not self._stopping.is_set():
                begin = time.monotonic()
                code = await self._run_once()
                if self._stopping.is_set():
                    return
                if not self.ready:
                    self._early_exits += 1
                if time.monotonic() - begin > _STABLE_SECONDS:
                    backoff_seconds = _FIRST_BACKOFF_SECONDS
                self._on_event(
                    f"{self.program.name} ended ({_describe(code)}), starting it again in"
                    f" {backoff_seconds:.1f} s; see {self.log.path}"
                )
                await wait(self._stopping, backoff_seconds)
                backoff_seconds = min(backoff_seconds * 2, _MAX_BACKOFF_SECONDS)
        finally:
            self.log.close()

    async def _run_once(self) -> int:
        if self.program.before_start is not None:
            await asyncio.to_thread(self.program.before_start)
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent(self.program.command, self.program.death_signal),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self.program.environment,
            cwd=self._directory,
            start_new_session=True,
        )
        self.process = process
        if self._stopping.is_set():
            self.signal(self.program.stop_signal)
        assert process.stdout is not None
        pump = asyncio.create_task(self._pump(process.stdout))
        try:
            code = await process.wait()
            # What it had started in its group goes with it; its last words are still in the pipe.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.wait([pump], timeout=1.0)
            return code
        finally:
            pump.cancel()

    async def _pump(self, stdout: asyncio.StreamReader) -> None:
        while data := await stdout.read(65536):
            self.log.write(data)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}"
