"""The processes that predict, and the line of images in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass, field
from pathlib import Path

from google.rpc import status_pb2

from detflow import errors, telemetry
from detflow.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from detflow.processes import dying_with_parent
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.tasks import cancel_all
from detflow.uploads import full_disk_refused
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.prediction_pb2 import Prediction
from services.metrics.prediction import task as protocol
from services.metrics.prediction.task import Task

log = telemetry.get_logger(__name__)

DEADLINE_SECONDS = 300.0
"""How long one image may take, the reading of the model included."""

COMMAND = (sys.executable, "-m", "services.metrics.prediction")
"""What a process runs; how much memory for models and how many threads follow."""

_MAX_ANSWER_BYTES = 64 << 20
_TRIES = 2  # a process may have died of something else than this image
_SECRET_PREFIXES = ("AWS_", "AZURE_", "DETFLOW_", "GOOGLE_")


@dataclass(frozen=True, slots=True)
class _Job:
    """An image in the line."""

    task: Task
    model: StoredObject
    data: bytes | bytearray
    result: asyncio.Future[Prediction] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class _Died(Exception):
    """The process ended without an answer.

    Attributes:
        code: Its exit code; the negative number of the signal that killed it.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"ended with {code}")
        self.code = code


class Predictors:
    """Has images predicted, one at a time by each process, in the order they come.

    A process is started when there is something to do for it and takes the models it is asked for
    into its memory; it is replaced when it dies.

    Args:
        objects: Where the models are.
        settings: How many processes, with how many threads and how much memory for models.
        scratch: Folder of this process, for models on their way into memory.
    """

    def __init__(self, objects: ObjectStore, settings: Settings, scratch: Path) -> None:
        self._objects = objects
        self._num_processes = max(1, settings.predict_processes)
        threads = settings.predict_threads or (os.cpu_count() or 1) // self._num_processes
        self._arguments = (
            str(settings.predict_memory_bytes // self._num_processes),
            str(max(1, threads)),
        )
        self._scratch = scratch
        self._line: asyncio.Queue[_Job] = asyncio.Queue()

    async def run(self) -> None:
        """Works forever."""
        workers = [asyncio.create_task(self._work(number)) for number in range(self._num_processes)]
        try:
            await asyncio.gather(*workers)
        finally:
            await cancel_all(workers)

    async def predict(self, task: Task, model: StoredObject, data: bytes | bytearray) -> Prediction:
        """Waits for a turn and predicts an image; who is cancelled while waiting costs nothing.

        Args:
            task: What to do.
            model: The model's file.
            data: The whole image file.

        Raises:
            InvalidArgument: CORRUPT_IMAGE or UNSUPPORTED_IMAGE.
            ResourceExhausted: IMAGE_TOO_LARGE.
            DataLoss: The model's file is gone or damaged.
            DeadlineExceeded: PREDICTION_TIMEOUT.
        """
        job = _Job(task, model, data)
        self._line.put_nowait(job)
        return await job.result

    async def _work(self, number: int) -> None:
        child: Process | None = None
        try:
            while True:
                job = await self._line.get()
                for left in reversed(range(_TRIES)):
                    if job.result.done():  # nobody waits for it any more
                        break
                    if child is None or child.returncode is not None:
                        child = await self._start()
                    try:
                        await self._do(child, job, number)
                    except (_Died, TimeoutError) as error:
                        log.warning("predicting process ended", error=repr(error), tries_left=left)
                        await _end(child)
                        if left == 0 or isinstance(error, TimeoutError):
                            _fail(job, _blame(error))
        finally:
            if child is not None:
                await _end(child)

    async def _start(self) -> Process:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_SECRET_PREFIXES)
        }
        return await asyncio.create_subprocess_exec(
            *dying_with_parent([*COMMAND, *self._arguments]),
            stdin=PIPE,
            stdout=PIPE,
            env=kept,
            start_new_session=True,
        )

    async def _do(self, child: Process, job: _Job, number: int) -> None:
        """Has a job done, and settles it unless the process dies of it.

        Raises:
            _Died: It died.
            TimeoutError: It takes too long.
        """
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                answer = await _ask(child, job.task, job.data)
                if answer == protocol.MODEL_WANTED:
                    path = self._scratch / f"model-{number}.onnx"
                    try:
                        with full_disk_refused():
                            await asyncio.to_thread(self._objects.download, job.model, path)
                        task = dataclasses.replace(job.task, model_path=str(path))
                        answer = await _ask(child, task, job.data)
                    finally:
                        path.unlink(missing_ok=True)  # the model is in memory
        except (_Died, TimeoutError):
            raise
        except Exception as error:  # whatever it is, it concerns this image and not the next
            _fail(job, error)
            return
        kind, content = answer[:1], answer[1:]
        if kind == protocol.FAILED:
            _fail(job, errors.from_status(status_pb2.Status.FromString(content)))
        elif not job.result.done():
            job.result.set_result(Prediction.FromString(content))


async def _ask(child: Process, task: Task, data: bytes | bytearray) -> bytes:
    assert child.stdin is not None and child.stdout is not None
    try:
        asked = task.to_bytes()
        child.stdin.write(protocol.frame(asked) + asked + protocol.frame(data))
        child.stdin.write(data)
        await child.stdin.drain()
        length = protocol.frame_length(await child.stdout.readexactly(protocol.FRAME_BYTES))
        if length > _MAX_ANSWER_BYTES:  # a decoder has been made to say so
            child.kill()
        return await child.stdout.readexactly(length)
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise _Died(await child.wait()) from error


def _fail(job: _Job, error: Exception) -> None:
    if not job.result.done():
        job.result.set_exception(error)


def _blame(error: _Died | TimeoutError) -> Exception:
    """Says what is wrong with an image that two processes have ended at."""
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(
            f"the prediction takes longer than {DEADLINE_SECONDS:.0f} s; send a smaller image",
            reason="PREDICTION_TIMEOUT",
        )
    if error.code == -signal.SIGKILL:
        return ResourceExhausted(
            "there is not enough memory for this image; make it smaller, or give the metrics"
            " service more",
            reason="IMAGE_TOO_LARGE",
        )
    if error.code < 0:
        return InvalidArgument(
            f"the decoder crashes at it ({signal.Signals(-error.code).name}); export it again",
            reason="CORRUPT_IMAGE",
        )
    return RuntimeError(f"a process that predicts {error}; its log says why")


async def _end(child: Process) -> None:
    """Leaves no process behind."""
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    await child.wait()
    if child.stdin is not None:
        child.stdin.close()
