"""Trainings that are tried and not started, and what is tried before a training's first step."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from detflow import channels
from detflow.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from detflow.events import Bus
from detflow.settings import Settings
from detflow.v1 import trainer_pb2, training_pb2, version_pb2
from detflow.v1.training_pb2 import Preflight
from detflow.v1.worker_pb2 import JobMessage, JobSpec, WorkerSpec
from tests import trainer_rig
from tests.trainer_players import MANIFEST, PROJECT, VERSION
from tests.trainer_rig import Rig, State

FOUND = Preflight(
    checks=[Preflight.Check(name="labels", detail="9 boxes", seconds=0.5)],
    device="cpu",
    memory_bytes=7,
    total_seconds=60,
)


class Job:
    """Plays the preflight job."""

    def __init__(self) -> None:
        self.specs: asyncio.Queue[WorkerSpec] = asyncio.Queue()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.cancelled: asyncio.Queue[None] = asyncio.Queue()
        self.problem: Exception | None = None

    async def __call__(
        self, spec: JobSpec, *, settings: Settings, sandbox: bool = False
    ) -> JobMessage:
        self.specs.put_nowait(spec.preflight)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.put_nowait(None)
            raise
        if self.problem is not None:
            raise self.problem
        return JobMessage(preflight=FOUND)


@pytest.fixture
def job() -> Job:
    return Job()


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
    job: Job,
) -> AsyncIterator[Rig]:
    async with trainer_rig.running(
        bus=bus,
        nats_url=nats_url,
        database_url=await make_database_url("trainer"),
        folder=tmp_path,
        run=job,
    ) as one:
        yield one


def request(parent: str = VERSION, **training: Any) -> trainer_pb2.StartTrainingRequest:
    hyperparameters = training.pop("hyperparameters", {})
    message = training_pb2.Training(**{"model": "yolov8n", "epochs": 7, **training})
    message.hyperparameters.update(hyperparameters)
    return trainer_pb2.StartTrainingRequest(parent=parent, training=message, validate_only=True)


async def tried(rig: Rig, **fields: Any) -> training_pb2.Training:
    with channels.translate():
        return await rig.stub.StartTraining(request(**fields))


async def test_trial_answers_what_would_be_and_queues_nothing(rig: Rig, job: Job) -> None:
    would_be = await tried(rig, batch_size=4, hyperparameters={"image_size": 64})
    assert would_be.preflight == FOUND
    assert (would_be.name, would_be.epochs, would_be.batch_size) == ("", 7, 4)
    assert would_be.hyperparameters["image_size"] == 64
    spec = job.specs.get_nowait()
    assert (spec.training, spec.batch_size, spec.preflight) == ("", 4, True)
    assert spec.manifest == MANIFEST
    assert spec.hyperparameters["image_size"] == 64
    assert not (await rig.list_trainings()).trainings
    assert rig.hellos.empty()


async def test_trial_checks_all_that_a_start_does(rig: Rig, job: Job) -> None:
    with pytest.raises(NotFound):
        await tried(rig, parent=f"{PROJECT}/versions/none")
    with pytest.raises(InvalidArgument):
        await tried(rig, hyperparameters={"lr0": 9})
    with pytest.raises(FailedPrecondition):
        await tried(rig, hyperparameters={"device": "cuda"})
    rig.versions.put(f"{PROJECT}/versions/new", version_pb2.Version.PREPROCESSING)
    with pytest.raises(FailedPrecondition) as caught:
        await tried(rig, parent=f"{PROJECT}/versions/new")
    assert caught.value.reason == "VERSION_NOT_READY"
    await rig.start()
    with pytest.raises(AlreadyExists):
        await tried(rig)
    assert job.specs.empty()


async def test_problem_that_a_trial_finds_is_the_answer(rig: Rig, job: Job) -> None:
    job.problem = FailedPrecondition("train/a.jpg is cut off", reason="BAD_IMAGES")
    with pytest.raises(FailedPrecondition) as caught:
        await tried(rig)
    assert (caught.value.reason, caught.value.message) == ("BAD_IMAGES", "train/a.jpg is cut off")


async def test_two_trials_run_at_once_and_a_third_is_told_when_to_come_back(
    rig: Rig, job: Job
) -> None:
    job.may_end.clear()
    running = [asyncio.create_task(tried(rig)) for _ in range(2)]
    for _ in running:
        await asyncio.wait_for(job.specs.get(), 10)
    with pytest.raises(ResourceExhausted) as caught:
        await tried(rig)
    assert caught.value.reason == "TOO_MANY_TRIALS"
    with pytest.raises(grpc.aio.AioRpcError) as raw:
        await rig.stub.StartTraining(request())
    trailers: dict[str, Any] = dict(cast(Any, raw.value.trailing_metadata()))
    details = trailers["grpc-status-details-bin"]
    status, retry = status_pb2.Status.FromString(details), error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.seconds == 10
    job.may_end.set()
    await asyncio.gather(*running)
    await tried(rig)


async def test_trial_ends_when_nobody_waits_for_it(rig: Rig, job: Job) -> None:
    job.may_end.clear()
    call = rig.stub.StartTraining(request())
    await asyncio.wait_for(job.specs.get(), 10)
    call.cancel()
    await asyncio.wait_for(job.cancelled.get(), 10)
    with contextlib.suppress(asyncio.CancelledError):
        await call
    job.may_end.set()
    assert (await tried(rig)).preflight == FOUND


async def test_first_attempt_tries_everything_and_what_it_found_is_kept(rig: Rig) -> None:
    training = await rig.start()
    first = await rig.puppet()
    assert first.hello["spec"]["preflight"] is True
    first.kill()  # before it was done
    second = await rig.puppet()
    assert second.hello["spec"]["preflight"] is True
    await second.preflight(device="cpu", checks=[{"name": "labels", "detail": "9 boxes"}])
    found = await rig.until(training.name, lambda training: training.HasField("preflight"))
    assert (found.state, found.preflight.checks[0].detail) == (State.PROVISIONING, "9 boxes")
    second.kill()
    third = await rig.puppet()
    assert "preflight" not in third.hello["spec"]
    assert (await rig.get(training.name)).preflight == found.preflight


async def test_preflight_that_fails_ends_the_training_at_once(rig: Rig) -> None:
    training = await rig.start()
    puppet = await rig.puppet()
    await puppet.failed(code_pb2.FAILED_PRECONDITION, "train/a.jpg is cut off")
    failed = await rig.until_state(training.name, State.FAILED)
    assert (failed.attempt, failed.failure.status.message) == (1, "train/a.jpg is cut off")
