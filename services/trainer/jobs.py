"""Children of the trainer that are no trainings: exports, looks into uploaded weights, preflights.

A job is one process in a folder, process group and session of its own; it dies with the trainer. It
says what it has to say in lines of JSON on its standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from detflow import errors, telemetry
from detflow.errors import Aborted
from detflow.held import hold, remove_abandoned
from detflow.names import new_id
from detflow.processes import dying_with_parent
from detflow.settings import Settings
from detflow.v1.common_pb2 import Progress
from detflow.v1.worker_pb2 import JobMessage, JobSpec
from services.trainer.executors import Exit
from services.trainer.executors.local import LocalWorker, environment, read_lines

log = telemetry.get_logger(__name__)

JOB_COMMAND = (sys.executable, "-m", "services.trainer.worker.jobs")
SANDBOX_OPTION = "--sandbox"

_MAX_MESSAGE_CHARACTERS = 1 << 24
_GRACE_SECONDS = 5.0
_END_SECONDS = 1.0
_NUM_SHOWN_LINES = 5
_LOWEST_PRIORITY = 19
_ENDED_FIRST = 1000
_SECRET_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "DETFLOW_NATS_URL", "DETFLOW_STORE_URL")
_SANDBOX_LINE = "sandbox: "


def _ignore(progress: Progress) -> None:
    """Takes progress that nobody asked for."""


async def run_job(
    spec: JobSpec,
    *,
    settings: Settings,
    on_progress: Callable[[Progress], None] = _ignore,
    sandbox: bool = False,
    background: bool = False,
    command: Sequence[str] = JOB_COMMAND,
) -> JobMessage:
    """Runs a job to its end; if this is cancelled, so is the job.

    Args:
        spec: What to do.
        settings: Addresses and the scratch folder.
        on_progress: Told how far the job is.
        sandbox: Run it without network, children and credentials, and with limits on memory,
            processor time and files.
        background: Run it behind everything else: at the lowest priority, without GPUs, and as the
            first that the system ends when memory runs out.
        command: Program to run; the path of the spec is added.

    Returns:
        The last message: the job's result.

    Raises:
        DetflowError: What the job failed with.
        Aborted: JOB_DIED: it ended without a result.
        OSError: It could not be started.
    """
    folder = settings.data_dir / "jobs" / new_id()
    variables = environment(settings)
    if sandbox:
        variables = {
            name: value
            for name, value in variables.items()
            if not name.startswith(_SECRET_PREFIXES)
        }
    if background:
        variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [*command, str(folder / "spec.json"), *([SANDBOX_OPTION] if sandbox else [])]
    await asyncio.to_thread(_write_spec, folder, spec)
    with hold(folder):
        try:
            # By the event loop's thread, with which the job dies.
            process = subprocess.Popen(  # noqa: ASYNC220 - returns after exec, in milliseconds
                dying_with_parent(arguments),
                cwd=folder,
                env={**variables, "TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        if background:
            _step_back(process.pid)
        worker = LocalWorker(process, folder, process.stderr)
        log.info("job started", job=spec.WhichOneof("job"), pid=process.pid)
        said = _Said(on_progress)
        messages = asyncio.create_task(
            read_lines(process.stdout, said.hear, _MAX_MESSAGE_CHARACTERS)
        )
        try:
            ended = await worker.wait()
            # A grandchild may hold the pipe open; what the job itself wrote is there by then.
            await asyncio.wait([messages], timeout=_END_SECONDS)
        except asyncio.CancelledError:
            await _carry_through(worker.terminate(_GRACE_SECONDS))
            raise
        finally:
            await _carry_through(_close(worker, messages))
    _log_end(spec, ended)
    return _result(spec, said, ended)


def _step_back(pid: int) -> None:
    """Puts a process group, and what it will start, behind all others."""
    with contextlib.suppress(OSError):  # it has ended, or the system has no such thing
        os.setpriority(os.PRIO_PGRP, pid, _LOWEST_PRIORITY)
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(_ENDED_FIRST))


class _Said:
    """What a job has said so far."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self._on_progress = on_progress
        self.last: JobMessage | None = None

    def hear(self, lines: Sequence[str]) -> None:
        """Takes lines; one that a dying job has torn is left out."""
        for line in lines:
            message = JobMessage()
            try:
                json_format.Parse(line, message)
            except json_format.ParseError:
                continue
            if message.HasField("progress"):
                self._on_progress(message.progress)
            elif message.WhichOneof("what"):
                self.last = message


def _result(spec: JobSpec, said: _Said, ended: Exit) -> JobMessage:
    if said.last is not None and said.last.HasField("failure"):
        raise errors.from_status(said.last.failure.status)
    if said.last is not None and ended.code == 0:
        return said.last
    lines = "; ".join(_ours(ended)[-_NUM_SHOWN_LINES:]) or "it wrote nothing"
    raise Aborted(
        f"the {spec.WhichOneof('job')} job {ended.describe()} without a result; its last lines: "
        f"{lines}; try again",
        reason="JOB_DIED",
    )


def _log_end(spec: JobSpec, ended: Exit) -> None:
    sandbox = [
        line.removeprefix(_SANDBOX_LINE)
        for line in ended.last_lines
        if line.startswith(_SANDBOX_LINE)
    ]
    log.info(
        "job ended",
        job=spec.WhichOneof("job"),
        exit_code=ended.code,
        **({"sandbox": sandbox[0]} if sandbox else {}),
    )


def _ours(ended: Exit) -> list[str]:
    return [line for line in ended.last_lines if not line.startswith(_SANDBOX_LINE)]


async def _close(worker: LocalWorker, messages: asyncio.Task[None]) -> None:
    await worker.close()
    messages.cancel()
    await asyncio.wait([messages])


async def _carry_through(work: Coroutine[Any, Any, None]) -> None:
    """Does something to its end, however often this is cancelled meanwhile."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


def remove_leftovers(settings: Settings) -> None:
    """Removes the folders of jobs whose trainer has died; those of living ones are held."""
    remove_abandoned((settings.data_dir / "jobs").glob("*"))


def _write_spec(folder: Path, spec: JobSpec) -> None:
    while not folder.exists():
        # The end of another job takes the folder of all jobs away while it is empty.
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json_format.MessageToJson(spec))
