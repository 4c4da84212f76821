"""What becomes of a training when its worker, its owner or its version goes: real processes die."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest
from google.protobuf import json_format
from google.rpc import code_pb2, error_details_pb2

from detflow.errors import FailedPrecondition, NotFound
from detflow.events import Bus
from detflow.store import ObjectStore
from detflow.v1 import common_pb2, metrics_pb2, training_pb2, worker_pb2
from detflow.v1.training_pb2 import (
    STOP_MODE_DISCARD,
    STOP_MODE_FINISH,
    STOP_MODE_PAUSE,
)
from services.trainer.attempt import Deadlines
from services.trainer.stall import Patience
from tests import trainer_puppet, trainer_rig
from tests.trainer_players import PROJECT, VERSION, Puppet
from tests.trainer_rig import FAST, Rig, State, eventually


class MakeRig(Protocol):
    def __call__(
        self, deadlines: Deadlines = FAST, num_slots: int = 1
    ) -> AbstractAsyncContextManager[Rig]: ...


@pytest.fixture
def make_rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> MakeRig:
    @contextlib.asynccontextmanager
    async def make(deadlines: Deadlines = FAST, num_slots: int = 1) -> AsyncIterator[Rig]:
        async with trainer_rig.running(
            bus=bus,
            nats_url=nats_url,
            database_url=await make_database_url("trainer"),
            folder=tmp_path,
            deadlines=deadlines,
            num_slots=num_slots,
        ) as one:
            yield one

    return make


@pytest.fixture
async def rig(make_rig: MakeRig) -> AsyncIterator[Rig]:
    async with make_rig() as one:
        yield one


def reason(failure: common_pb2.Failure) -> str:
    info = error_details_pb2.ErrorInfo()
    failure.status.details[0].Unpack(info)
    return str(info.reason)


def id_of(name: str) -> str:
    return name.rsplit("/", 1)[1]


def is_running(pid: int) -> bool:
    """Says whether a process runs; a zombie does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


async def until_gone(pid: int) -> None:
    """Waits for the end of a process that is not our child."""

    async def gone() -> bool:
        return not is_running(pid)

    await eventually(gone)


async def publish_record(rig: Rig, name: str, attempt: int, seq: int, **what: Any) -> None:
    """Writes a record as the worker of an attempt does."""
    record = json_format.ParseDict(what, worker_pb2.WorkerRecord())
    record.training, record.attempt, record.seq = name, attempt, seq
    await rig.bus.publish_durable(
        f"detflow.records.{id_of(name)}.{attempt}",
        record.SerializeToString(),
        {"Nats-Msg-Id": f"{id_of(name)}/{attempt}/{seq}"},
    )


async def ask_lease(rig: Rig, name: str, attempt: int) -> worker_pb2.LeaseResponse:
    request = worker_pb2.LeaseRequest(attempt=attempt).SerializeToString()
    reply = await rig.bus.request(f"detflow.lease.{id_of(name)}", request, 5)
    return worker_pb2.LeaseResponse.FromString(reply)


# --- the worker dies


async def test_killed_worker_is_followed_by_an_attempt_from_the_last_checkpoint(rig: Rig) -> None:
    training, first = await rig.running()
    await first.epoch(1)
    await first.epoch(2)
    await first.tell(print="about to learn epoch 3")
    await rig.until_epochs(training.name, 2)
    first.kill()
    second = await rig.puppet()
    assert (second.attempt, second.hello["checkpoint"]) == (2, 2)
    again = await rig.get(training.name)
    assert reason(again.failure) == "WORKER_DIED"
    assert "signal 9" in again.failure.status.message
    assert "about to learn epoch 3" in again.failure.status.message
    assert not first.folder.exists()
    await second.started()
    await second.epoch(3)
    await second.finish()
    await rig.evaluate_both(training.name, attempt=2)
    done = await rig.until_state(training.name, State.SUCCEEDED)
    assert (done.num_epochs_done, done.attempt) == (3, 2)
    assert not done.HasField("failure")
    events = await rig.events(id_of(training.name))
    assert [e.epoch.epoch for e in events if e.HasField("epoch")] == [1, 2, 3]
    assert await rig.history(id_of(training.name)) == [
        *("QUEUED", "PROVISIONING", "RUNNING"),
        *("QUEUED", "PROVISIONING", "RUNNING", "EVALUATING", "SUCCEEDED"),
    ]
    revisions = [e.training.revision for e in events if e.HasField("training")]
    assert revisions == list(range(1, 9))


