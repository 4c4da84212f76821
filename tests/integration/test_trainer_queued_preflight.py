"""Trainings that are tried while they wait: what comes of it, and who does it."""

import asyncio
import contextlib
import dataclasses
import datetime
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from detflow.errors import (
    DetflowError,
    FailedPrecondition,
    ResourceExhausted,
    failure,
    from_status,
)
from detflow.events import Bus
from detflow.names import new_id
from detflow.postgres import Connection, Database
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1 import training_pb2
from detflow.v1.common_pb2 import Progress, StoredObject
from detflow.v1.training_pb2 import Preflight
from detflow.v1.worker_pb2 import JobMessage, JobSpec, WorkerSpec
from services.trainer import domain, preflight_claims
from services.trainer import store as trainings
from services.trainer.jobs import run_job
from services.trainer.preflight_claims import Claim
from services.trainer.queued_preflights import RunJob
from services.trainer.sweep import Sweeper
from tests import trainer_rig
from tests.shapes_bundle import write_bundle
from tests.trainer_players import MANIFEST, VERSION, Puppet
from tests.trainer_rig import FAST, Rig, State, eventually

FOUND = Preflight(
    checks=[Preflight.Check(name="labels"), Preflight.Check(name="memory")],
    device="cpu",
    memory_bytes=7,
    disk_bytes=8,
    step_seconds=9,
    total_seconds=60,
)
BAD_LABELS = FailedPrecondition("1 label, in train/00000001.jpg, box 1", reason="BAD_LABELS")
LEASE = datetime.timedelta(seconds=60)
AT_ONCE = datetime.timedelta(0)
BUSY_EPOCHS = 1000  # of the training that keeps the only slot


class Job:
    """Plays the jobs that try what waits."""

    def __init__(self) -> None:
        self.specs: asyncio.Queue[WorkerSpec] = asyncio.Queue()
        self.cancelled: asyncio.Queue[None] = asyncio.Queue()
        self.may_end = asyncio.Event()
        self.problem: Exception | None = None
        self.say: Callable[[Progress], None] = lambda progress: None

    async def __call__(
        self,
        spec: JobSpec,
        *,
        settings: Settings,
        on_progress: Callable[[Progress], None],
        background: bool,
    ) -> JobMessage:
        assert background
        if spec.preflight.epochs == BUSY_EPOCHS:
            # On a slow machine it is tried before it gets its slot, then told to end.
            await asyncio.Event().wait()
        self.say = on_progress
        self.specs.put_nowait(spec.preflight)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.put_nowait(None)
            raise
        if self.problem is not None:
            raise self.problem
        return JobMessage(preflight=FOUND)

    async def begun(self) -> WorkerSpec:
        return await asyncio.wait_for(self.specs.get(), 10)

    async def ended(self) -> None:
        await asyncio.wait_for(self.cancelled.get(), 10)


@pytest.fixture
def job() -> RunJob:
    return Job()


@pytest.fixture
def num_gpu_slots() -> int:
    return 0


@pytest.fixture
def num_preflights() -> int:
    return 1


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
    job: RunJob,
    num_gpu_slots: int,
    num_preflights: int,
) -> AsyncIterator[Rig]:
    async with trainer_rig.running(
        bus=bus,
        nats_url=nats_url,
        database_url=await make_database_url("trainer"),
        folder=tmp_path,
        run_queued=job,
        num_gpu_slots=num_gpu_slots,
        num_queued_preflights=num_preflights,
    ) as one:
        yield one


async def busy(rig: Rig) -> Puppet:
    """Fills the only slot."""
    await rig.start(f"{VERSION}-busy", epochs=BUSY_EPOCHS)
    return await rig.puppet()


@pytest.fixture
async def first(rig: Rig) -> Puppet:
    """What keeps the only slot."""
    for version in (f"{VERSION}-busy", f"{VERSION}-other"):
        rig.versions.put(version)
    return await busy(rig)


