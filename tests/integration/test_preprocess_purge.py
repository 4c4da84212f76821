"""Purged versions: their bundles' objects go, and none that another version has."""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from obstore.exceptions import GenericError

from detflow import channels
from detflow.errors import NotFound, Unavailable
from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.v1 import dataset_pb2, preprocess_pb2, version_pb2
from services.preprocess import bundle_store as sql
from services.preprocess.bundle import ShardPlan, StoredShard
from services.preprocess.garbage import GarbageCollector
from services.preprocess.pipeline import Pipeline
from services.preprocess.quota import StorageQuota
from tests.preprocess_rig import PROJECT, Rig, rig, until, version_of
from tests.preprocess_samples import pack, yolo_files

__all__ = ["rig"]

MakeDatabase = Callable[[str], Awaitable[Database]]
FLIPPED = version_pb2.Recipe(augmentations=[version_pb2.AUGMENTATION_FLIP_LEFT_RIGHT])


def bundle_keys(store: ObjectStore) -> set[str]:
    """Keys of all objects of bundles."""
    return set(store.list("bundles"))


def objects_of(store: ObjectStore, preprocessing: preprocess_pb2.Preprocessing) -> set[str]:
    """Keys of a bundle's objects, by its manifest."""
    splits = json.loads(store.get(preprocessing.manifest))["splits"].values()
    objects = [o for split in splits for o in (*split["shards"], split["ground_truth"])]
    return {preprocessing.manifest.key, *(o["key"] for o in objects)}


async def purge(rig: Rig, version_id: str, dataset: str, event_id: str = "") -> None:
    version = version_of(dataset, None, version_id)
    version.revision = 9
    await rig.tell("purged", version, event_id)


async def get(rig: Rig, version_id: str) -> preprocess_pb2.Preprocessing:
    request = preprocess_pb2.GetPreprocessingRequest(version=f"{PROJECT}/versions/{version_id}")
    with channels.translate():
        return await rig.preprocessings.GetPreprocessing(request)


async def test_purge_leaves_what_other_versions_have_and_the_last_one_leaves_nothing(
    rig: Rig,
) -> None:
    dataset = (await rig.import_archive(pack(yolo_files(20)))).name
    store = rig.service.store
    of_plain = objects_of(store, await rig.preprocess(dataset, version_pb2.Recipe(), "v1"))
    of_flipped = objects_of(store, await rig.preprocess(dataset, FLIPPED, "v2"))
    assert len(of_plain & of_flipped) >= 4  # shards and ground truth of validation and test

    # What is heard late of a purged version, or twice, means nothing.
    await purge(rig, "v3", dataset)
    await rig.tell("created", version_of(dataset, version_pb2.Recipe(), "v3"))
    await purge(rig, "v1", dataset, "once")
    await purge(rig, "v1", dataset, "twice")
    await until(lambda: bundle_keys(store) == of_flipped)
    assert objects_of(store, await rig.preprocess(dataset, FLIPPED, "v4")) == of_flipped
    for version_id in ("v1", "v3"):
        with pytest.raises(NotFound):
            await get(rig, version_id)

    await purge(rig, "v2", dataset)
    await purge(rig, "v4", dataset)
    await until(lambda: not bundle_keys(store))
    with channels.translate():
        await rig.datasets.DeleteDataset(dataset_pb2.DeleteDatasetRequest(name=dataset))
    await until(lambda: not [*store.list("datasets")])


class Unlimited(StorageQuota):
    """No project has a quota."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, cast(Any, None))

    async def limit(self, project_id: str) -> int:
        return 0


class Unreliable(ObjectStore):
    """An object store that is slow to delete, and now and then fails before or after it did."""

    chance = random.Random(5)

    def delete(self, key: str) -> None:
        luck = self.chance.random()
        time.sleep(luck / 100)
        if luck < 0.1:
            raise GenericError("away")
        super().delete(key)
        if luck > 0.9:
            raise GenericError("away")


async def test_no_object_of_a_live_version_is_lost_and_none_of_a_purged_one_kept(
    make_database: MakeDatabase, store: ObjectStore
) -> None:
    db = await make_database("preprocess")
    unreliable = Unreliable(store.url)
    collectors = [GarbageCollector(db=db, store=unreliable) for _ in range(2)]
    anything = cast(Any, None)
    pipeline = Pipeline(
        db=db, bus=anything, store=store, pool=anything, scratch=anything, quota=Unlimited(db)
    )
    contents = [f"content {number}".encode() for number in range(7)]
    live: dict[str, set[str]] = {}

    async def make(version_id: str, chance: random.Random) -> None:
        """Stores and notes objects as a preprocessing does, until all are there."""
        async with db.transaction() as conn:
            await conn.execute(
                "insert into preprocessing"
                " (version_id, version_name, version_revision, dataset_id, recipe, state, claim)"
                " values ($1, $2, 1, 'd', '', 'RUNNING', 'c')",
                version_id,
                f"projects/p/versions/{version_id}",
            )
        keys = set()
        for position, content in enumerate(chance.sample(contents, 3)):
            kind = "shards" if content in contents[:4] else "ground-truth"
            sha256 = hashlib.sha256(content).hexdigest()
            key = f"bundles/{kind}/{sha256}"
            while True:
                await asyncio.to_thread(store.put_if_absent, key, content)
                await asyncio.sleep(chance.random() / 200)
                try:
                    if kind == "shards":
                        plan = ShardPlan(split="train", position=position, first=0, sources=())
                        shard = StoredShard(key, len(content), sha256, 1)
                        await pipeline._record(
                            f"projects/p/versions/{version_id}", "c", plan, shard
                        )
                    else:
                        await pipeline._use(version_id, "c", key)
                    break
                except Unavailable:
                    continue
            keys.add(key)
        async with db.connection() as conn:
            await conn.execute(
                "update preprocessing set state = 'SUCCEEDED' where version_id = $1", version_id
            )
        live[version_id] = keys

    async def make_and_purge(number: int) -> None:
        chance = random.Random(number)
        for turn in range(6):
            version_id = f"v{number}t{turn}"
            await make(version_id, chance)
            await asyncio.sleep(chance.random() / 50)
            if turn < 5:
                del live[version_id]
                async with db.transaction() as conn:
                    await sql.purge_version(conn, version_id)

    async def collect(collector: GarbageCollector) -> None:
        while True:
            await collector.step()
            for keys in live.copy().values():
                assert all(store.exists(key) for key in keys)
            await asyncio.sleep(0.001)

    collecting = [asyncio.create_task(collect(collector)) for collector in collectors]
    await asyncio.gather(*(make_and_purge(number) for number in range(4)))
    for task in collecting:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for _ in range(30):
        await collectors[0].step()
    used = set().union(*live.values())
    assert bundle_keys(store) == used and len(used) < len(contents) + 1
    for version_id in [*live]:
        async with db.transaction() as conn:
            await sql.purge_version(conn, version_id)
    for _ in range(30):
        await collectors[0].step()
    assert not bundle_keys(store)
