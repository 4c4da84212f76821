"""Whose turn it is, at which place the others wait, and on what devices each is carried out."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import pytest

from detflow import channels
from detflow.errors import FailedPrecondition, InvalidArgument, NotFound
from detflow.events import Bus
from detflow.names import new_id
from detflow.postgres import Connection, Database
from detflow.v1 import trainer_pb2, trainer_pb2_grpc, training_pb2
from services.trainer import domain, ownership, queue, store
from services.trainer.executors import Slots
from services.trainer.queue import Room
from tests import trainer_rig
from tests.trainer_players import MANIFEST, Puppet
from tests.trainer_rig import FAST, Rig, State

ONE_CPU = Slots(num_cpu=1)


class MakeRig(Protocol):
    def __call__(
        self, num_slots: int = 1, num_gpu_slots: int = 0
    ) -> AbstractAsyncContextManager[Rig]: ...


@pytest.fixture
def make_rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> MakeRig:
    @contextlib.asynccontextmanager
    async def make(num_slots: int = 1, num_gpu_slots: int = 0) -> AsyncIterator[Rig]:
        async with trainer_rig.running(
            bus=bus,
            nats_url=nats_url,
            database_url=await make_database_url("trainer"),
            folder=tmp_path,
            num_slots=num_slots,
            num_gpu_slots=num_gpu_slots,
        ) as one:
            yield one

    return make


@pytest.fixture
async def rig(make_rig: MakeRig) -> AsyncIterator[Rig]:
    async with make_rig() as one:
        yield one


async def queued(
    rig: Rig, project: str, version: str, priority: int = 0, num_devices: int = 1, **values: str
) -> str:
    """Starts a training of a version of its own; returns its name."""
    parent = f"projects/{project}/versions/{version}"
    rig.versions.put(parent)
    started = await rig.start(
        parent=parent,
        priority=priority,
        resources=training_pb2.Resources(num_devices_per_node=num_devices),
        hyperparameters=values,
    )
    return started.name


async def busy(rig: Rig, project: str = "filler") -> Puppet:
    """Fills the only slot."""
    name = await queued(rig, project, f"{project}-busy")
    puppet = await rig.puppet()
    assert puppet.training == name
    return puppet


async def order(rig: Rig, first: Puppet, number: int) -> list[str]:
    """Ends one worker after the other; returns whose turn came."""
    names = []
    for _ in range(number):
        await first.finish()
        first = await rig.puppet()
        names.append(first.training)
    return names


async def test_higher_priority_goes_first_and_then_the_oldest(rig: Rig) -> None:
    first = await busy(rig)
    low, middle, other, high = [
        await queued(rig, "p", f"v{number}", priority)
        for number, priority in enumerate((-5, 0, 0, 100))
    ]
    places = [(await rig.get(name)).queue_position for name in (low, middle, other, high)]
    assert places == [4, 2, 3, 1]
    assert await order(rig, first, 4) == [high, middle, other, low]
    assert (await rig.get(low)).queue_position == 0


async def test_project_with_the_fewest_attempts_under_way_goes_first(make_rig: MakeRig) -> None:
    async with make_rig(num_slots=2) as rig:
        big = [await queued(rig, "big", f"b{number}") for number in range(4)]
        first, second = await rig.puppet(), await rig.puppet()
        small = await queued(rig, "small", "s")
        # Two of `big` are under way, so the newcomer is before those that came earlier.
        listed = await rig.list_trainings(parent="projects/big/versions/-")
        assert [t.queue_position for t in reversed(listed.trainings)] == [0, 0, 2, 3]
        assert (await rig.get(small)).queue_position == 1
        await first.finish()
        assert (await rig.puppet()).training == small
        await second.finish()
        assert (await rig.puppet()).training == big[2]


async def test_places_alternate_between_projects_as_their_turns_will_come(rig: Rig) -> None:
    first = await busy(rig)
    big = [await queued(rig, "big", f"b{number}") for number in range(3)]
    small = await queued(rig, "small", "s")
    names = [big[0], small, big[1], big[2]]
    assert [(await rig.get(name)).queue_position for name in names] == [1, 2, 3, 4]
    await first.finish()
    second = await rig.puppet()
    assert second.training == big[0]
    assert [(await rig.get(name)).queue_position for name in (small, *big[1:])] == [1, 2, 3]


async def test_changed_priority_moves_a_training_that_waits(rig: Rig) -> None:
    first = await busy(rig)
    older, newer = await queued(rig, "p", "v1"), await queued(rig, "p", "v2")
    changed = await rig.update(newer, 7)
    assert (changed.priority, changed.queue_position, changed.revision) == (7, 1, 1)
    assert (await rig.get(older)).queue_position == 2
    events = await rig.events(newer.rsplit("/", 1)[1])
    assert [event.training.priority for event in events] == [0, 7]
    assert await order(rig, first, 2) == [newer, older]


async def test_priority_cannot_be_changed_wrongly(rig: Rig) -> None:
    first = await busy(rig)
    waiting = await queued(rig, "p", "v1")
    for priority in (-101, 101):
        with pytest.raises(InvalidArgument):
            await rig.update(waiting, priority)
    with pytest.raises(InvalidArgument) as caught:
        await rig.update(waiting, 1, "priority", "epochs")
    assert caught.value.reason == "BAD_FIELD_MASK"
    assert "epochs" in caught.value.message and "priority" in caught.value.message
    for name in ("", "projects/p", f"{waiting}/x"):
        with pytest.raises(InvalidArgument) as caught:
            await rig.update(name, 1)
        assert caught.value.reason == "BAD_RESOURCE_NAME"
    with pytest.raises(NotFound):
        await rig.update(f"{waiting}x", 1)
    with pytest.raises(FailedPrecondition) as refused:
        await rig.update(first.training, 1)
    assert refused.value.reason == "TRAINING_NOT_QUEUED"
    assert (await rig.get(waiting)).priority == 0


async def test_watcher_of_a_training_that_waits_is_told_each_new_place(rig: Rig) -> None:
    first = await busy(rig)
    ahead, watched = await queued(rig, "p", "v1"), await queued(rig, "p", "v2")
    places: list[int] = []
    async with asyncio.timeout(20), contextlib.aclosing(rig.watch(watched)) as stream:
        async for item in stream:
            if item.HasField("training") and item.training.state == State.PROVISIONING:
                break
            if item.HasField("training"):
                places.append(item.training.queue_position)
            elif item.HasField("progress"):
                assert (item.progress.stage, item.progress.attempt) == ("queue", 0)
                places.append(item.progress.queue_position)
            if places == [2]:
                await queued(rig, "p", "v3", priority=1)
            elif places[-1] == 3:
                await rig.update(watched, 2)
            elif places[-1] == 1:
                await first.finish()
    # The places when the watch began may be told again.
    assert list(dict.fromkeys(places)) == [2, 3, 1]
    assert (await rig.get(ahead)).state == State.QUEUED


async def test_worker_sees_the_gpus_it_was_given_and_no_other(make_rig: MakeRig) -> None:
    async with make_rig(num_slots=1, num_gpu_slots=3) as rig:
        pair = await queued(rig, "p", "pair", num_devices=2)
        two = await rig.puppet()
        assert two.training == pair
        assert two.hello["spec"]["resources"] == {"numNodes": 1, "numDevicesPerNode": 2}
        await queued(rig, "p", "auto")
        one = await rig.puppet()
        await queued(rig, "p", "cpu", device="cpu")
        none = await rig.puppet()
        assert [puppet.hello["gpus"] for puppet in (two, one, none)] == ["0,1", "2", ""]
        assert "resources" not in one.hello["spec"]
        waiting = await queued(rig, "p", "cuda", device="cuda")
        await one.finish()
        again = await rig.puppet()
        assert (again.training, again.hello["gpus"]) == (waiting, "2")


async def test_training_with_many_devices_is_not_overtaken_by_smaller_ones(
    make_rig: MakeRig,
) -> None:
    async with make_rig(num_slots=2) as rig:
        await queued(rig, "p", "a")
        first = await rig.puppet()
        large = await queued(rig, "p", "large", num_devices=2)
        small = await queued(rig, "q", "small", priority=-1)
        assert (await rig.get(large)).queue_position == 1
        await first.finish()
        second = await rig.puppet()  # the free slot was kept for it
        assert second.training == large
        await second.finish()
        assert (await rig.puppet()).training == small


async def test_device_that_the_trainer_does_not_have_is_refused(rig: Rig) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await rig.start_with(device="cuda")
    assert caught.value.reason == "NO_SUCH_DEVICE"
    with pytest.raises(FailedPrecondition) as caught:
        await queued(rig, "p", "many", num_devices=2)
    assert caught.value.reason == "TOO_MANY_DEVICES"


async def test_training_is_not_resumed_to_wait_for_devices_that_are_gone(
    make_rig: MakeRig,
) -> None:
    async with make_rig(num_gpu_slots=1) as rig:
        name = await queued(rig, "p", "v", device="cuda")
        await rig.puppet()
        await rig.stop(name, training_pb2.STOP_MODE_PAUSE)
        await rig.until_state(name, State.PAUSED)
        without = dataclasses.replace(rig.settings, num_gpu_slots=0)
        async with trainer_rig.trainer(without) as address, channels.channel(address) as channel:
            stub = trainer_pb2_grpc.TrainerServiceStub(channel)
            with pytest.raises(FailedPrecondition) as caught, channels.translate():
                await stub.ResumeTraining(trainer_pb2.ResumeTrainingRequest(name=name))
        assert caught.value.reason == "NO_SUCH_DEVICE"
        assert (await rig.resume(name)).state == State.QUEUED


# --- without a service


@pytest.fixture
async def db(make_database: Callable[[str], Awaitable[Database]]) -> Database:
    return await make_database("trainer")


async def insert(conn: Connection, project: str, version: str, num_devices: int = 1) -> str:
    training = await store.insert_training(
        conn,
        training_id=new_id(),
        request_id="",
        plan=domain.Plan(
            project=project,
            version=version,
            model="yolov8n",
            batch_size=8,
            epochs=1,
            hyperparameters={},
            manifest=MANIFEST,
            num_devices_per_node=num_devices,
        ),
    )
    return training.id


async def test_trainer_passes_over_what_it_can_never_carry_out(db: Database) -> None:
    small = Room(devices=("cpu", "auto"), num_nodes=1, num_slots=1, num_free=1)
    async with db.transaction() as conn:
        large = await insert(conn, "p", "v1", num_devices=4)
        other = await insert(conn, "p", "v2")
        claim = await ownership.claim_training(conn, "small", FAST.lease_interval, small)
        assert claim is not None and claim.training.id == other
        four = Room(devices=("cpu", "auto"), num_nodes=1, num_slots=4, num_free=3)
        assert await ownership.claim_training(conn, "four", FAST.lease_interval, four) is None
        four = Room(devices=("cpu", "auto"), num_nodes=1, num_slots=4, num_free=4)
        claim = await ownership.claim_training(conn, "four", FAST.lease_interval, four)
        assert claim is not None and claim.training.id == large


async def test_finding_a_place_takes_time_in_proportion_to_the_queue(db: Database) -> None:
    fastest = {}
    for first, last in ((1, 1000), (1001, 10_000)):
        async with db.transaction() as conn:
            await conn.execute(
                """
                insert into training (id, project, version, state, model, batch_size, epochs,
                                      hyperparameters, manifest, step_batch_size, priority)
                select 't' || lpad(n::text, 5, '0'), 'p' || n % 100, 'v' || n, 'QUEUED', 'yolov8n',
                       1, 1, '{"device": "auto"}', '', 1, n % 3
                from generate_series($1::int, $2) n
                """,
                first,
                last,
            )
        async with db.connection() as conn:
            await conn.execute("analyze training")
            seconds = []
            for _ in range(7):
                began = time.perf_counter()
                one = await queue.list_waiting(conn, ONE_CPU, ["t00500"])
                seconds.append(time.perf_counter() - began)
            everything = await queue.list_waiting(conn, ONE_CPU)
        assert everything["t00500"] == one["t00500"]
        places = sorted(waiting.position for waiting in everything.values())
        assert places == list(range(1, last + 1))
        fastest[last] = min(seconds)
    # Ten times as many: ten times as long, and not a hundred times. Seconds would test the machine.
    assert fastest[10_000] < 40 * fastest[1000]
