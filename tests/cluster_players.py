"""A trainer whose workers run on a Ray cluster, with objects in a bucket: nothing is shared."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from detflow import channels
from detflow.events import Bus
from detflow.local.process import free_port
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1 import trainer_pb2_grpc, training_pb2
from services.trainer.attempt import Deadlines
from services.trainer.executors.ray import RayExecutor
from tests import trainer_rig
from tests.ray_rig import Cluster, Node
from tests.s3_rig import S3
from tests.shapes_bundle import write_bundle
from tests.trainer_players import VERSION
from tests.trainer_rig import Rig

BUCKET = "s3://detflow/cluster"
TINY = {"image_size": 64, "warmup_epochs": 0}
LONG = 1000


class LateExecutor(RayExecutor):
    """Sees no machines, so that its trainer takes nothing on, until it is told to look."""

    may_look = False

    async def refresh(self) -> None:
        if self.may_look:
            await super().refresh()


@contextlib.asynccontextmanager
async def trainer_on(
    cluster: Cluster,
    s3: S3,
    *,
    bus: Bus,
    nats_url: str,
    database_url: str,
    folder: Path,
    make_executor: Callable[[Settings], RayExecutor] | None = None,
) -> AsyncIterator[Rig]:
    """Runs a trainer that trains on a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        manifest = write_bundle(ObjectStore(BUCKET), {"train": 21, "val": 8, "test": 3})
        async with trainer_rig.running(
            bus=bus,
            nats_url=nats_url,
            database_url=database_url,
            folder=folder,
            deadlines=Deadlines(),
            make_executor=make_executor,
            executor="ray",
            ray_address=cluster.dashboard,
            store_url=BUCKET,
            # Not ours: each machine has its own.
            data_dir=cluster.folder / "data",
        ) as rig:
            rig.versions.by_name[VERSION].manifest.CopyFrom(manifest)
            yield rig


@contextlib.asynccontextmanager
async def other_trainer(
    rig: Rig,
) -> "AsyncIterator[tuple[asyncio.subprocess.Process, trainer_pb2_grpc.TrainerServiceAsyncStub]]":
    """Runs one more trainer on the same database, in a process of its own."""
    address = f"127.0.0.1:{free_port()}"
    names = ("database_url", "nats_url", "store_url", "version_address", "executor", "ray_address")
    settings = {f"DETFLOW_{name.upper()}": getattr(rig.settings, name) for name in names}
    settings |= {
        "DETFLOW_LISTEN": address,
        "DETFLOW_NUM_QUEUED_PREFLIGHTS": "0",
        "DETFLOW_ACCESS": "open",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.trainer"),
        env={**os.environ, **settings, "DETFLOW_DATA_DIR": str(rig.settings.data_dir)},
    )
    try:
        async with channels.channel(address) as channel:
            async with asyncio.timeout(60):
                await channel.channel_ready()
            yield process, trainer_pb2_grpc.TrainerServiceStub(channel)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until(
    rig: Rig,
    name: str,
    holds: Callable[[training_pb2.Training], bool],
    seconds: float = 120.0,
) -> training_pb2.Training:
    """Waits until something holds of a training."""
    async with asyncio.timeout(seconds):
        while not holds(training := await rig.get(name)):  # noqa: ASYNC110 - others change it
            await asyncio.sleep(0.2)
        return training


def workers() -> list[psutil.Process]:
    """Finds the processes of workers that a cluster of this test runs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            if (
                "services.trainer.worker" in process.cmdline()
                and process.environ().get("DETFLOW_STORE_URL") == BUCKET
                and process.environ().get("TEST_PROCESS") == str(os.getpid())
            ):
                found.append(process)
    return found


def node_of(process: psutil.Process, cluster: Cluster) -> Node:
    """Finds the node that a process runs on."""
    parents = {parent.pid for parent in process.parents()}
    [node] = [node for node in cluster.nodes if node.process.pid in parents]
    return node


async def until_no_workers(seconds: float = 30.0) -> None:
    """Waits until no worker is left."""
    async with asyncio.timeout(seconds):
        while workers():  # noqa: ASYNC110 - strangers' processes
            await asyncio.sleep(0.2)
