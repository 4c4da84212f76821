"""Workers as jobs of a Ray cluster, submitted over HTTP to its Jobs API.

The trainer needs no Ray process of its own and shares no disk with the cluster: what a worker is
told travels in the job (`ray_job`). The id of a job names training and attempt, so that submitting
it twice starts it once. Ray tries nothing again for us: the next attempt is the trainer's, and a
worker that goes on after its machine was given up is fenced like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import json_format

from detflow import telemetry
from detflow.errors import FailedPrecondition
from detflow.names import last_segment
from detflow.settings import Settings
from detflow.tasks import wait
from detflow.v1.worker_pb2 import WorkerSpec
from services.trainer.executors import Device, Devices, Exit, Slots
from services.trainer.executors.local import environment
from services.trainer.executors.ray_job import ENTRYPOINT, NUM_CPUS, SPEC_VARIABLE

log = telemetry.get_logger(__name__)

_PASSED_ON_PREFIXES = ("DETFLOW_", "AWS_", "AZURE_", "GOOGLE_")
_LAST_LINES = 50
_POLL_SECONDS = 1.0
_REFRESH_SECONDS = 10.0
_END_SECONDS = 15.0
"""What Ray takes to end a job that it stops, or to find that a machine is gone."""
_SETTLE_SECONDS = 2.5
"""Ray looks at a job once a second until it sees its end; forgotten before, it is noted anew."""
_NUM_THREADS = 8
# Of its own, so that a dashboard that never answers holds up nothing else.
_threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ray")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Machine:
    """What a node of the cluster has: processes that may compute on CPUs, and GPUs."""

    num_cpu: int
    num_gpu: int

    def of(self, device: Device) -> int:
        return self.num_gpu if device is Device.CUDA else self.num_cpu


class RayExecutor:
    """Submits workers to a Ray cluster.

    Args:
        settings: Address of the Jobs API, and what workers are told.
        environ: Environment to pass credentials of the object store on from.

    Raises:
        FailedPrecondition: NO_RAY, the package is not installed.
        InvalidArgument: DETFLOW_RAY_ADDRESS is not set.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        settings.require("ray_address")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            from ray import job_submission
            from ray.util import state
        except ImportError as error:
            raise FailedPrecondition(
                "DETFLOW_EXECUTOR=ray needs Ray: pip install 'detflow[ray]'", reason="NO_RAY"
            ) from error
        self._connect = job_submission.JobSubmissionClient
        self._list_nodes = state.list_nodes
        self._address = settings.ray_address
        self._max_gpus = settings.num_gpu_slots
        self._client: Any = None
        self._machines: Sequence[_Machine] = ()
        self._refreshed = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._variables = {
            name: value
            for name, value in environment(settings, environ).items()
            if name.startswith(_PASSED_ON_PREFIXES)
        }
        # Other installations may use the same cluster, but not the same bucket.
        digest = hashlib.sha256(settings.store_url.encode()).hexdigest()
        self._prefix = f"detflow-{digest[:8]}"

    @property
    def slots(self) -> Slots:
        """What the cluster has, as it was seen a moment ago; looks again in the background."""
        if time.monotonic() - self._refreshed > _REFRESH_SECONDS and (
            self._refreshing is None or self._refreshing.done()
        ):
            self._refreshing = asyncio.create_task(self.refresh(), name="ray-nodes")
        num_gpu = sum(machine.num_gpu for machine in self._machines)
        return Slots(
            num_cpu=sum(machine.num_cpu for machine in self._machines),
            num_gpu=num_gpu if self._max_gpus < 0 else min(num_gpu, self._max_gpus),
            num_nodes=len(self._machines),
        )

    async def refresh(self) -> None:
        """Looks which machines there are; while the cluster does not answer, there are none."""
        self._refreshed = time.monotonic()
        machines: Sequence[_Machine] = ()
        try:
            machines = await _in_thread(self._look)
        except Exception as error:  # of several libraries; whatever it is, it may pass
            log.warning("Ray does not answer", address=self._address, error=str(error)[:300])
        if machines != self._machines:
            log.info("machines of the Ray cluster", number=len(machines))
        self._machines = machines

    async def start(self, spec: WorkerSpec, devices: Devices) -> RayWorker:
        """Submits a worker; one that was submitted before is taken as it is.

        Raises:
            OSError: The cluster does not take it.
        """
        number, kind = devices.num_per_node, devices.device
        if sum(machine.of(kind) >= number for machine in self._machines) < devices.num_nodes:
            raise OSError(
                f"the Ray cluster has no {devices.num_nodes} machines with {number} {kind} slots"
            )
        job_id = f"{self._prefix}-{last_segment(spec.training)}-{spec.attempt}"
        variables = {
            **self._variables,
            **telemetry.to_environment(),
            SPEC_VARIABLE: json_format.MessageToJson(spec, indent=None),
        }
        if kind is Device.CPU:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        # On several machines the job itself only places and watches.
        alone = devices.num_nodes == 1
        num_gpus = number if alone and kind is Device.CUDA else 0

        def submit() -> None:
            with contextlib.suppress(_Unknown):
                self.ask("get_job_info", job_id)
                return
            self._jobs().submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=job_id,
                runtime_env={"env_vars": variables},
                metadata={"training": spec.training, "attempt": str(spec.attempt)},
                entrypoint_num_cpus=number * NUM_CPUS[kind] if alone else None,
                entrypoint_num_gpus=num_gpus or None,
            )

        try:
            await _in_thread(submit)
        except RuntimeError as error:
            raise OSError(f"Ray refused the job: {_first_line(str(error))}") from error
        return RayWorker(self, job_id)

    async def discard(self, training_id: str, attempt: int) -> None:
        """Stops and removes the job of an attempt, if there is one."""
        try:
            await self.remove(f"{self._prefix}-{training_id}-{attempt}")
        except (OSError, RuntimeError) as error:
            # It is fenced: it may go on, but nothing comes of it.
            log.warning("job not removed", training_id=training_id, error=str(error)[:300])

    async def is_abandoned(self, training_id: str, attempt: int) -> bool:
        """Returns False: another trainer may be waiting for the job."""
        return False

    async def list_leftovers(self) -> list[tuple[str, int]]:
        """Returns training id and attempt of every job of ours that the cluster knows."""
        try:
            jobs = await _in_thread(lambda: self._jobs().list_jobs())
        except (OSError, RuntimeError) as error:
            log.warning("jobs not listed", error=str(error)[:300])
            return []
        pattern = re.compile(re.escape(self._prefix) + r"-(.+)-([0-9]+)")
        found = [pattern.fullmatch(job.submission_id or "") for job in jobs]
        return [(match[1], int(match[2])) for match in found if match]

    async def remove(self, job_id: str, grace_seconds: float = 0.0) -> None:
        """Stops a job, waits until it has ended and makes the cluster forget it."""
        with contextlib.suppress(_Unknown):
            await _in_thread(lambda: self.ask("stop_job", job_id))
            deadline = time.monotonic() + grace_seconds + _END_SECONDS
            while time.monotonic() < deadline:
                info = await _in_thread(lambda: self.ask("get_job_info", job_id))
                if info.status.is_terminal():
                    await asyncio.sleep(_SETTLE_SECONDS)
                    await _in_thread(lambda: self.ask("delete_job", job_id))
                    return
                await asyncio.sleep(_POLL_SECONDS)
            log.warning("job does not end", job=job_id)

    def ask(self, method: str, job_id: str) -> Any:
        """Calls the API about one job. Blocks.

        Raises:
            _Unknown: The cluster does not know the job.
            RuntimeError: It refuses.
            OSError: It is away.
        """
        try:
            return getattr(self._jobs(), method)(job_id)
        except RuntimeError as error:
            if "status code 404" in str(error):
                raise _Unknown(job_id) from error
            raise

    def _jobs(self) -> Any:
        """Returns the client, which asks the cluster for its version when it is made."""
        if self._client is None:
            self._client = self._connect(self._address)
        return self._client

    def _look(self) -> Sequence[_Machine]:
        nodes = self._list_nodes(
            address=self._address,
            filters=[("state", "=", "ALIVE")],
            limit=10_000,
            timeout=10,
            # Of nodes that have died some parts are missing.
            raise_on_missing_output=False,
        )
        resources = [node.resources_total for node in nodes]
        return tuple(
            _Machine(int(one.get("CPU", 0)) // NUM_CPUS[Device.CPU], int(one.get("GPU", 0)))
            for one in resources
        )


class _Unknown(Exception):
    """The cluster does not know the job."""


class RayWorker:
    """A worker that runs as a job."""

    def __init__(self, executor: RayExecutor, job_id: str) -> None:
        self.job_id = job_id
        self._executor = executor
        self._ended = asyncio.Event()
        self._watch = asyncio.create_task(self._poll(), name=f"job {job_id}")

    async def wait(self) -> Exit:
        """Waits until it has ended."""
        return await asyncio.shield(self._watch)

    async def terminate(self, grace_seconds: float) -> None:
        """Has Ray end its processes; returns when it has, or does not answer.

        A worker that nobody can reach is fenced, and ends when it hears so.
        """
        try:
            await _in_thread(lambda: self._executor.ask("stop_job", self.job_id))
        except _Unknown:
            return
        except (OSError, RuntimeError) as error:
            log.warning("job not stopped", job=self.job_id, error=str(error)[:300])
        await wait(self._ended, grace_seconds + _END_SECONDS)

    async def close(self) -> None:
        """Makes the cluster forget the job."""
        self._watch.cancel()
        await asyncio.wait([self._watch])
        try:
            await self._executor.remove(self.job_id)
        except (OSError, RuntimeError) as error:
            log.warning("job not removed", job=self.job_id, error=str(error)[:300])

    async def _poll(self) -> Exit:
        """Asks until it has ended. Whether it gets on is for others to judge, by its progress."""
        while True:
            try:
                if (end := await _in_thread(self._look)) is not None:
                    self._ended.set()
                    return end
            except (OSError, RuntimeError) as error:
                log.warning("job not seen", job=self.job_id, error=str(error)[:300])
            await asyncio.sleep(_POLL_SECONDS)

    def _look(self) -> Exit | None:
        try:
            info = self._executor.ask("get_job_info", self.job_id)
            if not info.status.is_terminal():
                return None
        except _Unknown:
            return Exit(1, ("the Ray cluster does not know the job any more",))
        lines = self._read_log()
        if info.driver_exit_code is not None:
            return Exit(info.driver_exit_code, tuple(lines[-_LAST_LINES:]))
        # It did not end by itself: Ray says why.
        reason = _first_line(info.message or f"the job is {info.status}")
        return Exit(1, (*lines[1 - _LAST_LINES :], reason))

    def _read_log(self) -> list[str]:
        """Returns what it wrote; nothing if that is lost with its machine."""
        try:
            log_text: str = self._executor.ask("get_job_logs", self.job_id)
        except (_Unknown, OSError, RuntimeError) as error:
            log.warning("log of the job is lost", job=self.job_id, error=str(error)[:300])
            return []
        return [line for line in log_text.splitlines() if line]


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:500]
