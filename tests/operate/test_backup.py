"""Backups: consistent, incremental, restored whole or not at all."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import obstore
import orjson
import pytest

from detflow import backup
from detflow.backup import Progress, objects, tables
from detflow.deletions import deleting
from detflow.errors import DataLoss, FailedPrecondition, NotFound
from detflow.events import EVENTS_STREAM, Bus
from detflow.postgres import Database
from services.metrics.garbage import GarbageCollector, mark
from tests.installation_rig import Installation, MakeInstallation, make_installation

__all__ = ["make_installation"]


class Broken(Exception):
    """What a test breaks something off with."""


def silent(progress: Progress) -> None:
    """For whoever wants to see nothing."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """URL of the folder of the backups."""
    return (tmp_path / "backups").as_uri()


@pytest.fixture
async def filled(make_installation: MakeInstallation) -> Installation:
    """An installation with rows that have what is hard to copy, and with objects."""
    made = await make_installation(migrated=True)
    for number in range(3):
        await made.add_upload(f"u{number}", bytes([number]) * 100_000)
    await made.execute(
        "version",
        "insert into project (id, display_name) values ('p', E'tab\\t, \\\\, \\n and 한글 🎯')",
    )
    await made.execute(
        "preprocess",
        "insert into dataset (id, project_id, display_name, state, skip_invalid, source_url,"
        " num_boxes_by_class, skipped) values ('d', 'p', 'd', 'READY', false, '', '{1,2}',"
        ' \'[["a\\\\b", "R", "\\n"]]\')',
    )
    await made.execute(
        "preprocess",
        "insert into image (dataset_id, position, path, sha256, width, height, shard_key,"
        " shard_offset, size_bytes, class_ids, boxes) values ('d', 0, 'a', 'b', 1, 1,"
        " 'uploads/u0/0', 0, 1, '{0}', array[0.1, 1e-300, 'infinity', 'nan']::float8[])",
    )
    await made.execute(
        "metrics",
        "insert into training (id, project_id, name, message) values ('t', 'p', 'n', '\\x00ff')",
    )
    return made


async def test_what_is_restored_equals_what_was_backed_up(
    filled: Installation, make_installation: MakeInstallation, folder: str
) -> None:
    seen: list[Progress] = []
    made = await backup.create(filled.system, folder, seen.append)
    assert (made.num_objects, made.num_bytes, made.lost) == (3, 300_000, [])
    assert {(p.step, p.num_steps, p.name) for p in seen} == {
        (1, 2, "database"),
        (2, 2, "objects"),
    }
    assert [p.percent for p in seen if p.step == 2][-1] == 100

    other = await make_installation()
    assert await backup.restore(other.system, folder, silent) == made
    assert repr(await other.rows()) == repr(await filled.rows())  # repr: a nan equals no nan
    assert sorted(other.store.list("")) == sorted(filled.store.list(""))
    for number in range(3):
        assert (await _read(other, f"uploads/u{number}/0")) == bytes([number]) * 100_000
    # The services own what was made, and number on where they were.
    await other.migrate()
    await other.execute("version", "alter table project add column mine int")
    await other.execute("version", "insert into project (id, display_name) values ('q', 'q')")
    [positions] = [
        [row[1] for row in rows]
        for t, rows in (await other.rows()).items()
        if t == "version.project"
    ]
    assert len(set(positions)) == 3


async def test_a_second_backup_copies_only_what_is_new(
    filled: Installation, make_installation: MakeInstallation, folder: str, tmp_path: Path
) -> None:
    first = await backup.create(filled.system, folder, silent)
    await filled.add_upload("u3", b"new")
    filled.store.put("uploads/u1/0", b"replaced")
    second = await backup.create(filled.system, folder, silent)
    copied = tmp_path / "backups" / second.id / "objects"
    assert sorted(p.relative_to(copied).as_posix() for p in copied.rglob("*") if p.is_file()) == [
        "uploads/u1/0",
        "uploads/u3/0",
    ]
    # A row says another hash than the object has by now.
    assert (second.lost, second.num_lost) == (["uploads/u1/0"], 1)
    for made, content in ((first, b"\1" * 100_000), (second, b"replaced")):
        assert (await backup.verify(folder, silent, made.id))[1] == []
        other = await make_installation()
        await backup.restore(other.system, folder, silent, made.id)
        assert await _read(other, "uploads/u1/0") == content
    assert [one.id for one in await backup.list_backups(folder)] == [first.id, second.id]


async def test_nothing_that_the_snapshot_points_to_is_deleted_before_it_is_copied(
    filled: Installation, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = await Database.connect(filled.urls["metrics"], "metrics", max_size=4)
    collector = GarbageCollector(database, filled.store)
    collected: list[bool] = []
    list_objects = objects.list_objects

    async def while_it_runs(url: str) -> dict[str, objects.Listed]:
        async with database.transaction() as conn:
            await mark(conn, "uploads/u2/0")
        collected.append(await collector.collect_one())
        return await list_objects(url)

    monkeypatch.setattr(objects, "list_objects", while_it_runs)
    made = await backup.create(filled.system, folder, silent)
    assert collected == [False]
    assert (made.num_objects, made.num_lost) == (3, 0)
    assert await collector.collect_one()  # it is over
    assert not filled.store.exists("uploads/u2/0")
    await database.close()


async def test_a_backup_waits_for_a_deletion_under_way(filled: Installation, folder: str) -> None:
    database = await Database.connect(filled.urls["metrics"], "metrics", max_size=2)
    async with deleting(database) as allowed:
        assert allowed
        making = asyncio.create_task(backup.create(filled.system, folder, silent))
        async with asyncio.timeout(20), database.connection() as conn:
            while not await conn.fetchval(  # noqa: ASYNC110  # Postgres tells nobody of it
                "select exists (select from pg_locks where locktype = 'advisory' and not granted"
                " and database = (select oid from pg_database where datname = current_database()))"
            ):
                await asyncio.sleep(0.01)
        assert not making.done()
        async with deleting(database) as second:
            assert not second  # or one deletion after the other would keep it waiting
        filled.store.delete("uploads/u2/0")
    made = await making
    assert made.lost == ["uploads/u2/0"]  # its row is still there: the backup says so
    await database.close()


@pytest.mark.parametrize("what", ["objects/uploads/u1/0", "database/version.project.gz"])
async def test_a_damaged_backup_restores_nothing(
    filled: Installation,
    make_installation: MakeInstallation,
    folder: str,
    tmp_path: Path,
    what: str,
) -> None:
    made = await backup.create(filled.system, folder, silent)
    path = tmp_path / "backups" / made.id / what
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert (await backup.verify(folder, silent))[1] == [f"{made.id}/{what}"]
    other = await make_installation()
    with pytest.raises(DataLoss, match=what.rsplit("/", 1)[1]):
        await backup.restore(other.system, folder, silent)
    assert await other.rows() == {}
    assert not other.store.exists("uploads/u1/0") or "objects" not in what


async def test_a_restoration_that_was_broken_off_goes_on(
    filled: Installation, make_installation: MakeInstallation, folder: str
) -> None:
    await backup.create(filled.system, folder, silent)
    other = await make_installation()

    def break_off(progress: Progress) -> None:
        if progress.step == 2 and progress.percent > 0:
            raise Broken

    with pytest.raises(Broken):
        await backup.restore(other.system, folder, break_off)
    assert await other.rows() == {}
    there = list(other.store.list(""))
    assert there
    other.store.put(there[0], b"x" * 100_000)  # torn, but of the right size
    await backup.restore(other.system, folder, silent)
    assert repr(await other.rows()) == repr(await filled.rows())
    for number in range(3):
        assert (await _read(other, f"uploads/u{number}/0")) == bytes([number]) * 100_000


async def test_an_unfinished_backup_is_none(
    filled: Installation, make_installation: MakeInstallation, folder: str, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match="no backup"):
        await backup.restore(filled.system, folder, silent)

    def break_off(progress: Progress) -> None:
        if progress.step == 2:
            raise Broken

    with pytest.raises(Broken):
        await backup.create(filled.system, folder, break_off)
    assert list((tmp_path / "backups").iterdir()) != []
    assert await backup.list_backups(folder) == []
    made = await backup.create(filled.system, folder, silent)
    with pytest.raises(NotFound, match=made.id):
        await backup.restore((await make_installation()).system, folder, silent, "other")


async def test_it_is_restored_into_an_empty_installation_only(
    filled: Installation, make_installation: MakeInstallation, folder: str, bus: Bus, nats_url: str
) -> None:
    await backup.create(filled.system, folder, silent)
    before = repr(await filled.rows())
    with pytest.raises(FailedPrecondition, match="empty database"):
        await backup.restore(filled.system, folder, silent)
    assert repr(await filled.rows()) == before

    other = await make_installation()
    other.store.put("stranger", b"x")
    with pytest.raises(FailedPrecondition, match="stranger"):
        await backup.restore(other.system, folder, silent)
    other.store.delete("stranger")

    await bus.publish_durable("detflow.v1.training.t.state_changed", b"", {})
    reached = dataclasses.replace(other.system, nats_url=nats_url)
    with pytest.raises(FailedPrecondition, match=EVENTS_STREAM):
        await backup.restore(reached, folder, silent)
    assert await other.rows() == {}
    await bus.js.delete_stream(EVENTS_STREAM)
    await backup.restore(reached, folder, silent)


async def test_a_backup_of_a_newer_release_is_refused_before_anything_is_made(
    filled: Installation, make_installation: MakeInstallation, folder: str, tmp_path: Path
) -> None:
    made = await backup.create(filled.system, folder, silent)
    path = tmp_path / "backups" / made.id / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    manifest["release"] = "9.9"
    manifest["schemas"][2]["migrations"].append("trainer/9999_future.sql")
    path.write_bytes(orjson.dumps(manifest))
    other = await make_installation()
    with pytest.raises(FailedPrecondition, match=r"9\.9.*trainer/9999_future"):
        await backup.restore(other.system, folder, silent)
    manifest["format"] = 99
    path.write_bytes(orjson.dumps(manifest))
    with pytest.raises(FailedPrecondition, match=r"9\.9"):
        await backup.restore(other.system, folder, silent)
    path.write_bytes(b"{")
    with pytest.raises(DataLoss, match="damaged"):
        await backup.restore(other.system, folder, silent)


async def test_a_backup_of_an_older_release_gets_the_later_migrations_when_services_start(
    filled: Installation, make_installation: MakeInstallation, folder: str
) -> None:
    # Before its newest migration, the metrics service had no webhooks.
    newest = "metrics/0008_webhook.sql"
    await filled.execute(
        "metrics", "drop table webhook_delivery; drop table webhook_secret; drop table webhook"
    )
    await filled.execute("metrics", "delete from migration where name = $1", newest)
    await backup.create(filled.system, folder, silent)
    other = await make_installation()
    await backup.restore(other.system, folder, silent)
    assert "metrics.webhook" not in await other.rows()
    await other.migrate()
    rows = await other.rows()
    assert rows["metrics.webhook"] == []
    assert ("t", "p", "n") in [row[:3] for row in rows["metrics.training"]]


async def test_a_role_that_is_too_weak_is_told_so(filled: Installation, folder: str) -> None:
    weak = dataclasses.replace(filled.system, database_url=filled.urls["version"])
    with pytest.raises(FailedPrecondition, match="role"):
        await backup.create(weak, folder, silent)


async def test_a_backup_reads_all_services_at_one_moment(
    filled: Installation,
    folder: str,
    make_installation: MakeInstallation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dump = tables.dump

    async def between(conn: Any, schema: str, *others: Any) -> Any:
        made = await dump(conn, schema, *others)
        if schema == "version":
            await filled.execute(
                "metrics", "insert into training (id, project_id, name) values ('late', 'p', 'm')"
            )
        return made

    monkeypatch.setattr(tables, "dump", between)
    await backup.create(filled.system, folder, silent)
    other = await make_installation()
    await backup.restore(other.system, folder, silent)
    assert [row[0] for row in (await other.rows())["metrics.training"]] == ["t"]
    assert len((await filled.rows())["metrics.training"]) == 2


async def _read(installation: Installation, key: str) -> bytes:
    content = await obstore.get_async(installation.store._store, key)
    return bytes(await content.bytes_async())


async def test_rows_that_do_not_fit_their_table_are_told_in_a_sentence(
    filled: Installation, make_installation: MakeInstallation, folder: str
) -> None:
    await filled.execute("version", "alter table project add column of_nobody text")
    await backup.create(filled.system, folder, silent)
    other = await make_installation()
    with pytest.raises(DataLoss, match=r"version\.project\.gz does not fit.*of_nobody"):
        await backup.restore(other.system, folder, silent)
    assert await other.rows() == {}
