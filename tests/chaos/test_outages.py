"""Postgres, NATS, metrics and the worker fail while a real training runs."""

import asyncio
import contextlib
import functools
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import asyncpg
import httpx
import psutil
import pytest
import pytest_asyncio

from detflow import channels
from detflow.errors import DetflowError, Unavailable, to_status
from detflow.events import Bus
from detflow.local import postgres
from detflow.v1 import (
    dataset_pb2,
    metrics_pb2,
    trainer_pb2,
    training_pb2,
    version_pb2,
)
from tests.background import running
from tests.chaos import invariants
from tests.deployment_rig import (
    PROJECT,
    SERVICES,
    Deployment,
    Gates,
    create_version,
    deployed,
    eventually,
    import_dataset,
    ready_version,
    start_training,
    until_gone,
    write_archive,
)
from tests.stack_rig import free_base_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]
State = training_pb2.Training.State
NOTICED_SECONDS = 6.0
BACK_SECONDS = 5.0
DRAINED_SECONDS = 10.0
RESUMED_SECONDS = 30.0


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def gates() -> Gates:
    return Gates()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(data_dir: Path, gates: Gates) -> AsyncIterator[Deployment]:
    async with deployed(data_dir, gates=gates) as deployment:
        yield deployment
    invariants.check_no_leftovers(data_dir)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dataset(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> str:
    archive = await asyncio.to_thread(write_archive, tmp_path_factory.mktemp("images"), 30)
    return await import_dataset(deployment, archive, "shapes")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def training(deployment: Deployment, dataset: str) -> str:
    """A training that goes on through every outage of this module."""
    version = await ready_version(deployment, dataset, "trained")
    training = await start_training(deployment, version)
    await deployment.until_epoch(training.name, 2)
    return training.name


async def test_kills_while_results_are_made_cost_no_result(
    deployment: Deployment, dataset: str
) -> None:
    version = await ready_version(deployment, dataset, "evaluated")
    training = await start_training(deployment, version, epochs=2)
    await deployment.until_training(training.name, lambda t: t.state == State.EVALUATING)
    assert deployment.kill("worker")
    evaluating = await deployment.until_training(
        training.name, lambda t: t.state == State.EVALUATING and t.attempt == 2
    )
    assert evaluating.num_epochs_done == 2
    metrics = deployment.process("metrics")
    await eventually(lambda: children(metrics), lambda found: len(found) > 0)
    [measuring] = await children(metrics)
    metrics.kill()
    ended = await deployment.until_training(
        training.name, lambda t: t.state not in (State.EVALUATING, State.RUNNING)
    )
    assert (ended.state, ended.attempt) == (State.SUCCEEDED, 2)
    await until_gone([measuring])
    evaluations = await deployment.patiently(
        lambda: deployment.metrics.ListEvaluations(
            metrics_pb2.ListEvaluationsRequest(parent=training.name)
        )
    )
    assert [e.state for e in evaluations.evaluations] == [metrics_pb2.Evaluation.SUCCEEDED] * 2
    await deployment.until_version(version, version_pb2.Version.COMPLETED)
    await history_is_sound(deployment, training.name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_postgres_restart_is_unavailable_for_a_moment_and_ends_no_attempt(
    deployment: Deployment, gates: Gates, dataset: str, training: str, number: signal.Signals
) -> None:
    before = await deployment.training(training)
    refusals: list[DetflowError] = []

    async def refused() -> bool:
        return len(refusals) > 0

    async with contextlib.AsyncExitStack() as background:
        for call in reads(deployment, training):
            await background.enter_async_context(running(repeat(call, refusals)))
        with gates.closed("postgres"):
            deployment.process("postgres").send_signal(number)
            await until_health(deployment, serving=False)
            # Channels retry for about half a second: a shorter outage is seen by no caller.
            await eventually(refused, lambda found: found)
        back = time.monotonic()
        for call in reads(deployment, training):
            await deployment.patiently(call)
        assert time.monotonic() - back < BACK_SECONDS
        await until_health(deployment, serving=True)
        # Relays, consumers and every pool are in the way of a new version.
        version = await deployment.patiently(
            lambda: create_version(deployment, dataset, f"after {number.name}")
        )
        await deployment.until_version(version.name, version_pb2.Version.READY)
        assert time.monotonic() - back < DRAINED_SECONDS
    for refusal in refusals:
        assert isinstance(refusal, Unavailable), refusal
        assert "RetryInfo" in str(to_status(refusal)), refusal
    await goes_on(deployment, before)


@contextlib.contextmanager
def nats_killed(deployment: Deployment, gates: Gates) -> Iterator[None]:
    with gates.closed("nats"):
        deployment.kill("nats")
        yield


@contextlib.contextmanager
def nats_black_hole(deployment: Deployment, gates: Gates) -> Iterator[None]:
    process = deployment.process("nats")
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@pytest.mark.parametrize(("outage", "seconds"), [(nats_killed, 10.0), (nats_black_hole, 8.0)])
async def test_training_goes_on_without_nats_and_its_records_arrive_afterwards(
    deployment: Deployment,
    gates: Gates,
    dataset: str,
    training: str,
    outage: Callable[[Deployment, Gates], contextlib.AbstractContextManager[None]],
    seconds: float,
) -> None:
    before = await deployment.training(training)
    begin = time.monotonic()
    with outage(deployment, gates):
        await until_health(deployment, serving=False)
        async with httpx.AsyncClient() as http:
            ready = await http.get(f"http://127.0.0.1:{deployment.port}/readyz")
        assert time.monotonic() - begin < NOTICED_SECONDS
        assert ready.status_code == 503
        version = await create_version(deployment, dataset, outage.__name__)  # told later
        await asyncio.sleep(begin + seconds - time.monotonic())  # the outage itself
    back = time.monotonic()
    await until_health(deployment, serving=True)
    assert time.monotonic() - back < BACK_SECONDS
    # The worker trained on meanwhile: its epochs are there as soon as the backlog is.
    after = await goes_on(deployment, before, num_epochs=3)
    await deployment.until_version(version.name, version_pb2.Version.READY)
    await outboxes_drain(deployment)
    assert time.monotonic() - back < DRAINED_SECONDS
    await metrics_have_every_epoch(deployment, training, after)


async def test_frozen_trainer_and_worker_are_replaced_and_have_no_say_afterwards(
    deployment: Deployment, training: str, tmp_path: Path
) -> None:
    before = await deployment.training(training)
    worker, trainer = deployment.worker(), deployment.process("trainer")
    assert worker is not None
    frozen = [worker, *worker.children(recursive=True)]
    # Another replica takes over, as when the machine of the first is suspended.
    async with replica_of_trainer(deployment, tmp_path) as replica:
        begin = time.monotonic()
        for process in [trainer, *frozen]:
            process.suspend()
        try:
            await replica.until_attempt(training, before.attempt + 1)
            assert time.monotonic() - begin < RESUMED_SECONDS
        finally:
            for process in [*frozen, trainer]:
                process.resume()
        await until_gone(frozen)
    # The replica was told to end, and gave the training back to the one that is left.
    drained = time.monotonic()
    await deployment.until_attempt(training, before.attempt + 2)
    assert time.monotonic() - drained < RESUMED_SECONDS
    after = await deployment.training(training)
    assert after.attempt == before.attempt + 2
    await history_is_sound(deployment, training)
    await metrics_have_every_epoch(deployment, training, after)


async def test_killed_trainer_goes_on_as_soon_as_it_is_back(
    deployment: Deployment, training: str
) -> None:
    before = await deployment.training(training)
    worker = deployment.worker()
    assert worker is not None
    begin = time.monotonic()
    assert deployment.kill("trainer")
    await until_gone([worker])
    # The new process knows that worker and trainer are dead: it waits for no lease to run out.
    await deployment.until_attempt(training, before.attempt + 1)
    assert time.monotonic() - begin < RESUMED_SECONDS
    after = await deployment.training(training)
    assert (after.attempt, after.failure.status.message) == (
        before.attempt + 1,
        "the trainer process that ran this attempt is gone",
    )
    await history_is_sound(deployment, training)


async def test_wiped_nats_is_filled_again_and_nothing_is_applied_twice(
    deployment: Deployment, gates: Gates, dataset: str, training: str, data_dir: Path
) -> None:
    before = await deployment.training(training)
    versions = await version_states(deployment)
    with contextlib.ExitStack() as closed:
        for name in (*SERVICES, "gateway", "nats"):
            closed.enter_context(gates.closed(name))
        processes = [deployment.process(name) for name in (*SERVICES, "gateway", "nats")]
        for process in processes:
            process.terminate()
        await until_gone(processes, seconds=20)
        assert deployment.worker() is None
        await asyncio.to_thread(shutil.rmtree, data_dir / "nats" / "jetstream")
    begin = time.monotonic()
    await until_health(deployment, serving=True)
    version = await deployment.patiently(
        lambda: create_version(deployment, dataset, "after a wipe")
    )
    await deployment.until_version(version.name, version_pb2.Version.READY)
    await outboxes_drain(deployment)
    assert time.monotonic() - begin < 2 * DRAINED_SECONDS
    await deployment.until_attempt(training, before.attempt + 1)
    assert time.monotonic() - begin < RESUMED_SECONDS + DRAINED_SECONDS
    after = await deployment.training(training)
    assert after.attempt == before.attempt + 1
    await metrics_have_every_epoch(deployment, training, after)
    now = await version_states(deployment)
    name = training.rsplit("/trainings/", 1)[0]
    assert {k: v for k, v in now.items() if k in versions and k != name} == {
        k: v for k, v in versions.items() if k != name
    }
    await history_is_sound(deployment, training)


def reads(deployment: Deployment, training: str) -> list[Callable[[], Awaitable[object]]]:
    """Returns a call to each service that needs the database."""
    versions, trainings = f"{PROJECT}", f"{PROJECT}/versions/-"
    return [
        lambda: deployment.versions.ListVersions(version_pb2.ListVersionsRequest(parent=versions)),
        lambda: deployment.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest(parent=PROJECT)),
        lambda: deployment.trainer.ListTrainings(
            trainer_pb2.ListTrainingsRequest(parent=trainings)
        ),
        lambda: deployment.metrics.ListMetricSeries(
            metrics_pb2.ListMetricSeriesRequest(training=training)
        ),
    ]


async def repeat(call: Callable[[], Awaitable[object]], refusals: list[DetflowError]) -> None:
    """Calls all the time and keeps what was refused."""
    while True:
        try:
            with channels.translate():
                await call()
        except DetflowError as error:
            refusals.append(error)
        await asyncio.sleep(0.05)


async def until_health(deployment: Deployment, *, serving: bool) -> None:
    """Waits until every service says that it serves, or that it does not."""
    for service in SERVICES:
        await eventually(
            functools.partial(deployment.health, service), lambda found: found is serving
        )


async def goes_on(
    deployment: Deployment, before: training_pb2.Training, num_epochs: int = 1
) -> training_pb2.Training:
    """Waits for more epochs of the same attempt."""
    await deployment.until_epoch(before.name, before.num_epochs_done + num_epochs)
    after = await deployment.training(before.name)
    assert (after.attempt, after.state) == (before.attempt, State.RUNNING)
    return after


async def metrics_have_every_epoch(
    deployment: Deployment, training: str, state: training_pb2.Training
) -> None:
    """Checks that every epoch is there once, in order, without a hole (I8)."""

    async def series() -> metrics_pb2.ListMetricSeriesResponse:
        found: metrics_pb2.ListMetricSeriesResponse = await deployment.patiently(
            lambda: deployment.metrics.ListMetricSeries(
                metrics_pb2.ListMetricSeriesRequest(training=training)
            )
        )
        return found

    found = await eventually(
        series, lambda f: all(s.epochs[-1] >= state.num_epochs_done for s in f.series)
    )
    assert found.series
    for one in found.series:
        assert list(one.epochs) == list(range(1, len(one.epochs) + 1)), one.name


async def history_is_sound(deployment: Deployment, training: str) -> None:
    """Checks a training's states, and that no old attempt had a say (I2, I3)."""
    bus = await Bus.connect(deployment.setting("version", "DETFLOW_NATS_URL"), "test")
    try:
        events = await invariants.read_events(bus)
    finally:
        await bus.close()
    assert events[f"training.{training.rsplit('/', 1)[1]}"]
    invariants.check_histories(events)
    invariants.check_attempts(events)


async def outboxes_drain(deployment: Deployment) -> None:
    """Waits until no service has events that are not in the stream."""
    for service in postgres.SERVICES:
        url = deployment.setting(service, "DETFLOW_DATABASE_URL")
        conn = await asyncpg.connect(url, server_settings={"search_path": service})
        try:
            await eventually(
                functools.partial(
                    conn.fetchval, "select count(*) from outbox where publish_time is null"
                ),
                lambda waiting: waiting == 0,
            )
        finally:
            await conn.close()


async def version_states(deployment: Deployment) -> dict[str, tuple[int, int]]:
    """Returns state and revision of every version."""
    page = await deployment.patiently(
        lambda: deployment.versions.ListVersions(
            version_pb2.ListVersionsRequest(parent=PROJECT, page_size=1000)
        )
    )
    return {version.name: (version.state, version.revision) for version in page.versions}


async def children(process: psutil.Process) -> list[psutil.Process]:
    return process.children()


@contextlib.asynccontextmanager
async def replica_of_trainer(deployment: Deployment, folder: Path) -> AsyncIterator[Deployment]:
    """Runs one more trainer; yields a deployment whose trainer it is."""
    port = free_base_port()
    environment = {
        **deployment.process("trainer").environ(),
        "DETFLOW_LISTEN": f"127.0.0.1:{port + 3}",
        "DETFLOW_DATA_DIR": str(folder / "replica"),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.trainer"),
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
    )
    replica = Deployment(deployment.supervisor, port, token=deployment.token)
    try:
        await eventually(lambda: replica.health("trainer"), lambda serving: serving)
        yield replica
    finally:
        process.terminate()
        assert await process.wait() == 0
        await replica.close()