async def test_records_and_leases_of_a_stale_attempt_are_rejected(rig: Rig) -> None:
    training, first = await rig.running()
    await first.epoch(1)
    await rig.until_epochs(training.name, 1)
    first.kill()
    second = await rig.puppet()
    epoch = {"metrics": {"attempt": 1, "epoch": 2, "values": {"lr": 9}}}
    await publish_record(rig, training.name, 1, 3, epoch=epoch)
    await publish_record(rig, training.name, 1, 4, failed={"failure": {"status": {"code": 3}}})
    assert (await ask_lease(rig, training.name, 1)).fenced
    assert not (await ask_lease(rig, training.name, 2)).fenced
    assert (await ask_lease(rig, f"{VERSION}/trainings/none", 1)).fenced
    await second.started()
    await second.epoch(2, lr=0.5)
    await rig.until_epochs(training.name, 2)
    events = await rig.events(id_of(training.name))
    epochs = [(e.epoch.epoch, e.epoch.attempt) for e in events if e.HasField("epoch")]
    assert epochs == [(1, 1), (2, 2)]


async def test_steps_of_the_attempt_under_way_become_events_and_bad_blocks_are_put_aside(
    rig: Rig,
) -> None:
    training, first = await rig.running()

    def block(attempt: int, first_step: int, *numbers: int) -> dict[str, Any]:
        columns = [{"name": f"c{n}", "values": [0.5] * number} for n, number in enumerate(numbers)]
        return {
            **{"attempt": attempt, "epoch": 1, "firstStep": first_step, "numSteps": 4},
            "columns": columns,
        }

    bad = [block(1, 1), block(1, 1, 2, 1), block(1, 1, 0), block(1, 0, 2), block(1, 4, 2)]
    for seq, one in enumerate([block(1, 1, 2, 2), *bad], start=2):
        await publish_record(rig, training.name, 1, seq, steps=one)
    await publish_record(rig, training.name, 1, 8, steps=block(1, 3, 2))
    await publish_record(
        rig, training.name, 1, 9, epoch={"metrics": {"attempt": 1, "epoch": 1, "values": {"lr": 1}}}
    )
    await rig.until_epochs(training.name, 1)
    first.kill()
    second = await rig.puppet()
    await publish_record(rig, training.name, 1, 10, steps=block(1, 1, 4))
    await second.started()
    await second.epoch(2)
    await rig.until_epochs(training.name, 2)
    events = await rig.events(id_of(training.name))
    told = [(e.steps.attempt, e.steps.first_step) for e in events if e.HasField("steps")]
    assert told == [(1, 1), (1, 3)]


async def test_records_out_of_order_and_doubled_are_applied_once_in_order(rig: Rig) -> None:
    training, puppet = await rig.running()
    for seq in (4, 3, 2, 3, 4, 2):
        epoch = {"metrics": {"attempt": 1, "epoch": seq - 1, "values": {"lr": 1}}}
        await puppet.tell(record={"epoch": epoch, "seq": seq})
    await rig.until_epochs(training.name, 3)
    events = await rig.events(id_of(training.name))
    assert [e.epoch.epoch for e in events if e.HasField("epoch")] == [1, 2, 3]


async def test_record_that_contradicts_itself_is_put_aside_and_later_ones_flow(rig: Rig) -> None:
    training, puppet = await rig.running()
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def on_dead(msg: Any) -> None:
        lost.set_result(msg.subject)

    await rig.bus.subscribe("detflow.dead.>", on_dead)
    await publish_record(rig, training.name, 1, 0, started={})
    assert await asyncio.wait_for(lost, 30) == "detflow.dead.trainer-records"
    await puppet.epoch(1)
    await rig.until_epochs(training.name, 1)


