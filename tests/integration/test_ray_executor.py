"""Workers as jobs of a Ray cluster, here of one node; tests/cluster has more of them."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format

from detflow.errors import FailedPrecondition, InvalidArgument
from detflow.events import Bus
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.worker_pb2 import WorkerRecord, WorkerSpec
from services.trainer.__main__ import make_executor
from services.trainer.executors import Devices
from services.trainer.executors.ray import RayExecutor
from tests import ray_rig
from tests.ray_rig import Cluster
from tests.shapes_bundle import spec_json, write_bundle

TINY = {"image_size": 64, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_rig.cluster() as made:
        made.add_node(num_cpus=2)
        yield made


@pytest.fixture
async def executor(
    cluster: Cluster, bus: Bus, nats_url: str, store: ObjectStore
) -> AsyncIterator[RayExecutor]:
    settings = Settings(
        nats_url=nats_url,
        store_url=store.url,
        data_dir=cluster.folder / "data",
        executor="ray",
        ray_address=cluster.dashboard,
    )
    made = await make_executor(settings)
    assert isinstance(made, RayExecutor)
    yield made


@pytest.fixture
def spec(store: ObjectStore) -> Callable[..., WorkerSpec]:
    manifest = write_bundle(store, {"train": 14, "val": 4, "test": 2})

    def make(epochs: int, training_id: str = "t1") -> WorkerSpec:
        text = spec_json(
            manifest,
            epochs=epochs,
            hyperparameters=TINY,
            batchSize=7,
            training=f"projects/p/versions/v/trainings/{training_id}",
        )
        return json_format.Parse(text, WorkerSpec())

    return make


@pytest.mark.slow
async def test_job_runs_to_its_end_once_and_its_last_lines_are_kept(
    executor: RayExecutor, spec: Callable[..., WorkerSpec], bus: Bus, cluster: Cluster
) -> None:
    assert (executor.slots.num_cpu, executor.slots.num_nodes) == (1, 1)
    worker = await executor.start(spec(1), Devices())
    again = await executor.start(spec(1), Devices())
    assert worker.job_id == again.job_id
    assert await executor.list_leftovers() == [("t1", 1)]
    async with asyncio.timeout(120):
        end = await worker.wait()
    assert end.code == 0, end.last_lines
    last = await bus.last_message("DETFLOW_RECORDS", "detflow.records.t1.1")
    assert last is not None
    assert WorkerRecord.FromString(last.data or b"").WhichOneof("what") == "finished"
    for one in (worker, again):
        await one.close()
    assert await executor.list_leftovers() == []
    assert not list((cluster.folder / "data" / "trainings").glob("*/*"))


@pytest.mark.slow
async def test_stopped_and_discarded_jobs_end_and_are_forgotten(
    executor: RayExecutor, spec: Callable[..., WorkerSpec], bus: Bus
) -> None:
    started = asyncio.Event()

    async def on_record(message: object) -> None:
        started.set()

    subscription = await bus.subscribe("detflow.records.t2.1", on_record)
    worker = await executor.start(spec(1000, "t2"), Devices())
    async with asyncio.timeout(90):
        await started.wait()
        await worker.terminate(1.0)
        end = await worker.wait()
    assert end.code != 0
    await worker.close()
    assert await executor.list_leftovers() == []
    await executor.start(spec(1000, "t3"), Devices())
    assert await executor.list_leftovers() == [("t3", 1)]
    assert not await executor.is_abandoned("t3", 1)
    await executor.discard("t3", 1)
    assert await executor.list_leftovers() == []
    await executor.discard("t3", 1)
    await subscription.unsubscribe()


@pytest.mark.slow
async def test_what_the_cluster_does_not_have_is_not_started(
    executor: RayExecutor, spec: Callable[..., WorkerSpec]
) -> None:
    with pytest.raises(OSError, match="no 2 machines with 1 cpu slots"):
        await executor.start(spec(1), Devices(num_nodes=2))


async def test_cluster_that_is_away_has_no_slots_and_takes_nothing(tmp_path: Path) -> None:
    settings = Settings(
        store_url=f"file://{tmp_path}", executor="ray", ray_address="http://127.0.0.1:9"
    )
    executor = await make_executor(settings)
    assert (executor.slots.num_cpu, executor.slots.num_gpu, executor.slots.num_nodes) == (0, 0, 0)
    assert await executor.list_leftovers() == []
    await executor.discard("t1", 1)
    with pytest.raises(OSError):
        await executor.start(WorkerSpec(training="t1", attempt=1), Devices())


async def test_settings_that_name_no_executor_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InvalidArgument, match="must be local or ray, not 'slurm'"):
        await make_executor(Settings(executor="slurm"))
    with pytest.raises(InvalidArgument, match="set DETFLOW_RAY_ADDRESS"):
        await make_executor(Settings(executor="ray"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'detflow\[ray\]'"):
        await make_executor(Settings(executor="ray", ray_address="http://127.0.0.1:9"))