async def test_training_that_waits_is_tried_and_not_again_when_its_turn_comes(
    rig: Rig, first: Puppet, job: Job
) -> None:
    waiting = await rig.start(batch_size=8, hyperparameters={"image_size": 64})
    spec = await job.begun()
    assert (spec.batch_size, spec.epochs, spec.manifest) == (8, 10, MANIFEST)
    assert (spec.hyperparameters["image_size"], spec.hyperparameters["device"]) == (64, "cpu")
    async with asyncio.timeout(10), contextlib.aclosing(rig.watch(waiting.name)) as stream:
        async for item in stream:
            if item.HasField("training") and item.training.HasField("preflight"):
                assert (item.training.state, item.training.queue_position) == (State.QUEUED, 1)
                break
            if item.progress.stage == "preflight":
                assert (item.progress.step, item.progress.num_steps) == (2, 7)
                job.may_end.set()
            elif not job.may_end.is_set():
                job.say(Progress(stage="train_step", num_done=2, num_total=7))
    checked = await rig.get(waiting.name)
    assert (checked.preflight, checked.revision, checked.attempt) == (FOUND, 1, 0)
    await first.finish()
    puppet = await rig.puppet()
    assert puppet.training == waiting.name
    assert "preflight" not in puppet.hello["spec"]
    assert job.specs.empty()


async def test_training_that_must_fail_fails_while_it_waits(
    rig: Rig, first: Puppet, job: Job
) -> None:
    job.problem = BAD_LABELS
    job.may_end.set()
    waiting = await rig.start()
    failed = await rig.until_state(waiting.name, State.FAILED)
    assert (failed.attempt, failed.revision, failed.queue_position) == (0, 2, 0)
    assert from_status(failed.failure.status).reason == "BAD_LABELS"
    assert "train/00000001.jpg" in failed.failure.status.message
    assert failed.HasField("end_time")
    assert await rig.history(waiting.name.rsplit("/", 1)[1]) == ["QUEUED", "FAILED"]
    job.problem = None
    await rig.resume(waiting.name)
    passed = await rig.until(waiting.name, lambda training: training.HasField("preflight"))
    assert (passed.state, passed.revision) == (State.QUEUED, 3)
    await first.finish()
    assert (await rig.puppet()).training == waiting.name


@pytest.mark.parametrize(
    "problem",
    [
        ResourceExhausted("out of memory", reason="OUT_OF_MEMORY"),
        OSError("no more processes"),
    ],
    ids=["memory", "start"],
)
async def test_what_may_be_otherwise_by_its_turn_leaves_a_training_in_the_queue(
    rig: Rig, first: Puppet, job: Job, problem: Exception
) -> None:
    job.problem = problem
    waiting = await rig.start()
    async with asyncio.timeout(10), contextlib.aclosing(rig.watch(waiting.name)) as stream:
        async for item in stream:
            job.may_end.set()  # not before somebody watches: lines of the log are not kept
            if item.HasField("log"):
                (line,) = item.log.lines
                break
    assert "tried again" in line
    if isinstance(problem, DetflowError):
        assert problem.message in line
    still = await rig.get(waiting.name)
    assert (still.state, still.revision, still.HasField("preflight")) == (State.QUEUED, 1, False)
    await first.finish()
    assert (await rig.puppet()).hello["spec"]["preflight"] is True


async def test_try_ends_when_the_training_waits_no_more(rig: Rig, first: Puppet, job: Job) -> None:
    waiting = await rig.start()
    await job.begun()
    await rig.stop(waiting.name, training_pb2.STOP_MODE_PAUSE)
    await job.ended()
    assert (await rig.get(waiting.name)).state == State.PAUSED
    await rig.resume(waiting.name)
    await job.begun()
    await first.finish()  # its turn comes while it is tried
    second = await rig.puppet()
    await job.ended()
    assert (second.training, second.hello["spec"]["preflight"]) == (waiting.name, True)
    other = await rig.start(f"{VERSION}-other")
    await job.begun()
    await rig.version_event("deleted", 2, f"{VERSION}-other")
    await job.ended()
    assert (await rig.until_state(other.name, State.STOPPED)).failure.status.code == 0