async def test_records_after_one_that_was_put_aside_flow_in_their_order(rig: Rig) -> None:
    training, puppet = await rig.running()
    epochs = {
        seq: {"metrics": {"attempt": 1, "epoch": seq - 1, "values": {"lr": 1}}} for seq in (2, 4, 5)
    }
    await puppet.tell(record={"epoch": epochs[5], "seq": 5})  # out of order too
    await puppet.tell(record={"epoch": epochs[2], "seq": 2})
    other = {"metrics": {"attempt": 9, "epoch": 2}}  # contradicts the record that it is in
    await publish_record(rig, training.name, 1, 3, epoch=other)
    await rig.until_epochs(training.name, 1)
    await puppet.tell(record={"epoch": epochs[4], "seq": 4})
    await rig.until_epochs(training.name, 4)
    events = await rig.events(id_of(training.name))
    assert [e.epoch.epoch for e in events if e.HasField("epoch")] == [1, 3, 4]


async def test_fourth_crash_fails_and_a_resume_counts_again(rig: Rig) -> None:
    training = await rig.start()
    for attempt in range(1, 5):
        puppet = await rig.puppet()
        assert puppet.attempt == attempt
        await puppet.tell(print=f"crash {attempt}", exit=7)
    failed = await rig.until_state(training.name, State.FAILED)
    assert failed.attempt == 4
    info = error_details_pb2.ErrorInfo()
    failed.failure.status.details[0].Unpack(info)
    assert info.reason == "WORKER_DIED"
    assert dict(info.metadata) == {"attempt": "4", "exit_code": "7", "last_lines": "crash 4"}
    resumed = await rig.resume(training.name)
    assert not resumed.HasField("failure")
    (await rig.puppet()).kill()
    assert (await rig.puppet()).attempt == 6


async def test_worker_that_exits_with_0_without_results_has_died(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.tell(exit=0)
    second = await rig.puppet()
    again = await rig.get(second.training)
    assert training.name == second.training
    assert "exited with 0" in again.failure.status.message


async def test_failure_that_repeats_fails_at_once_and_one_that_may_pass_is_retried(
    rig: Rig,
) -> None:
    training, first = await rig.running()
    await first.failed(code_pb2.RESOURCE_EXHAUSTED, "out of memory")
    second = await rig.puppet()
    assert second.attempt == 2
    await second.failed(code_pb2.INVALID_ARGUMENT, "no boxes in the training split")
    failed = await rig.until_state(training.name, State.FAILED)
    assert failed.failure.status.message == "no boxes in the training split"
    assert failed.HasField("end_time")
    await until_gone(second.pid)


async def test_unreadable_checkpoint_is_given_up_for_the_one_before(rig: Rig) -> None:
    training, first = await rig.running()
    await first.epoch(1)
    await first.epoch(2)
    await rig.until_epochs(training.name, 2)
    first.kill()
    second = await rig.puppet()
    assert second.hello["checkpoint"] == 2
    await second.failed(code_pb2.DATA_LOSS, "checkpoint-000002.pt is torn")
    third = await rig.puppet()
    assert third.hello["checkpoint"] == 1
    assert (await rig.get(training.name)).num_epochs_done == 1
    await third.failed(code_pb2.DATA_LOSS, "checkpoint-000001.pt is torn")
    fourth = await rig.puppet()
    assert fourth.hello["checkpoint"] == 0
    await fourth.failed(code_pb2.DATA_LOSS, "a shard of the bundle is gone")
    await rig.until_state(training.name, State.FAILED)


async def test_checkpoint_inside_an_epoch_is_gone_on_from_and_counts_no_epoch(rig: Rig) -> None:
    training, first = await rig.running()
    await first.epoch(1)
    await first.step(1, 50)
    await first.step(1, 100)
    await first.log("stored")
    await until_stored(rig, 3)
    first.kill()
    second = await rig.puppet()
    checkpoint = second.hello["spec"]["checkpoint"]
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 100)
    assert (await rig.get(training.name)).num_epochs_done == 1
    await second.failed(code_pb2.DATA_LOSS, "it is torn")
    third = await rig.puppet()
    assert third.hello["spec"]["checkpoint"]["step"] == 50
    await third.started()
    await third.epoch(2)
    await rig.until_epochs(training.name, 2)
    events = await rig.events(id_of(training.name))
    assert [e.epoch.epoch for e in events if e.HasField("epoch")] == [1, 2]
    third.kill()
    assert "step" not in (await rig.puppet()).hello["spec"]["checkpoint"]


