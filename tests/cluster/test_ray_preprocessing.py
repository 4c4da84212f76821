"""Bundles made on a Ray cluster of several nodes, also when a node is lost."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from detflow.events import Bus
from detflow.v1 import version_pb2
from tests import ray_rig
from tests.preprocess_rig import PROJECT, PreprocessingState, Rig, running, version_of
from tests.preprocess_samples import jpeg, pack
from tests.ray_rig import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MakeDatabase = Callable[[str], Awaitable[str]]
RECIPE = version_pb2.Recipe(
    split=version_pb2.SplitRatio(train=70, val=20, test=10),
    max_side_px=320,
    augmentations=[version_pb2.AUGMENTATION_ROTATE_90],
)
NUM_IMAGES = 240


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ray_rig.cluster() as made:
        made.add_node(num_cpus=0)
        made.add_node(num_cpus=1)
        made.add_node(num_cpus=1)
        yield made


@pytest.fixture(scope="module")
def archive() -> bytes:
    files: dict[str, bytes] = {"data.yaml": b"names: [a]\n"}
    for number in range(NUM_IMAGES):
        files[f"images/{number}.jpg"] = jpeg(640, 480, seed=number)
        files[f"labels/{number}.txt"] = b"0 0.5 0.5 0.25 0.25\n"
    return pack(files)


async def test_a_cluster_makes_the_same_bytes_also_when_it_loses_a_node(
    cluster: Cluster,
    archive: bytes,
    make_database_url: MakeDatabase,
    nats_url: str,
    bus: Bus,
    tmp_path: Path,
) -> None:
    database_url = await make_database_url("preprocess")
    async with running(database_url, nats_url, bus, tmp_path) as rig:
        dataset = await rig.import_archive(archive)
        local = await rig.preprocess(dataset.name, RECIPE, "local")
    assert local.state == PreprocessingState.SUCCEEDED, local
    async with running(
        database_url,
        nats_url,
        bus,
        tmp_path,
        executor="ray",
        ray_client_address=cluster.client_address,
    ) as rig:
        whole = await rig.preprocess(dataset.name, RECIPE, "whole")
        assert whole.manifest == local.manifest

        await rig.tell("created", version_of(dataset.name, RECIPE, "torn"))
        await _until_shards_are_made(rig, "torn")
        await asyncio.to_thread(cluster.nodes[2].kill)
        responses = await rig.watch_preprocessing(f"{PROJECT}/versions/torn")
        assert responses[-1].preprocessing.manifest == local.manifest, responses[-1]


async def _until_shards_are_made(rig: Rig, version_id: str) -> None:
    """Waits until the first shard is there, and the others are under way."""
    async with asyncio.timeout(60):
        while True:
            async with rig.service.db.connection() as conn:
                number = await conn.fetchval(
                    "select count(*) from shard where version_id = $1", version_id
                )
            if number:
                return
            await asyncio.sleep(0.01)
