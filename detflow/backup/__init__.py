"""Backups of an installation, and restoring one into an empty installation.

A folder or bucket holds any number of backups, each in a folder of its own:

    {id}/database/{schema}.{table}.gz   rows, as COPY writes them
    {id}/objects/{key}                  objects that no earlier backup there has
    {id}/objects.gz                     all objects of the backup, with paths, sizes and SHA-256
    {id}/manifest.json                  written last: without it there is no backup

The order is what makes one consistent. First nobody deletes objects any more (`detflow.deletions`);
then the database is read in one snapshot, of all services; then the objects are copied. Objects are
stored before the rows that point to them and never changed, so whatever the snapshot points to is
there until it is copied. Streams are not backed up: what is in them is in the outboxes, which fill
an empty stream again.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import asyncpg
import obstore
from nats.js.errors import NotFoundError as NoStream

from detflow.backup import objects, references, tables
from detflow.backup.manifest import Manifest, Schema
from detflow.backup.objects import Copied
from detflow.backup.progress import Progress, Report, Step
from detflow.deletions import hold
from detflow.errors import DataLoss, FailedPrecondition, NotFound
from detflow.events import EVENTS_STREAM, RECORDS_STREAM, Bus
from detflow.events import translate as bus_errors
from detflow.names import new_id
from detflow.postgres import MIGRATION_LOCK, translate
from detflow.store import ObjectStore, open_url

if TYPE_CHECKING:
    from asyncpg import Connection, Record

__all__ = ["Manifest", "Progress", "System", "create", "list_backups", "restore", "verify"]

SCHEMAS = ("version", "preprocess", "trainer", "metrics")
_MANIFEST = "manifest.json"
_MAX_LOST = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """An installation, as its operator reaches it.

    Attributes:
        database_url: postgresql:// URL with a role that may read, and for a restoration make,
            the tables of all services.
        store_url: URL of the object store.
        nats_url: nats:// URL; empty where NATS has not been started yet. Only a restoration needs
            it.
    """

    database_url: str
    store_url: str
    nats_url: str = ""


async def create(system: System, folder: str, report: Report) -> Manifest:
    """Backs an installation up; it may be running.

    Args:
        system: The installation.
        folder: URL of the folder or bucket of the backups.
        report: Told how far it is.

    Raises:
        FailedPrecondition: The database is not that of an installation.
        Unavailable: Postgres or an object store is away.
    """
    target = await asyncio.to_thread(ObjectStore, folder)
    earlier = await _newest(folder)
    backup_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{new_id()[-6:]}"
    async with _connected(system.database_url) as holder:
        await hold(holder)
        async with _connected(system.database_url) as conn:
            # No table changes its columns while it is read.
            await conn.execute("select pg_advisory_lock_shared($1)", MIGRATION_LOCK)
            async with conn.transaction(isolation="repeatable_read", readonly=True):
                create_time = await conn.fetchval("select now()")
                schemas = await _dump(conn, target, backup_id, report)
                pointed = [one async for one in references.read(conn, SCHEMAS)]
        wanted = await objects.list_objects(system.store_url)
        before = {} if earlier is None else await _copies(target, folder, earlier)
        step = Step(report, 2, 2, "objects", sum(one.size_bytes for one in wanted.values()))
        copied = await objects.back_up(
            system.store_url, folder, f"{backup_id}/objects", wanted, before, step
        )
        # If the session was lost, objects may have been deleted meanwhile.
        with translate():
            await holder.execute("select 1")
    lost = references.missing(pointed, {one.key: one for one in copied})
    manifest = Manifest(
        id=backup_id,
        create_time=create_time.isoformat(),
        release=importlib.metadata.version("detflow"),
        schemas=schemas,
        objects=await asyncio.to_thread(
            objects.write_list, target, f"{backup_id}/objects.gz", copied
        ),
        num_objects=len(copied),
        num_bytes=sum(one.size_bytes for one in copied),
        lost=lost[:_MAX_LOST],
        num_lost=len(lost),
    )
    await asyncio.to_thread(target.put, f"{backup_id}/{_MANIFEST}", manifest.to_json())
    return manifest


async def restore(system: System, folder: str, report: Report, backup_id: str = "") -> Manifest:
    """Restores a backup, by default the newest, into an installation that was never started.

    The database is committed last: broken off before, it is as empty as it was, and the same
    command goes on with the objects that are there.

    Raises:
        NotFound: There is no such backup.
        FailedPrecondition: NOT_EMPTY: there is something in the installation; NEWER_BACKUP: this
            release does not know the backup's tables.
        DataLoss: A file of the backup is gone or damaged.
    """
    source = await asyncio.to_thread(ObjectStore, folder)
    manifest = await _find(folder, backup_id)
    for schema in manifest.schemas:
        tables.check_known(schema, manifest.release)
    if system.nats_url:
        await _check_no_messages(system.nats_url)
    wanted = await asyncio.to_thread(objects.read_list, source, manifest.objects)
    there = await objects.check_target(system.store_url, wanted)
    async with _connected(system.database_url) as conn, conn.transaction():
        # A service that is started meanwhile waits, and finds its tables made.
        await conn.execute("select pg_advisory_lock($1)", MIGRATION_LOCK)
        await tables.check_empty(conn, SCHEMAS)
        size = sum(table.file.size_bytes for one in manifest.schemas for table in one.tables)
        step = Step(report, 1, 2, "database", size)
        for schema in manifest.schemas:
            await tables.restore(conn, schema, source, step)
        step = Step(report, 2, 2, "objects", manifest.num_bytes)
        await objects.restore(folder, system.store_url, wanted, there, step)
    return manifest


async def verify(folder: str, report: Report, backup_id: str = "") -> tuple[Manifest, list[str]]:
    """Reads a backup whole, by default the newest; returns it and which of its files are bad.

    Raises:
        NotFound: There is no such backup.
        DataLoss: The list of its objects is gone or damaged.
    """
    source = await asyncio.to_thread(ObjectStore, folder)
    manifest = await _find(folder, backup_id)
    files = [table.file for schema in manifest.schemas for table in schema.tables]
    step = Step(report, 1, 2, "database", sum(file.size_bytes for file in files))
    bad = []
    for file in files:
        try:
            await asyncio.to_thread(source.get, file.stored)
        except DataLoss:
            bad.append(file.key)
        step.advance(file.size_bytes)
    wanted = await asyncio.to_thread(objects.read_list, source, manifest.objects)
    step = Step(report, 2, 2, "objects", manifest.num_bytes)
    return manifest, bad + await objects.verify(folder, wanted, step)


async def list_backups(folder: str) -> list[Manifest]:
    """Returns the backups in a folder, oldest first."""
    return [await _read(folder, backup_id) for backup_id in await _list_ids(folder)]


async def _dump(
    conn: Connection[Record], target: ObjectStore, backup_id: str, report: Report
) -> list[Schema]:
    missing = set(SCHEMAS) - {
        row["schemaname"]
        for row in await conn.fetch("select schemaname from pg_tables where tablename='migration'")
    }
    if missing:
        raise FailedPrecondition(
            f"the database has no tables of the {min(missing)} service: check that it is the one"
            " of the installation, and that every service was started once",
            reason="NO_INSTALLATION",
        )
    step = Step(report, 1, 2, "database", await tables.estimate_bytes(conn, SCHEMAS))
    return [
        await tables.dump(conn, schema, target, f"{backup_id}/database", step) for schema in SCHEMAS
    ]


async def _copies(target: ObjectStore, folder: str, earlier: Manifest) -> dict[str, Copied]:
    """Returns what earlier backups have copied, as far as it is still there."""
    listed = await asyncio.to_thread(objects.read_list, target, earlier.objects)
    there = await objects.list_objects(folder)
    return {
        key: one
        for key, one in listed.items()
        if one.path in there and there[one.path].size_bytes == one.size_bytes
    }


async def _check_no_messages(nats_url: str) -> None:
    """Checks that NATS has no events: those of another installation would hide the restored ones.

    Raises:
        FailedPrecondition: NOT_EMPTY.
    """
    bus = await Bus.connect(nats_url, "restore")
    try:
        for stream in (EVENTS_STREAM, RECORDS_STREAM):
            with bus_errors():
                try:
                    info = await bus.js.stream_info(stream)
                except NoStream:
                    continue
            if info.state.last_seq > 0:
                raise FailedPrecondition(
                    f"NATS has had messages in its stream {stream}: restore with an empty NATS, or"
                    " delete the streams DETFLOW_EVENTS, DETFLOW_RECORDS and DETFLOW_DEAD first",
                    reason="NOT_EMPTY",
                )
    finally:
        await bus.close()


@contextlib.asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Connection[Record]]:
    with translate(OSError):
        conn = await asyncpg.connect(
            url, timeout=10, server_settings={"application_name": "detflow-backup"}
        )
    try:
        with translate():
            yield conn
    except asyncpg.InsufficientPrivilegeError as error:
        raise FailedPrecondition(
            f"the role of DETFLOW_DATABASE_URL may not do this: {error}; use one that may act for"
            " the roles of all services",
            reason="ROLE_TOO_WEAK",
        ) from error
    finally:
        conn.terminate()


async def _newest(folder: str) -> Manifest | None:
    found = await _list_ids(folder)
    return await _read(folder, found[-1]) if found else None


async def _find(folder: str, backup_id: str) -> Manifest:
    found = await _list_ids(folder)
    if not found or (backup_id and backup_id not in found):
        what = f"no backup {backup_id}" if backup_id else "no backup"
        raise NotFound(
            f"there is {what} in {folder}" + (f"; there are {', '.join(found)}" if found else "")
        )
    return await _read(folder, backup_id or found[-1])


async def _list_ids(folder: str) -> list[str]:
    """Returns the ids of the backups in a folder, oldest first."""
    with objects.answering(folder):
        store = open_url(folder)
        found = (await obstore.list_with_delimiter_async(store))["common_prefixes"]
    backups = await asyncio.to_thread(ObjectStore, folder)
    return [
        str(one)
        for one in sorted(found)
        if await asyncio.to_thread(backups.exists, f"{one}/{_MANIFEST}")
    ]


async def _read(folder: str, backup_id: str) -> Manifest:
    key = f"{backup_id}/{_MANIFEST}"
    with objects.answering(folder):
        content = await (await obstore.get_async(open_url(folder), key)).bytes_async()
    return Manifest.from_json(bytes(content), key)
