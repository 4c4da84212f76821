"""Workers as child processes of the trainer, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from google.protobuf import json_format

from detflow import telemetry
from detflow.held import hold, is_abandoned
from detflow.names import last_segment
from detflow.processes import dying_with_parent
from detflow.settings import Settings
from detflow.tasks import wait
from detflow.v1.worker_pb2 import WorkerSpec
from services.trainer.executors import Device, Devices, Exit, Slots
from services.trainer.executors.gpus import list_gpus
from services.trainer.executors.starvation import MemoryWatch

WORKER_COMMAND = (sys.executable, "-m", "services.trainer.worker")

_LAST_LINES = 50
_MAX_LINE_CHARACTERS = 2000
_CHUNK_BYTES = 1 << 16
_LOOK_SECONDS = 1.0
# What a worker gets of our environment: the object store's credentials, not the database's.
_PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "DETFLOW_ACCESS",
    "DETFLOW_FAULTS",
)
_PASSED_ON_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "CUDA_", "NVIDIA_", "SSL_")


def _nothing() -> None:
    """Is done where nobody waits for the end."""


class LocalExecutor:
    """Starts workers in process groups of their own; they die with the trainer.

    Args:
        settings: Slots, addresses and the scratch folder.
        command: Program to run; the path of the spec is added.
        environ: Environment to pass the needed part of on.
        root: Root of the file system that tells of memory; another in tests.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        environ: Mapping[str, str] = os.environ,
        root: Path = Path("/"),
    ) -> None:
        self._root = root
        self._folder = settings.data_dir / "trainings"
        self._num_cpu_slots = settings.num_cpu_slots
        self._free_gpus = _usable_gpus(settings, environ)
        self._num_gpu_slots = len(self._free_gpus)
        self._command = tuple(command)
        self._environ = environment(settings, environ)

    @property
    def slots(self) -> Slots:
        """What this machine has."""
        return Slots(num_cpu=self._num_cpu_slots, num_gpu=self._num_gpu_slots)

    async def start(self, spec: WorkerSpec, devices: Devices) -> LocalWorker:
        """Starts a worker in a fresh folder.

        Raises:
            OSError: The folder could not be made or the program not be started.
        """
        num_gpus = devices.num_per_node if devices.device is Device.CUDA else 0
        gpus, self._free_gpus = self._free_gpus[:num_gpus], self._free_gpus[num_gpus:]
        try:
            return await self._start(spec, gpus)
        except OSError:
            self._free_gpus += gpus
            raise

    async def _start(self, spec: WorkerSpec, gpus: list[str]) -> LocalWorker:
        folder = self._folder / last_segment(spec.training) / str(spec.attempt)
        await asyncio.to_thread(_write_spec, folder, spec)
        held = hold(folder)
        try:
            # By the event loop's thread, with which the worker dies.
            process = subprocess.Popen(  # noqa: ASYNC220 - returns after exec, in milliseconds
                dying_with_parent([*self._command, str(folder / "spec.json")]),
                cwd=folder,
                env={
                    **self._environ,
                    **telemetry.to_environment(),
                    "CUDA_VISIBLE_DEVICES": ",".join(gpus),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(held.fileno(),),
            )
        except OSError:
            held.close()
            await asyncio.to_thread(_remove, folder)
            raise
        return LocalWorker(
            process,
            folder,
            held=held,
            on_close=lambda: self._free_gpus.extend(gpus),
            memory=MemoryWatch(self._root),
        )

    async def discard(self, training_id: str, attempt: int) -> None:
        """Removes the folder of an attempt that an earlier process left behind, if it is here."""
        await asyncio.to_thread(_remove, self._folder / training_id / str(attempt))

    async def is_abandoned(self, training_id: str, attempt: int) -> bool:
        """Says whether neither the trainer nor the worker of an attempt lives any more."""
        folder = self._folder / training_id / str(attempt)
        return await asyncio.to_thread(is_abandoned, folder)

    async def list_leftovers(self) -> list[tuple[str, int]]:
        """Returns training id and attempt of every folder there is."""
        folders = await asyncio.to_thread(lambda: sorted(self._folder.glob("*/*")))
        return [(path.parent.name, int(path.name)) for path in folders if path.name.isdecimal()]


class LocalWorker:
    """A worker process.

    Args:
        process: Started in a session of its own.
        folder: Removed when it is closed.
        output: What its last lines are read from; its stdout by default.
        held: Holds the folder; closed when the folder is gone.
        on_close: Called when nothing of it is left.
        memory: Tells whether the system killed it for memory; None if nobody wants to know.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        folder: Path,
        output: IO[bytes] | None = None,
        *,
        held: IO[bytes] | None = None,
        on_close: Callable[[], None] = _nothing,
        memory: MemoryWatch | None = None,
    ) -> None:
        self.pid = process.pid  # also the id of its process group
        self._process = process
        self._folder = folder
        self._held = held
        self._on_close = on_close
        self._memory = memory
        self._killed_by_us = False
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._ended = asyncio.Event()
        self._starved = asyncio.create_task(self._watch_memory())
        self._output = asyncio.create_task(
            read_lines(output or process.stdout, self._keep, _MAX_LINE_CHARACTERS)
        )
        threading.Thread(
            target=self._reap,
            args=(asyncio.get_running_loop(),),
            name=f"worker {process.pid}",
            daemon=True,
        ).start()

    async def wait(self) -> Exit:
        """Waits until it has ended."""
        await self._ended.wait()
        # A grandchild may hold the pipe open; what the worker itself wrote is there by then.
        await asyncio.wait([self._output], timeout=1.0)
        return Exit(self._process.returncode, tuple(self._lines), await self._starved)

    async def terminate(self, grace_seconds: float) -> None:
        """Ends its process group: SIGTERM, then SIGKILL after the grace period."""
        self._signal(signal.SIGTERM)
        await wait(self._ended, grace_seconds)
        self._signal(signal.SIGKILL)  # the group too, should the worker have left children
        await self._ended.wait()

    async def close(self) -> None:
        """Removes its folder and what is left of its process group."""
        self._signal(signal.SIGKILL)
        await self._ended.wait()
        self._output.cancel()
        await asyncio.wait([self._output, self._starved])
        await asyncio.to_thread(_remove, self._folder)
        if self._held is not None:
            self._held.close()
        self._on_close()

    async def _watch_memory(self) -> bool:
        """Waits for its end; says whether the system killed it for memory."""
        if self._memory is None:
            return False
        while not await wait(self._ended, _LOOK_SECONDS):
            self._memory.look()
        is_killed = self._process.returncode == -signal.SIGKILL and not self._killed_by_us
        return is_killed and self._memory.ran_out()

    def _signal(self, number: signal.Signals) -> None:
        self._killed_by_us |= number == signal.SIGKILL and not self._ended.is_set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._ended.set)

    def _keep(self, lines: Sequence[str]) -> None:
        self._lines.extend(line[:_MAX_LINE_CHARACTERS] for line in lines)


async def read_lines(
    pipe: IO[bytes] | None, keep: Callable[[Sequence[str]], None], max_characters: int
) -> None:
    """Reads a child's output to its end, however much it is and however long its lines are.

    Args:
        pipe: What the child writes to.
        keep: Takes lines, without the empty ones. A line may be longer than `max_characters`; of
            one that came in pieces only the end is left then.
        max_characters: How much of an unfinished line is held.
    """
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    rest = ""
    try:
        while chunk := await reader.read(_CHUNK_BYTES):
            lines = (rest + chunk.decode(errors="replace")).splitlines(keepends=True)
            rest = "" if lines[-1].endswith(("\n", "\r")) else lines.pop()
            keep([line.rstrip() for line in lines if line.strip()])
            rest = rest[-max_characters:]
    finally:
        keep([rest.rstrip()] if rest.strip() else [])
        transport.close()


def environment(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns what a child of the trainer gets of its environment, and the settings it needs."""
    # One core per slot is left to the process that decodes images.
    num_threads = (os.cpu_count() or 1) // settings.num_cpu_slots - 1
    passed_on = {
        name: value
        for name, value in environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    return {
        "OMP_NUM_THREADS": str(max(num_threads, 1)),
        **passed_on,
        "PYTHONUNBUFFERED": "1",
        "DETFLOW_NATS_URL": settings.nats_url,
        "DETFLOW_STORE_URL": settings.store_url,
        "DETFLOW_DATA_DIR": str(settings.data_dir),
        "DETFLOW_WORKER_MEMORY_BYTES": str(settings.worker_memory_bytes),
        "DETFLOW_PRETRAINED_DIR": settings.pretrained_dir,
        "DETFLOW_LOG_FORMAT": settings.log_format,
        "DETFLOW_LOG_LEVEL": settings.log_level,
        "DETFLOW_OTLP_ENDPOINT": settings.otlp_endpoint,
    }


def _usable_gpus(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Returns the GPUs that trainings may use: so many as are set, else those that are found."""
    found = list_gpus(environ) if settings.num_gpu_slots else ()
    if settings.num_gpu_slots < 0:
        return list(found)
    if len(found) < settings.num_gpu_slots:  # whoever set more than are found knows better
        return [str(number) for number in range(settings.num_gpu_slots)]
    return list(found[: settings.num_gpu_slots])


def _write_spec(folder: Path, spec: WorkerSpec) -> None:
    _remove(folder)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json_format.MessageToJson(spec))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # the training's folder, once its last attempt is gone
