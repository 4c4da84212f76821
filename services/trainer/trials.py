"""Tries trainings that are not to be started: `validate_only`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from detflow.errors import Internal, ResourceExhausted, Unavailable
from detflow.settings import Settings
from detflow.v1.training_pb2 import Preflight
from detflow.v1.worker_pb2 import JobMessage, JobSpec
from services.trainer.domain import Plan
from services.trainer.jobs import run_job
from services.trainer.messages import plan_spec

_MAX_AT_ONCE = 2
_RETRY_SECONDS = 10


class RunJob(Protocol):
    """`jobs.run_job`, or what a test puts in its place."""

    def __call__(
        self, spec: JobSpec, *, settings: Settings, sandbox: bool = False
    ) -> Awaitable[JobMessage]:
        """Runs a job to its end."""


class Trials:
    """Runs the preflights of this process; they take no slot, so only a few run at once."""

    def __init__(self, settings: Settings, run: RunJob = run_job) -> None:
        self._settings = settings
        self._run = run
        self._num_running = 0

    async def run(self, plan: Plan) -> Preflight:
        """Tries a training; if this is cancelled, the trial ends.

        Raises:
            DetflowError: What would go wrong, with the remedy.
            ResourceExhausted: TOO_MANY_TRIALS, others run.
        """
        if self._num_running >= _MAX_AT_ONCE:
            raise ResourceExhausted(
                f"{_MAX_AT_ONCE} trainings are being tried already; try again in a while, or start"
                " the training: it is tried before its first step",
                reason="TOO_MANY_TRIALS",
                retry_seconds=_RETRY_SECONDS,
            )
        self._num_running += 1
        try:
            message = await self._run(JobSpec(preflight=plan_spec(plan)), settings=self._settings)
        except OSError as error:
            raise Unavailable(
                "the trial's process could not be started; try again", reason="JOB_NOT_STARTED"
            ) from error
        finally:
            self._num_running -= 1
        if not message.HasField("preflight"):
            raise Internal("the preflight job answered something else", reason="JOB_BROKEN")
        return message.preflight
