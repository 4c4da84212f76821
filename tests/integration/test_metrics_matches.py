"""What is stored of evaluations: read again, replaced, and deleted with what it belongs to."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable

import pytest

from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.tasks import Bell
from detflow.v1.common_pb2 import StoredObject
from services.metrics import garbage
from services.metrics import store as tables
from services.metrics.domain import Evaluation, Job
from services.metrics.evaluator import Evaluator
from services.metrics.garbage import GarbageCollector
from services.metrics.matches import Matches
from services.metrics.measured import MeasuredSplits
from services.metrics.service import to_evaluation
from tests.metrics_fakes import Row, ground_truth, parquet, put_bundle
from tests.metrics_rig import put_evaluation

MakeDatabase = Callable[[str], Awaitable[Database]]
TRAINING = "projects/p/versions/v/trainings/t"
TRUTH = ground_truth(1, 2, [(1, 0, [0, 0, 40, 40], 0)])
ROWS: list[Row] = [(1, 0, 0.75, 0, 0, 40, 40), (1, 1, 0.5, 0, 0, 40, 40)]


@pytest.fixture
async def db(make_database: MakeDatabase) -> Database:
    return await make_database("metrics")


async def evaluation(db: Database) -> Evaluation:
    async with db.connection() as conn:
        training = await tables.get_training(conn, "t")
        assert training is not None
        (found,) = await tables.list_evaluations(conn, training)
    return found


async def collect(db: Database, store: ObjectStore) -> list[str]:
    """Deletes all garbage, also what is due later; returns the keys that are left."""
    async with db.connection() as conn:
        await conn.execute("update garbage set collect_time = now()")
    collector = GarbageCollector(db, store)
    while await collector.collect_one():
        pass
    return sorted(store.list("evaluations"))


async def queue(db: Database, store: ObjectStore, *, attempt: int = 1, rows: list[Row]) -> Job:
    """Queues predictions on the validation split and claims the job."""
    async with db.transaction() as conn:
        await tables.lock_training(conn, training_id="t", project_id="p", name=TRAINING)
        await tables.insert_job(
            conn,
            training_id="t",
            attempt=attempt,
            split="val",
            manifest=put_bundle(store, {"val": TRUTH}).SerializeToString(),
            predictions=store.put(f"{attempt}.parquet", parquet(rows)).SerializeToString(),
            traceparent="",
        )
    async with db.connection() as conn:
        row = await conn.fetchrow("select * from evaluation_job where attempt = $1", attempt)
    assert row is not None
    return Job(
        training=TRAINING,
        **{name: row[name] for name in set(row.keys()) - {"run_after", "create_time"}},
    )


async def until(db: Database, query: str) -> None:
    """Waits until a query answers true."""
    async with asyncio.timeout(40):
        while True:
            async with db.connection() as conn:
                if await conn.fetchval(query):
                    return
            await asyncio.sleep(0)


async def measure_queued(db: Database, store: ObjectStore) -> None:
    """Runs the evaluator until nothing is queued."""
    working = asyncio.create_task(Evaluator(db, store.url, Bell()).run())
    await until(db, "select not exists (select from evaluation_job)")
    working.cancel()
    await asyncio.wait([working])


async def test_measuring_keeps_matches_that_a_repeated_or_newer_one_replaces(
    db: Database, store: ObjectStore
) -> None:
    await queue(db, store, rows=ROWS)
    await measure_queued(db, store)
    first = await evaluation(db)
    assert first.matches is not None and first.manifest is not None
    stored = StoredObject.FromString(first.matches)
    assert stored.key == "evaluations/t/1/val.npz"
    assert Matches.from_bytes(store.get(stored)).truth_N.tolist() == [0, -1]
    manifest = json.loads(store.get(StoredObject.FromString(first.manifest)))
    assert first.ground_truth_sha256 == manifest["splits"]["val"]["ground_truth"]["sha256"]
    assert to_evaluation(first).ground_truth_sha256 == first.ground_truth_sha256
    async with db.connection() as conn:
        assert await conn.fetchval("select count(*) from garbage") == 0

    # What a killed try had stored already is what the next one stores.
    await put_evaluation(db, store, TRAINING.replace("/t", "/u"), TRUTH, ROWS)
    stored.key = "evaluations/u/1/val.npz"
    assert store.get(stored)  # of the same size and hash

    await put_evaluation(db, store, TRAINING, TRUTH, ROWS[:1], attempt=2)
    second = await evaluation(db)
    assert second.attempt == 2
    assert await collect(db, store) == ["evaluations/t/2/val.npz", "evaluations/u/1/val.npz"]


async def test_attempt_that_fails_to_be_measured_leaves_no_matches(
    db: Database, store: ObjectStore
) -> None:
    await put_evaluation(db, store, TRAINING, TRUTH, ROWS)
    await queue(db, store, attempt=2, rows=[(9, 0, 0.5, 0, 0, 1, 1)])
    await measure_queued(db, store)
    found = await evaluation(db)
    assert (found.attempt, found.matches, found.failure is None) == (2, None, False)
    assert await collect(db, store) == []


async def test_purge_deletes_what_its_evaluations_had_stored(
    db: Database, store: ObjectStore
) -> None:
    await put_evaluation(db, store, TRAINING, TRUTH, ROWS)
    await put_evaluation(db, store, TRAINING, TRUTH, ROWS, split="test")
    await put_evaluation(db, store, "projects/p/versions/w/trainings/other", TRUTH, ROWS)
    async with db.transaction() as conn:
        await tables.purge_version(conn, "v")
    collector = GarbageCollector(db, store)
    while await collector.collect_one():
        pass
    assert list(store.list("evaluations")) == ["evaluations/other/1/val.npz"]


async def test_what_is_stored_while_its_version_is_purged_is_deleted(
    db: Database, store: ObjectStore
) -> None:
    job = await queue(db, store, rows=ROWS)
    async with db.transaction() as conn:  # as the evaluator does when it takes a job
        await garbage.mark(conn, job.matches_key, after_seconds=3600)
    async with db.transaction() as conn:
        await tables.purge_version(conn, "v")
    store.put(job.matches_key, b"too late")
    assert not await GarbageCollector(db, store).collect_one()  # it may still be being stored
    assert await collect(db, store) == []


async def test_store_that_is_away_keeps_the_mark(
    db: Database, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("away")
    store = ObjectStore(folder.as_uri())
    store.put("evaluations/t/1/val.npz", b"x")
    async with db.transaction() as conn:
        await garbage.mark(conn, "evaluations/t/1/val.npz")

    class Away(ObjectStore):
        def delete(self, key: str) -> None:
            raise OSError("away")

    with pytest.raises(OSError, match="away"):
        await GarbageCollector(db, Away(store.url)).collect_one()
    assert store.exists("evaluations/t/1/val.npz")
    assert await collect(db, store) == []


async def test_who_stores_again_waits_for_who_deletes(db: Database, store: ObjectStore) -> None:
    key = "evaluations/t/1/val.npz"
    async with db.transaction() as conn:
        await garbage.mark(conn, key)
    deleting, may_end = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(ObjectStore):
        def delete(self, key: str) -> None:
            loop.call_soon_threadsafe(deleting.set)
            asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result()
            super().delete(key)

    async def store_again() -> None:
        async with db.transaction() as conn:
            await garbage.mark(conn, key, after_seconds=3600)
        store.put(key, b"new")

    collecting = asyncio.create_task(GarbageCollector(db, Slow(store.url)).collect_one())
    await deleting.wait()
    storing = asyncio.create_task(store_again())
    await until(db, "select exists (select from pg_locks where not granted)")
    may_end.set()
    await asyncio.gather(collecting, storing)
    assert store.exists(key)


async def test_evaluation_of_an_earlier_release_can_be_read(
    db: Database, store: ObjectStore
) -> None:
    new = await put_evaluation(db, store, TRAINING, TRUTH, ROWS)
    assert new.measurement is not None
    fields = dataclasses.asdict(new.measurement)
    for figures in fields["classes"]:
        for name in set(figures) - {"class_name", "ap50_95", "ap50", "num_ground_truths"}:
            del figures[name]
    async with db.connection() as conn:
        await conn.execute(
            "update evaluation set measurement = $1, ground_truth_sha256 = '', manifest = null,"
            " matches = null, matches_key = null",
            json.dumps(fields),
        )
    old = await evaluation(db)
    assert old.measurement is not None
    assert old.measurement.coco == new.measurement.coco
    message = to_evaluation(old)
    assert [c.class_name for c in message.classes] == ["class 0", "class 1"]
    assert message.classes[0].ap50 == pytest.approx(1.0)
    assert message.classes[0].ap75 == -1.0
    assert not message.classes[0].HasField("best_f1")


async def test_figures_of_classes_are_the_same_after_being_stored(
    db: Database, store: ObjectStore
) -> None:
    stored = await put_evaluation(db, store, TRAINING, TRUTH, ROWS)
    assert (await evaluation(db)).measurement == stored.measurement
    assert stored.measurement is not None
    found, empty = to_evaluation(stored).classes
    areas = [found.ap_small, found.ap_medium, found.ap_large]
    assert areas == pytest.approx([-1.0, 1.0, -1.0])
    assert [found.ap75, found.ar_max100] == pytest.approx([1.0, 1.0])
    assert (found.num_predictions, found.best_f1.f1) == (1, 1.0)
    assert (empty.num_predictions, empty.HasField("best_f1")) == (1, False)


async def test_split_measured_again_while_it_is_read_is_read_anew(
    db: Database, store: ObjectStore
) -> None:
    await put_evaluation(db, store, TRAINING, TRUTH, ROWS)
    loop = asyncio.get_running_loop()

    async def measure_again() -> None:
        await put_evaluation(db, store, TRAINING, TRUTH, ROWS[:1], attempt=2)
        await collect(db, store)

    class Overtaken(ObjectStore):
        def get(self, obj: StoredObject) -> bytes:
            if obj.key == "evaluations/t/1/val.npz":
                asyncio.run_coroutine_threadsafe(measure_again(), loop).result()
            return super().get(obj)

    read = await MeasuredSplits(db, Overtaken(store.url)).read(TRAINING, "val")
    assert (read.evaluation.attempt, len(read.matches.image_N)) == (2, 1)
