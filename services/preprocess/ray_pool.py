"""Shards made by the machines of a Ray cluster, as tasks.

The service is a client of the cluster and shares nothing with it but the object store: a job says
which objects to read, and its result which object was written. A task whose machine is lost is run
again by Ray on another; what it had stored before is found under the same name, since the names of
shards come from their content.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from detflow import telemetry
from detflow.errors import FailedPrecondition, Unavailable
from detflow.images import use_one_thread
from detflow.settings import Settings
from services.preprocess.bundle import ShardJob
from services.preprocess.domain import Reason
from services.preprocess.pool import WorkerDied, side_by_side

log = telemetry.get_logger(__name__)

_CLIENT_PORT = 10001
_PASSED_ON_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_")

R = TypeVar("R")


class RayPool:
    """The CPUs of a Ray cluster; connected while there is something to do.

    Args:
        settings: Address of the cluster.
        environ: Environment to pass credentials of the object store on from.

    Raises:
        FailedPrecondition: NO_RAY, the package is not installed.
        InvalidArgument: DETFLOW_RAY_ADDRESS is not set.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise FailedPrecondition(
                "DETFLOW_EXECUTOR=ray needs Ray: pip install 'detflow[ray]'", reason="NO_RAY"
            ) from error
        self._ray: Any = ray
        self._address = settings.ray_client_address
        if not self._address:
            settings.require("ray_address")
            self._address = f"ray://{urlsplit(settings.ray_address).hostname}:{_CLIENT_PORT}"
        self._variables = {
            name: value for name, value in environ.items() if name.startswith(_PASSED_ON_PREFIXES)
        }

    async def map(
        self, work: Callable[[ShardJob], R], jobs: AsyncIterator[ShardJob]
    ) -> AsyncGenerator[tuple[ShardJob, R], None]:
        """Runs jobs side by side; yields each with its result as it is done, in any order.

        Args:
            work: A function of a module that the cluster's machines have.
            jobs: Taken as there is room, so there may be many.

        Raises:
            Unavailable: RAY_UNREACHABLE, the cluster does not answer.
            WorkerDied: Machines or processes were lost again and again.
            Exception: Whatever `work` raises; the other jobs are abandoned.
        """
        try:
            num_cpus = await asyncio.to_thread(self._connect)

            def submit(job: ShardJob) -> asyncio.Future[R]:
                return asyncio.ensure_future(self._run(work, job))

            async with aclosing(side_by_side(submit, jobs, num_cpus)) as results:
                async for result in results:
                    yield result
        except ConnectionError as error:
            raise Unavailable(
                f"the Ray cluster at {self._address} does not answer; is it there?",
                reason="RAY_UNREACHABLE",
            ) from error
        finally:  # a client without work would keep a process of the cluster
            await asyncio.to_thread(self._ray.shutdown)

    def _connect(self) -> int:
        """Connects; returns the CPUs of the cluster, at least 1."""
        self._ray.init(
            self._address, runtime_env={"env_vars": self._variables}, log_to_driver=False
        )
        return max(1, int(self._ray.cluster_resources().get("CPU", 0)))

    async def _run(self, work: Callable[[ShardJob], R], job: ShardJob) -> R:
        task = self._ray.remote(_in_own_scratch).options(num_cpus=1, name=work.__name__)
        reference = await asyncio.to_thread(task.remote, work, job)
        try:
            result: R = await asyncio.wrap_future(reference.future())
        except asyncio.CancelledError:
            await asyncio.to_thread(self._ray.cancel, reference, force=True)
            raise
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise WorkerDied(
                f"the Ray cluster lost the making of a shard ({type(error).__name__}), most likely"
                " for want of memory; give its machines more",
                reason=Reason.WORKER_DIED,
            ) from error
        return result


def _in_own_scratch(work: Callable[[ShardJob], R], job: ShardJob) -> R:
    """Does a job on a machine of the cluster."""
    use_one_thread()
    with tempfile.TemporaryDirectory(prefix="detflow-shard-") as folder:
        return work(replace(job, scratch=Path(folder)))
