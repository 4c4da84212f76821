"""Trainings on a Ray cluster of several nodes: to the end, stopped, and when something dies."""

import asyncio
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from detflow.errors import from_status
from detflow.events import Bus
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1 import training_pb2
from services.trainer.executors.ray import RayExecutor
from tests import ray_rig, s3_rig
from tests.cluster_players import (
    BUCKET,
    LONG,
    TINY,
    LateExecutor,
    node_of,
    other_trainer,
    trainer_on,
    until,
    until_no_workers,
    workers,
)
from tests.ray_rig import Cluster
from tests.s3_rig import S3
from tests.trainer_rig import Rig, State

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PAUSE = training_pb2.STOP_MODE_PAUSE
DISCARD = training_pb2.STOP_MODE_DISCARD


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    folder = Path(tempfile.mkdtemp(prefix="detflow-s3-"))
    prepared = s3_rig.prepare(folder / "server")
    with prepared.running():
        yield prepared
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that runs no trainings, and two nodes that run one process each."""
    with ray_rig.cluster() as made:
        made.add_node(num_cpus=0)
        made.add_node(num_cpus=2)
        made.add_node(num_cpus=2)
        yield made


MakeRig = Callable[..., AbstractAsyncContextManager[Rig]]


@pytest.fixture
def make_rig(
    cluster: Cluster,
    s3: S3,
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> MakeRig:
    @contextlib.asynccontextmanager
    async def make(
        make_executor: Callable[[Settings], RayExecutor] | None = None,
    ) -> AsyncIterator[Rig]:
        async with trainer_on(
            cluster,
            s3,
            bus=bus,
            nats_url=nats_url,
            database_url=await make_database_url("trainer"),
            folder=tmp_path,
            make_executor=make_executor,
        ) as one:
            yield one
        await until_no_workers()
        assert job_ids(cluster) == []

    return make


@pytest.fixture
async def rig(make_rig: MakeRig) -> AsyncIterator[Rig]:
    async with make_rig() as one:
        yield one


def job_ids(cluster: Cluster) -> list[str]:
    from ray.job_submission import JobSubmissionClient

    jobs = JobSubmissionClient(cluster.dashboard).list_jobs()
    return [job.submission_id for job in jobs if job.submission_id]


def attempt_runs(attempt: int) -> Callable[[training_pb2.Training], bool]:
    return lambda training: (training.attempt, training.state) == (attempt, State.RUNNING)


async def goes_on(rig: Rig, begun: training_pb2.Training) -> None:
    """Waits until an attempt has kept what was there and got further; discards the training."""
    assert begun.num_epochs_done >= 1
    await until(rig, begun.name, lambda now: now.num_epochs_done > begun.num_epochs_done)
    assert (await rig.get(begun.name)).attempt == begun.attempt
    await rig.stop(begun.name, DISCARD)
    await until(rig, begun.name, lambda training: training.state == State.STOPPED, 30)


async def evaluated(rig: Rig, name: str, attempt: int) -> training_pb2.Training:
    """Measures an attempt once its predictions are there; returns the training at its end."""
    async with asyncio.timeout(200):
        await rig.predictions[name.rsplit("/", 1)[1], attempt].wait()
    await rig.evaluate_both(name, attempt=attempt)
    return await until(rig, name, lambda training: training.state == State.SUCCEEDED)


async def test_training_runs_on_the_cluster_to_its_end(rig: Rig) -> None:
    training = await rig.start(epochs=2, batch_size=7, hyperparameters=TINY)
    done = await evaluated(rig, training.name, 1)
    assert (done.num_epochs_done, done.attempt) == (2, 1)
    assert ObjectStore(BUCKET).get(done.weights)


async def test_training_on_two_machines_runs_to_its_end(rig: Rig) -> None:
    resources = training_pb2.Resources(num_nodes=2, num_devices_per_node=1)
    training = await rig.start(epochs=2, batch_size=7, hyperparameters=TINY, resources=resources)
    done = await evaluated(rig, training.name, 1)
    assert (done.num_epochs_done, done.attempt) == (2, 1)
    events = await rig.events(training.name.rsplit("/", 1)[1])
    lines = [line for event in events for line in event.log.lines]
    assert any(line.startswith("trains on 2 devices") for line in lines)


async def test_training_is_paused_goes_on_and_is_discarded(rig: Rig, cluster: Cluster) -> None:
    training = await rig.start(epochs=LONG, batch_size=7, hyperparameters=TINY)
    await until(rig, training.name, lambda training: training.num_epochs_done >= 1)
    await rig.stop(training.name, PAUSE)
    await until(rig, training.name, lambda training: training.state == State.PAUSED, 30)
    await until_no_workers()
    await rig.resume(training.name)
    await until(rig, training.name, lambda training: training.state == State.RUNNING)
    assert len(job_ids(cluster)) == 1
    await rig.stop(training.name, DISCARD)
    await until(rig, training.name, lambda training: training.state == State.STOPPED, 30)


async def test_training_goes_on_when_its_trainer_is_killed(
    make_rig: MakeRig, cluster: Cluster
) -> None:
    late: list[LateExecutor] = []

    def make_executor(settings: Settings) -> RayExecutor:
        late.append(LateExecutor(settings))
        return late[0]

    async with make_rig(make_executor) as rig, other_trainer(rig) as (other, stub):
        doomed = dataclasses.replace(rig, stub=stub)
        training = await doomed.start(epochs=LONG, batch_size=7, hyperparameters=TINY)
        await until(rig, training.name, lambda training: training.num_epochs_done >= 1)
        [orphan] = workers()
        other.kill()
        late[0].may_look = True
        await late[0].refresh()
        again = await until(rig, training.name, attempt_runs(2), 90)
        assert from_status(again.failure.status).reason == "TRAINER_DIED"
        # The job of the first was stopped, and forgotten.
        await asyncio.to_thread(orphan.wait, 30)
        [worker] = workers()
        [job_id] = job_ids(cluster)
        assert job_id.endswith("-2") and worker.pid != orphan.pid
        await goes_on(rig, again)


async def test_training_goes_on_elsewhere_when_its_machine_is_lost(
    rig: Rig, cluster: Cluster
) -> None:
    training = await rig.start(epochs=LONG, batch_size=7, hyperparameters=TINY)
    await until(rig, training.name, lambda training: training.num_epochs_done >= 1)
    [orphan] = workers()
    node_of(orphan, cluster).kill()
    assert orphan.is_running()
    again = await until(rig, training.name, attempt_runs(2))
    # The worker that lost its machine is told so, and goes.
    await asyncio.to_thread(orphan.wait, 30)
    [worker] = workers()
    assert worker.pid != orphan.pid
    await goes_on(rig, again)
    events = await rig.events(training.name.rsplit("/", 1)[1])
    epochs = [event.epoch for event in events if event.HasField("epoch")]
    for attempt, first in ((1, 1), (2, again.num_epochs_done + 1)):
        told = [epoch.epoch for epoch in epochs if epoch.attempt == attempt]
        assert told == list(range(first, first + len(told)))


async def test_training_goes_on_while_the_head_is_lost_and_on_the_cluster_that_follows(
    rig: Rig, cluster: Cluster
) -> None:
    training = await rig.start(epochs=LONG, batch_size=7, hyperparameters=TINY)
    begun = await until(rig, training.name, lambda training: training.num_epochs_done >= 1)
    [orphan] = workers()
    cluster.nodes[0].kill()
    await until(rig, training.name, lambda now: now.num_epochs_done > begun.num_epochs_done + 1)
    cluster.lose()
    assert orphan.is_running() and (await rig.get(training.name)).attempt == 1
    await asyncio.to_thread(cluster.add_node, num_cpus=0)
    await asyncio.to_thread(cluster.add_node, num_cpus=2)
    again = await until(rig, training.name, attempt_runs(2))
    await asyncio.to_thread(orphan.wait, 30)
    assert "does not know the job" in again.failure.status.message
    assert len(workers()) == len(job_ids(cluster)) == 1
    await goes_on(rig, again)