async def test_higher_priority_is_tried_first_and_one_at_a_time(
    rig: Rig, first: Puppet, job: Job
) -> None:
    names = []
    for number, priority in enumerate((0, 0, 5)):
        rig.versions.put(f"{VERSION}-{number}")
        started = await rig.start(f"{VERSION}-{number}", priority=priority, epochs=20 + number)
        names.append(started.name)
    begun = [(await job.begun()).epochs]
    assert job.specs.empty()
    job.may_end.set()
    begun += [(await job.begun()).epochs for _ in range(2)]
    assert begun == [20, 22, 21]
    for name in names:
        await rig.until(name, lambda training: training.HasField("preflight"))


@pytest.mark.parametrize("num_gpu_slots", [1])
async def test_what_waits_for_a_gpu_is_tried_small_and_again_on_the_gpu(
    rig: Rig, first: Puppet, job: Job
) -> None:
    job.may_end.set()
    waiting = await rig.start(batch_size=16)
    spec = await job.begun()
    assert (spec.batch_size, spec.step_batch_size) == (2, 2)
    assert spec.hyperparameters["device"] == "cpu"
    found = (await rig.until(waiting.name, lambda t: t.HasField("preflight"))).preflight
    # Of memory and time on the GPU nothing is known.
    assert [check.name for check in found.checks] == ["labels"]
    assert (found.memory_bytes, found.total_seconds, found.disk_bytes) == (0, 0, 8)
    await first.finish()
    puppet = await rig.puppet()
    assert (puppet.hello["spec"]["preflight"], puppet.hello["gpus"]) == (True, "0")
    await puppet.preflight(device="cuda:0")
    await rig.until(waiting.name, lambda t: t.preflight.device == "cuda:0")
    puppet.kill()
    assert "preflight" not in (await rig.puppet()).hello["spec"]


@pytest.mark.parametrize(("num_gpu_slots", "num_preflights"), [(1, 0)])
async def test_trainer_that_shuts_down_leaves_what_it_tries_to_the_others(
    rig: Rig, first: Puppet, job: Job
) -> None:
    await rig.start(hyperparameters={"device": "cuda"})
    without = dataclasses.replace(rig.settings, num_gpu_slots=0, num_queued_preflights=1)
    # With such a lease, what is not given back is out of reach.
    patient = dataclasses.replace(FAST, lease=600.0)
    async with trainer_rig.trainer(without, patient, run_queued=job):
        await job.begun()
    await job.ended()
    other = Job()
    async with trainer_rig.trainer(without, patient, run_queued=other):
        await other.begun()


def broken(objects: ObjectStore, manifest: StoredObject) -> StoredObject:
    """Returns the manifest of a bundle whose first training image has a box outside."""
    content = json.loads(objects.get(manifest))
    entry = content["splits"]["train"]["ground_truth"]
    truth = json.loads(objects.get(StoredObject(**entry)))
    truth["annotations"][0]["bbox"][0] = 1e6
    stored = objects.put("broken-truth", json.dumps(truth).encode())
    entry |= {"key": stored.key, "size_bytes": stored.size_bytes, "sha256": stored.sha256}
    return objects.put("broken-manifest", json.dumps(content).encode())


@pytest.mark.slow
@pytest.mark.parametrize("job", [run_job])
async def test_bad_label_is_named_hours_before_the_turn_of_the_training(
    rig: Rig, first: Puppet
) -> None:
    objects = ObjectStore(rig.settings.store_url)
    manifest = broken(objects, write_bundle(objects, {"train": 8, "val": 4, "test": 1}))
    rig.versions.by_name[VERSION].manifest.CopyFrom(manifest)
    bad = await rig.start(batch_size=4, hyperparameters={"image_size": 64})
    failed = await rig.until_state(bad.name, State.FAILED)
    error = from_status(failed.failure.status)
    assert error.reason == "BAD_LABELS"
    assert error.violations[0].field == "train/00000001.jpg, box 1"

    async def all_is_cleared() -> bool:
        return not list((rig.settings.data_dir / "jobs").glob("*"))

    await eventually(all_is_cleared)