async def until_stored(rig: Rig, number: int) -> None:
    """Waits until so many records of checkpoints were applied, deleted ones included."""

    async def are_stored() -> bool:
        async with rig.db.connection() as conn:
            last: int = await conn.fetchval("select max(last_seq) from attempt")
        return last >= number + 2  # the start before them, and a log line after

    await eventually(are_stored)


async def test_outdated_checkpoints_are_deleted_and_all_after_success(
    rig: Rig, tmp_path: Path
) -> None:
    objects = ObjectStore(rig.settings.store_url)
    training, puppet = await rig.running()
    for number in range(1, 5):
        key = f"trainings/{training.name}/1/checkpoint-{number:06d}.pt"
        await asyncio.to_thread(objects.put, key, b"x")
        await puppet.epoch(number)

    def left() -> list[str]:
        return sorted(path.name for path in (tmp_path / "store").rglob("*.pt"))

    async def two_are_left() -> bool:
        return left() == ["checkpoint-000003.pt", "checkpoint-000004.pt"]

    async def none_is_left() -> bool:
        return left() == []

    await eventually(two_are_left)
    await puppet.finish()
    await rig.evaluate_both(training.name)
    await eventually(none_is_left)


@pytest.mark.parametrize(
    ("mode", "state", "kept"),
    [
        (STOP_MODE_DISCARD, State.STOPPED, []),
        (STOP_MODE_PAUSE, State.PAUSED, ["checkpoint-000001.pt"]),
    ],
)
async def test_stopped_training_leaves_no_object_but_checkpoints_to_resume_from(
    rig: Rig,
    mode: "training_pb2.StopMode.ValueType",
    state: "training_pb2.Training.State.ValueType",
    kept: list[str],
) -> None:
    objects = ObjectStore(rig.settings.store_url)
    training, puppet = await rig.running()
    own = f"trainings/{id_of(training.name)}/1"
    neighbours = {
        f"trainings/{id_of(training.name)}/10/checkpoint-000001.pt",
        "trainings/other/1/best.pt",
        "bundles/some/manifest.json",
        "exports/some/model.onnx",
    }
    names = ("checkpoint-000001.pt", "checkpoint-000002.pt", "best.pt", "predictions-val.parquet")
    for key in (*neighbours, *(f"{own}/{name}" for name in names)):
        await asyncio.to_thread(objects.put, key, b"x")
    # Of what else it has stored the worker can tell nobody any more.
    stored = trainer_puppet.stored(f"{own}/checkpoint-000001.pt")
    checkpoint = {"epoch": 0, "step": 5, "object": stored}
    await puppet.tell(record={"epoch": {"checkpoint": checkpoint}})
    await puppet.log("stored")
    await until_stored(rig, 1)
    await rig.stop(training.name, mode)
    await rig.until_state(training.name, state)

    async def only_these_are_left() -> bool:
        return set(objects.list("")) == neighbours | {f"{own}/{name}" for name in kept}

    await eventually(only_these_are_left)


