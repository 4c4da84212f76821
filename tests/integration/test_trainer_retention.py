"""What goes of old trainings, and that nothing goes that anything needs."""

import datetime
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from detflow import channels
from detflow.backup import references
from detflow.postgres import Connection, Database
from detflow.store import ObjectStore
from detflow.v1 import trainer_pb2
from detflow.v1.common_pb2 import StoredObject
from services.trainer import exports, retention
from services.trainer.checkpoints import get_newest
from services.trainer.retention import Ages
from services.trainer.sweep import Sweeper
from tests.trainer_rig import Rig, rig

__all__ = ["rig"]

STATES = ("QUEUED", "RUNNING", "EVALUATING", "SUCCEEDED", "FAILED", "STOPPED", "PAUSED")
WEEK = datetime.timedelta(days=7)


@pytest.fixture
async def db(make_database: Callable[[str], Awaitable[Database]]) -> Database:
    return await make_database("trainer")


async def add(
    conn: Connection, store: ObjectStore, training_id: str, state: str, days: float
) -> dict[str, str]:
    """Adds a training that has all it can have; returns the keys of its objects by what it is."""

    def put(key: str) -> bytes:
        return store.put(key, key.encode()).SerializeToString()

    under_way = state in ("RUNNING", "EVALUATING")
    ended = state not in ("QUEUED", "RUNNING", "EVALUATING")
    prefix = f"trainings/{training_id}/1"
    await conn.execute(
        """
        insert into training (id, project, version, state, model, batch_size, epochs,
          hyperparameters, manifest, step_batch_size, attempt, owner, lease_expire_time, end_time,
          weights)
        values ($1, $2, $1, $3, 'yolov8n', 1, 9, '{}', '', 1, 1, $4,
          case when $4::text is null then null else now() + interval '1 hour' end,
          case when $5 then now() - $6::interval end, $7)
        """,
        training_id,
        "p" if int(training_id[1:]) % 2 else "q",
        state,
        "owner" if under_way else None,
        ended,
        datetime.timedelta(days=days),
        put(f"{prefix}/best.pt") if state == "SUCCEEDED" else None,
    )
    for epoch in (1, 2):
        await conn.execute(
            "insert into checkpoint (training_id, epoch, attempt, object, unused)"
            " values ($1, $2, 1, $3, $4)",
            training_id,
            epoch,
            put(f"{prefix}/checkpoint-{epoch}.pt"),
            state in ("SUCCEEDED", "STOPPED"),
        )
    await conn.execute(
        """
        insert into export (id, training_id, training, state, options, file_name, object, end_time)
        values ($1, $2, $2, 'SUCCEEDED', '', 'm.onnx', $3, now() - $4::interval)
        """,
        f"e{training_id}",
        training_id,
        put(f"exports/e{training_id}/1/m.onnx"),
        datetime.timedelta(days=days),
    )
    return {
        "checkpoint": f"{prefix}/checkpoint-2.pt",
        "export": f"exports/e{training_id}/1/m.onnx",
        "weights": f"{prefix}/best.pt" if state == "SUCCEEDED" else "",
    }


async def sweep(db: Database, store: ObjectStore) -> None:
    """Deletes what is marked, as the sweeper and the exporter do."""
    await Sweeper(db, store).sweep()
    async with db.connection() as conn:
        for export in await exports.list_deleted(conn):
            for key in [*store.list(export.folder)]:
                store.delete(key)
            await exports.delete_export(conn, export.id)


@pytest.mark.parametrize("seed", range(6))
async def test_nothing_goes_that_a_row_points_to(
    db: Database, store: ObjectStore, seed: int
) -> None:
    chance = random.Random(seed)
    made: dict[str, tuple[str, float, dict[str, str]]] = {}
    async with db.transaction() as conn:
        for number in range(12):
            state, days = chance.choice(STATES), chance.choice([0.5, 6.9, 7.1, 400.0])
            made[f"t{number}"] = state, days, await add(conn, store, f"t{number}", state, days)
    ages = Ages(checkpoints=chance.choice([None, WEEK]), exports=chance.choice([None, WEEK]))
    project = chance.choice([None, "p"])
    async with db.transaction() as conn:
        purged = await retention.purge(conn, ages, project)
        assert await retention.purge(conn, ages, project) == []
        newest = {one: await get_newest(conn, one) for one in made}  # before the objects are gone
    await sweep(db, store)

    async with db.transaction() as conn:
        pointed = [one async for one in references.read(conn, ["trainer"])]
    for one in pointed:
        assert one.size_bytes is not None and one.sha256 is not None
        store.get(StoredObject(key=one.key, size_bytes=one.size_bytes, sha256=one.sha256))
    gone = {"CHECKPOINT": 0, "EXPORT": 0}
    for training_id, (state, days, keys) in made.items():
        in_scope = days > 7 and (project is None or int(training_id[1:]) % 2 == 1)
        expired = in_scope and ages.checkpoints is not None and state in ("PAUSED", "FAILED")
        kept = not expired and state not in ("SUCCEEDED", "STOPPED")
        assert store.exists(keys["checkpoint"]) == kept
        if state not in ("SUCCEEDED", "STOPPED"):
            assert (newest[training_id] is not None) == kept
        sent = in_scope and ages.exports is not None
        assert store.exists(keys["export"]) != sent
        assert not keys["weights"] or store.exists(keys["weights"])
        gone["CHECKPOINT"] += 2 * expired
        gone["EXPORT"] += sent
    assert gone == {kind: sum(one.num for one in purged if one.kind == kind) for kind in gone}


async def test_a_training_that_is_resumed_meanwhile_keeps_its_checkpoints(
    db: Database, store: ObjectStore
) -> None:
    async with db.transaction() as conn:
        await add(conn, store, "t1", "PAUSED", 400)
    async with db.transaction() as resuming:
        await resuming.execute("select from training where id = 't1' for update")
        async with db.transaction() as conn:
            assert await retention.purge(conn, Ages(checkpoints=WEEK, exports=None), None) == []


async def test_a_dry_run_says_what_would_go_and_deletes_nothing(
    rig: Rig,
) -> None:
    store = ObjectStore(rig.settings.store_url)
    async with rig.db.transaction() as conn:
        keys = await add(conn, store, "t1", "FAILED", 30)

    async def purge(**fields: Any) -> list[tuple[str, int, int]]:
        request = trainer_pb2.PurgeArtifactsRequest(parent="projects/-", **fields)
        with channels.translate():
            answer = await rig.stub.PurgeArtifacts(request)
        kind = trainer_pb2.PurgedArtifacts.Kind
        return [(kind.Name(one.kind), one.num, one.size_bytes) for one in answer.artifacts]

    assert await purge() == []  # the settings keep everything
    old = Duration(seconds=86400)
    expected = [
        ("CHECKPOINT", 2, 2 * len(keys["checkpoint"])),
        ("EXPORT", 1, len(keys["export"])),
    ]
    assert await purge(min_age=old, validate_only=True) == expected
    assert store.exists(keys["checkpoint"]) and store.exists(keys["export"])
    assert await purge(min_age=old, validate_only=True) == expected
    assert await purge(min_age=old) == expected
    assert await purge(min_age=old) == []
