"""What becomes of a training that runs out of memory: real processes, no training."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from detflow.events import Bus
from detflow.settings import Settings
from detflow.v1 import common_pb2
from detflow.v1.training_pb2 import STOP_MODE_PAUSE
from services.trainer.executors import Executor
from services.trainer.executors.local import LocalExecutor
from tests import trainer_rig
from tests.trainer_rig import PUPPET, Rig, State, rig

__all__ = ["rig"]


def reason(failure: common_pb2.Failure) -> str:
    info = error_details_pb2.ErrorInfo()
    failure.status.details[0].Unpack(info)
    return str(info.reason)


async def log_lines(rig: Rig, name: str) -> list[str]:
    events = await rig.events(name.rsplit("/", 1)[1])
    return [line for event in events for line in event.log.lines]


async def test_training_goes_on_from_its_checkpoint_with_half_as_many_images(rig: Rig) -> None:
    training, first = await rig.running(batch_size=16)
    assert (training.step_batch_size, first.hello["spec"]["stepBatchSize"]) == (16, 16)
    for epoch in range(1, 4):
        await first.epoch(epoch)
    await first.out_of_memory()
    second = await rig.puppet()
    assert (second.attempt, second.hello["checkpoint"]) == (2, 3)
    told = second.hello["spec"]
    assert (told["batchSize"], told["stepBatchSize"]) == (16, 8)
    assert told["hyperparameters"]["nominal_batch_size"] == 16
    assert await log_lines(rig, training.name) == [
        "out of memory at 16 images per step: goes on from epoch 4 with 8, accumulated to 16"
    ]
    events = await rig.events(training.name.rsplit("/", 1)[1])
    changed = [event.training for event in events if event.training.step_batch_size == 8]
    assert State.Name(changed[0].state) == "QUEUED"
    assert reason(changed[0].failure) == "OUT_OF_MEMORY"


async def test_running_out_of_memory_is_no_crash_and_ends_with_a_remedy(rig: Rig) -> None:
    training = await rig.start(batch_size=32)
    sizes = []
    for _ in range(6):  # more often than a training may crash
        puppet = await rig.puppet()
        sizes.append(puppet.hello["spec"]["stepBatchSize"])
        await puppet.out_of_memory()
    assert sizes == [32, 16, 8, 4, 2, 1]
    failed = await rig.until_state(training.name, State.FAILED)
    assert reason(failed.failure) == "OUT_OF_MEMORY"
    message = failed.failure.status.message
    assert "even with one image" in message
    assert "image_size=640" in message and "smaller model" in message
    async with rig.db.connection() as conn:
        assert await conn.fetchval("select max(num_restarts) from training") == 0


async def test_pause_asked_for_is_what_running_out_of_memory_ends_in(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.tell(ignore_sigterm=True)
    await rig.stop(training.name, STOP_MODE_PAUSE)
    await puppet.out_of_memory()
    paused = await rig.until_state(training.name, State.PAUSED)
    assert paused.step_batch_size == 16


@pytest.fixture
async def killing_rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    """A trainer on a machine whose kernel counts kills where the test writes."""

    def make_executor(settings: Settings) -> Executor:
        tests = Path(trainer_rig.__file__).parent
        environ = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"}
        return LocalExecutor(settings, command=PUPPET, environ=environ, root=tmp_path)

    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("oom_kill 1\n")
    async with contextlib.AsyncExitStack() as stack:
        yield await stack.enter_async_context(
            trainer_rig.running(
                bus=bus,
                nats_url=nats_url,
                database_url=await make_database_url("trainer"),
                folder=tmp_path,
                make_executor=make_executor,
            )
        )


async def test_worker_killed_by_the_system_for_memory_has_run_out_of_it(
    killing_rig: Rig, tmp_path: Path
) -> None:
    training, first = await killing_rig.running()
    await first.epoch(1)
    await killing_rig.until_epochs(training.name, 1)
    (tmp_path / "proc/vmstat").write_text("oom_kill 2\n")
    first.kill()
    second = await killing_rig.puppet()
    assert second.hello["spec"]["stepBatchSize"] == 8
    again = await killing_rig.get(training.name)
    assert reason(again.failure) == "OUT_OF_MEMORY"
    assert "killed" in again.failure.status.message
    second.kill()  # and now nothing was counted
    third = await killing_rig.puppet()
    assert third.hello["spec"]["stepBatchSize"] == 8
    assert reason((await killing_rig.get(training.name)).failure) == "WORKER_DIED"