async def test_stalled_worker_is_killed_and_replaced(make_rig: MakeRig) -> None:
    impatient = dataclasses.replace(FAST, patience=Patience(first_step=1.0))
    async with make_rig(impatient) as rig:
        training, first = await rig.running()
        await first.tell(ignore_sigterm=True)
        first.kill(signal.SIGSTOP)
        second = await rig.puppet()
        assert second.attempt == 2
        assert not is_running(first.pid)
        failure = (await rig.get(training.name)).failure
        assert reason(failure) == "STALLED"
        await rig.stop(training.name, STOP_MODE_DISCARD)
        await rig.until_state(training.name, State.STOPPED)


async def test_worker_that_never_starts_to_train_is_replaced(make_rig: MakeRig) -> None:
    impatient = dataclasses.replace(FAST, patience=Patience(provisioning=2.5))
    async with make_rig(impatient) as rig:
        training = await rig.start()
        assert [(await rig.puppet()).attempt for _ in range(4)] == [1, 2, 3, 4]
        failed = await rig.until_state(training.name, State.FAILED)
        assert reason(failed.failure) == "STALLED"
        assert "starting" in failed.failure.status.message


async def test_pause_ends_a_worker_that_ignores_it_within_seconds(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.tell(ignore_sigterm=True)
    await rig.stop(training.name, STOP_MODE_PAUSE)
    async with asyncio.timeout(5):
        await rig.until_state(training.name, State.PAUSED)
    assert not is_running(puppet.pid)


async def test_slots_bound_the_workers_and_evaluating_frees_one(make_rig: MakeRig) -> None:
    async with make_rig(num_slots=2) as rig:
        names = []
        for number in range(4):
            parent = f"{PROJECT}/versions/w{number}"
            rig.versions.put(parent)
            names.append((await rig.start(parent=parent)).name)
        first, second = await rig.puppet(), await rig.puppet()
        assert {first.training, second.training} == set(names[:2])
        assert (await rig.get(names[2])).state == State.QUEUED
        await first.finish()  # nobody measures it, and yet
        third = await rig.puppet()
        assert third.training == names[2]
        assert (await rig.get(first.training)).state == State.EVALUATING


# --- evaluation


async def test_failed_evaluation_fails_the_training_with_its_reason(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.finish()
    await rig.predictions[id_of(training.name), 1].wait()
    await rig.evaluate(training.name, common_pb2.SPLIT_VAL)
    await rig.evaluate(training.name, common_pb2.SPLIT_TEST, state=metrics_pb2.Evaluation.FAILED)
    failed = await rig.until_state(training.name, State.FAILED)
    assert failed.failure.status.message == "predictions are gone"


async def test_missing_evaluation_fails_the_training_in_the_end(make_rig: MakeRig) -> None:
    async with make_rig(dataclasses.replace(FAST, evaluation=1.0)) as rig:
        training, puppet = await rig.running()
        await puppet.finish()
        failed = await rig.until_state(training.name, State.FAILED)
        assert reason(failed.failure) == "EVALUATION_MISSING"


async def test_one_split_measured_twice_is_not_both(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.finish()
    await rig.predictions[id_of(training.name), 1].wait()
    await rig.evaluate(training.name, common_pb2.SPLIT_VAL)
    await rig.evaluate(training.name, common_pb2.SPLIT_VAL)
    await rig.evaluate(training.name, common_pb2.SPLIT_TEST, attempt=9)
    await rig.evaluate(training.name, common_pb2.SPLIT_TEST)
    await rig.until_state(training.name, State.SUCCEEDED)


@pytest.mark.parametrize(
    ("mode", "state"),
    [(STOP_MODE_PAUSE, State.PAUSED), (STOP_MODE_DISCARD, State.STOPPED)],
)
async def test_stop_while_predictions_are_measured_ends_at_once(
    rig: Rig,
    mode: "training_pb2.StopMode.ValueType",
    state: "training_pb2.Training.State.ValueType",
) -> None:
    training, puppet = await rig.running()
    await puppet.finish()
    await rig.predictions[id_of(training.name), 1].wait()
    await rig.stop(training.name, mode)
    ended = await rig.until_state(training.name, state)
    assert ended.weights.key == "best.pt"


# --- the owner dies or leaves


@pytest.fixture
async def other_process(rig: Rig) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Starts a second trainer, in a process of its own."""
    processes: list[asyncio.subprocess.Process] = []

    async def start() -> asyncio.subprocess.Process:
        folder = Path(trainer_rig.__file__).parent
        settings = rig.settings
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(folder / "trainer_rig.py"),
            env={
                **os.environ,
                "PYTHONPATH": f"{folder}:{folder.parent}",
                "DETFLOW_DATABASE_URL": settings.database_url,
                "DETFLOW_NATS_URL": settings.nats_url,
                "DETFLOW_STORE_URL": settings.store_url,
                "DETFLOW_VERSION_ADDRESS": settings.version_address,
                "DETFLOW_DATA_DIR": str(settings.data_dir),
                "DETFLOW_DRAIN_SECONDS": "1",
                "DETFLOW_ACCESS": "open",
            },
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def occupied(rig: Rig) -> Puppet:
    """Fills the only slot of the trainer in this process."""
    rig.versions.put(f"{PROJECT}/versions/filler")
    await rig.start(parent=f"{PROJECT}/versions/filler")
    return await rig.puppet()


async def test_trainer_started_on_the_same_machine_leaves_a_living_attempt_alone(rig: Rig) -> None:
    training, puppet = await rig.running()
    leftover = rig.settings.data_dir / "trainings" / "zzz" / "1"  # looked at after the training's
    leftover.mkdir(parents=True)

    async def all_are_settled() -> bool:
        return not leftover.exists()

    async with rig.replica():
        await eventually(all_are_settled)
        async with rig.db.connection() as conn:
            held = await conn.fetchval(
                "select lease_expire_time > now() from training where id = $1", id_of(training.name)
            )
        assert held and (await rig.get(training.name)).attempt == 1
    await puppet.finish()
    await rig.evaluate_both(training.name)
    assert (await rig.until_state(training.name, State.SUCCEEDED)).attempt == 1


async def test_killed_trainer_takes_its_worker_along_and_another_takes_over(
    rig: Rig, other_process: Callable[[], Awaitable[Any]]
) -> None:
    filler = await occupied(rig)
    training = await rig.start()
    other = await other_process()
    first = await rig.puppet()
    await first.started()
    await first.epoch(1)
    await rig.until_epochs(training.name, 1)
    other.kill()
    await until_gone(first.pid)
    filler.kill()  # its next attempt queues behind: the oldest goes first
    puppets = [await rig.puppet()]
    if puppets[0].training != training.name:
        await puppets[0].finish()
        puppets.append(await rig.puppet())
    second = puppets[-1]
    assert (second.training, second.attempt) == (training.name, 2)
    assert second.hello["checkpoint"] == 1
    failure = (await rig.get(training.name)).failure
    assert reason(failure) == "TRAINER_DIED"
    assert not first.folder.exists()


async def test_trainer_that_dies_while_predictions_are_measured_costs_no_attempt(
    rig: Rig, other_process: Callable[[], Awaitable[Any]]
) -> None:
    await occupied(rig)
    training = await rig.start()
    other = await other_process()
    puppet = await rig.puppet()
    await puppet.started()
    await puppet.finish()
    await rig.predictions[id_of(training.name), 1].wait()
    await rig.evaluate(training.name, common_pb2.SPLIT_VAL)
    query = """
        select val_evaluated, training.owner, lease_expire_time > now() as held
        from training join attempt on training_id = id where id = $1
    """

    async def row() -> Any:
        async with rig.db.connection() as conn:
            return await conn.fetchrow(query, id_of(training.name))

    async def val_is_in() -> bool:
        return bool((await row())["val_evaluated"])

    await eventually(val_is_in)
    before = await row()
    other.kill()

    async def is_adopted() -> bool:
        now = await row()
        return bool(now["owner"] != before["owner"] and now["held"])

    await eventually(is_adopted)
    await rig.evaluate(training.name, common_pb2.SPLIT_TEST)
    done = await rig.until_state(training.name, State.SUCCEEDED)
    assert done.attempt == 1


async def test_trainer_that_drains_gives_its_training_back_without_counting_a_crash(
    rig: Rig, other_process: Callable[[], Awaitable[Any]]
) -> None:
    filler = await occupied(rig)
    training = await rig.start()
    other = await other_process()
    first = await rig.puppet()
    await first.started()
    await first.epoch(1)
    await rig.until_epochs(training.name, 1)
    other.terminate()
    assert await asyncio.wait_for(other.wait(), 20) == 0
    assert not is_running(first.pid)
    assert (await rig.get(training.name)).state == State.QUEUED
    async with rig.db.connection() as conn:
        restarts = await conn.fetchval(
            "select num_restarts from training where id = $1", id_of(training.name)
        )
    assert restarts == 0
    await filler.finish()
    second = await rig.puppet()
    assert (second.attempt, second.hello["checkpoint"]) == (2, 1)
    assert not (await rig.get(training.name)).HasField("failure")


async def test_folders_of_dead_attempts_are_removed_at_start(rig: Rig) -> None:
    leftover = rig.settings.data_dir / "trainings" / "gone" / "3"
    leftover.mkdir(parents=True)
    (leftover / "spec.json").write_text("{}")

    async def is_removed() -> bool:
        return not leftover.parent.exists()

    async with rig.replica():
        await eventually(is_removed)


# --- the version goes


async def test_deleted_version_stops_its_training_and_refuses_others(rig: Rig) -> None:
    training, puppet = await rig.running()
    await rig.version_event("deleted", 2)
    stopped = await rig.until_state(training.name, State.STOPPED)
    assert stopped.stop_mode == STOP_MODE_DISCARD
    assert not is_running(puppet.pid)
    with pytest.raises(NotFound):
        await rig.start()
    await rig.version_event("undeleted", 3)
    await rig.version_event("deleted", 2)  # late and doubled

    async def starts_again() -> bool:
        with contextlib.suppress(NotFound):
            await rig.start()
            return True
        return False

    await eventually(starts_again)
    assert (await rig.puppet()).attempt == 1


async def test_paused_training_of_a_deleted_version_cannot_be_resumed(rig: Rig) -> None:
    training, _ = await rig.running()
    await rig.stop(training.name, STOP_MODE_PAUSE)
    await rig.until_state(training.name, State.PAUSED)
    rig.versions.put(f"{PROJECT}/versions/w")
    live = await rig.start(parent=f"{PROJECT}/versions/w")
    await rig.version_event("deleted", 2)
    await rig.version_event("deleted", 2, f"{PROJECT}/versions/w")  # is applied after the first
    await rig.until_state(live.name, State.STOPPED)
    with pytest.raises(FailedPrecondition) as caught:
        await rig.resume(training.name)
    assert caught.value.reason == "VERSION_DELETED"
    assert (await rig.get(training.name)).state == State.PAUSED


async def test_version_deleted_while_a_start_asks_for_it_starts_nothing(rig: Rig) -> None:
    rig.versions.put(f"{PROJECT}/versions/w")
    marker = await rig.start(parent=f"{PROJECT}/versions/w")

    async def delete() -> None:
        rig.versions.before_answer = None
        await rig.version_event("deleted", 2)
        await rig.version_event("deleted", 2, f"{PROJECT}/versions/w")
        await rig.until_state(marker.name, State.STOPPED)

    rig.versions.before_answer = delete
    with pytest.raises(NotFound):
        await rig.start()
    assert not (await rig.list_trainings()).trainings


async def test_finish_survives_a_crash(rig: Rig) -> None:
    training, first = await rig.running()
    await first.epoch(1)
    await rig.stop(training.name, STOP_MODE_FINISH)
    first.kill()
    second = await rig.puppet()
    assert (await second.tell(lease={}))["stop"] == STOP_MODE_FINISH
    await second.finish()
    await rig.evaluate_both(training.name, attempt=2)
    await rig.until_state(training.name, State.STOPPED)
