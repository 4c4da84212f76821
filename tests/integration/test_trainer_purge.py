"""What the trainer keeps of purged versions: nothing, and no byte less of the others."""

from collections.abc import Awaitable, Callable

import pytest
from obstore.exceptions import GenericError

from detflow.events import Delivered
from detflow.names import new_id
from detflow.postgres import Connection, Database
from detflow.store import ObjectStore
from detflow.v1 import events_pb2, export_pb2
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import WarmStart
from services.trainer import exports
from services.trainer import store as sql
from services.trainer.consumer import on_version
from services.trainer.domain import Plan, State, Training
from services.trainer.sweep import Sweeper
from tests.trainer_players import MANIFEST

MakeDatabase = Callable[[str], Awaitable[Database]]


class Unreliable(ObjectStore):
    """An object store that does not answer every other time."""

    num_calls = 0

    def delete(self, key: str) -> None:
        self.num_calls += 1
        if self.num_calls % 2:
            raise GenericError("away")
        super().delete(key)


@pytest.fixture
async def db(make_database: MakeDatabase) -> Database:
    return await make_database("trainer")


async def train(
    db: Database, version: str, state: State, warm_start: StoredObject | None = None
) -> Training:
    """Makes a training that is in a state in which nothing runs, or QUEUED."""
    async with db.transaction() as conn:
        training = await sql.insert_training(
            conn,
            training_id=new_id(),
            request_id="",
            plan=Plan(
                project="p",
                version=version,
                model="yolov8n",
                batch_size=1,
                epochs=1,
                hyperparameters={},
                manifest=MANIFEST,
                warm_start=WarmStart(training="t") if warm_start else None,
                warm_start_weights=warm_start,
            ),
        )
        await conn.execute("update training set state = $2 where id = $1", training.id, state)
    return training


async def tell(conn: Connection, version: str, what: str, seq: int) -> None:
    """Hands over an event of a version."""
    await on_version(
        conn,
        Delivered(
            event_id=new_id(),
            subject="",
            kind="version",
            resource_id=version,
            what=what,
            name="",
            seq=seq,
            stream_seq=seq,
            message=events_pb2.Event(),
            carrier={},
        ),
    )


async def purge(db: Database, version: str) -> None:
    async with db.transaction() as conn:
        await tell(conn, version, "purged", 9)
        await tell(conn, version, "undeleted", 8)  # late, and it means nothing any more


async def left(db: Database) -> set[str]:
    """Ids of the trainings that are there."""
    async with db.connection() as conn:
        return {row["id"] for row in await conn.fetch("select id from training")}


async def test_trainings_of_purged_versions_go_with_all_that_they_stored(
    db: Database, store: ObjectStore
) -> None:
    objects = Unreliable(store.url)
    gone, kept = [await train(db, version, State.SUCCEEDED) for version in ("v1", "v2")]
    keys = {}
    for training in (gone, kept):
        async with db.transaction() as conn:
            export = await exports.insert_export(
                conn,
                export_id=new_id(),
                training_id=training.id,
                training=training.name,
                request_id="",
                options=export_pb2.Export(),
                file_name="model.onnx",
            )
            assert export is not None
        keys[training.id] = {f"trainings/{training.id}/1/{n}" for n in ("a.safetensors", "b")} | {
            f"exports/{export.id}/1/model.onnx"
        }
        for key in keys[training.id]:
            objects.put(key, b"x")

    sweeper = Sweeper(db, objects)
    await purge(db, "v1")
    await sweeper.sweep()
    assert await left(db) == {gone.id, kept.id}  # its export is still to be made
    async with db.transaction() as conn:
        await conn.execute("update export set state = 'FAILED'")
    await sweeper.sweep()
    assert await left(db) == {kept.id}
    for _ in range(5):  # the object store is away now and then
        await sweeper.sweep()
    assert {key for prefix in ("trainings", "exports") for key in objects.list(prefix)} == keys[
        kept.id
    ]
    async with db.connection() as conn:
        assert not await conn.fetchval("select exists (select from garbage)")
        assert await conn.fetchval("select deleted from deleted_version where version = 'v1'")


async def test_weights_stay_while_a_training_of_another_version_may_begin_with_them(
    db: Database, store: ObjectStore
) -> None:
    first = await train(db, "v1", State.SUCCEEDED)
    weights = store.put(f"trainings/{first.id}/1/best.safetensors", b"weights")
    follower = await train(db, "v2", State.PAUSED, weights)
    sweeper = Sweeper(db, store)
    await purge(db, "v1")
    await sweeper.sweep()
    assert store.get(weights) == b"weights"
    async with db.transaction() as conn:
        await conn.execute("update training set state = 'SUCCEEDED' where id = $1", follower.id)
    await sweeper.sweep()
    assert await left(db) == {follower.id}
    assert not store.exists(weights.key)


async def test_live_training_of_a_purged_version_is_stopped_before_it_goes(
    db: Database, store: ObjectStore
) -> None:
    training = await train(db, "v1", State.QUEUED)
    sweeper = Sweeper(db, store)
    async with db.transaction() as conn:
        await conn.execute(
            "update training set state = 'RUNNING', attempt = 1, owner = 'me',"
            " lease_expire_time = now() where id = $1",
            training.id,
        )
    await purge(db, "v1")
    await sweeper.sweep()
    assert await left(db) == {training.id}
    async with db.transaction() as conn:
        stop_mode = await conn.fetchval("select stop_mode from training")
        await conn.execute(
            "update training set state = 'STOPPED', owner = null, lease_expire_time = null"
        )
    assert stop_mode == "DISCARD"
    await sweeper.sweep()
    assert not await left(db)