# --- without a service


@pytest.fixture
async def db(make_database: Callable[[str], Awaitable[Database]]) -> Database:
    return await make_database("trainer")


async def insert(conn: Connection, version: str = "v1") -> str:
    plan = domain.Plan(
        project="p",
        version=version,
        model="yolov8n",
        batch_size=8,
        epochs=1,
        hyperparameters={},
        manifest=MANIFEST,
    )
    return (
        await trainings.insert_training(conn, training_id=new_id(), request_id="", plan=plan)
    ).id


async def claim(db: Database, owner: str, lease: datetime.timedelta = LEASE) -> Claim | None:
    async with db.transaction() as conn:
        return await preflight_claims.claim_preflight(conn, owner, lease, AT_ONCE)


async def test_of_many_trainers_one_tries_a_training(db: Database) -> None:
    async with db.transaction() as conn:
        one, two = await insert(conn, "v1"), await insert(conn, "v2")
    claims = await asyncio.gather(*(claim(db, f"owner {number}") for number in range(8)))
    claims += [await claim(db, f"late {number}") for number in range(2)]
    assert sorted(c.training.id for c in claims if c is not None) == [one, two]


async def test_claim_of_a_dead_trainer_runs_out_and_what_it_finds_late_is_nothing(
    db: Database,
) -> None:
    async with db.transaction() as conn:
        training_id = await insert(conn)
    dead = await claim(db, "dead", AT_ONCE)
    second = await claim(db, "second")
    assert dead is not None and second is not None
    async with db.transaction() as conn:
        assert not await preflight_claims.renew_lease(conn, dead, LEASE)
        assert await preflight_claims.settle_passed(conn, dead, FOUND) is None
        assert await preflight_claims.settle_failed(conn, dead, failure(BAD_LABELS)) is None
        await preflight_claims.put_off(conn, dead, AT_ONCE, "late")
        assert await preflight_claims.renew_lease(conn, second, LEASE)
        # It is stopped and queued again while the second still tries it.
        await trainings.stop_queued(conn, training_id, domain.StopMode.PAUSE)
        assert not await preflight_claims.renew_lease(conn, second, LEASE)
        await trainings.resume_training(conn, training_id)
        assert not await preflight_claims.renew_lease(conn, second, LEASE)
        assert await preflight_claims.settle_failed(conn, second, failure(BAD_LABELS)) is None
        training = await trainings.get_training(conn, training_id)
    assert training is not None
    assert (training.state, training.preflight, training.revision) == (domain.State.QUEUED, None, 3)
    third = await claim(db, "third")
    assert third is not None
    async with db.transaction() as conn:
        passed = await preflight_claims.settle_passed(conn, third, FOUND)
    assert passed is not None and passed.preflight == FOUND
    assert await claim(db, "fourth") is None


async def test_training_whose_try_never_ends_well_is_left_to_its_turn(db: Database) -> None:
    async with db.transaction() as conn:
        await insert(conn)
    for number in range(preflight_claims.MAX_TRIES):
        assert await claim(db, f"owner {number}", AT_ONCE) is not None
    assert await claim(db, "one more") is None


async def test_what_a_killed_preflight_has_stored_is_deleted_after_a_while(
    db: Database, store: ObjectStore
) -> None:
    patient, hasty = Sweeper(db, store), Sweeper(db, store, try_seconds=0)
    store.put("preflight/left.pt", b"x")
    for sweeper in (patient, patient, hasty):
        await sweeper.sweep()
    assert list(store.list("preflight")) == ["preflight/left.pt"]
    store.put("preflight/new.pt", b"x")
    await hasty.sweep()
    assert list(store.list("preflight")) == ["preflight/new.pt"]
