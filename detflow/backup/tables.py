"""The database of a backup: every table of the services by COPY, in one snapshot.

A restoration is one transaction: it makes the tables by the migrations that the backup names,
fills them, and commits once all else is in place. Later migrations are applied by the services
when they start, as in an upgrade.
"""

from __future__ import annotations

import asyncio
import graphlib
import gzip
import importlib.util
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from detflow.backup.manifest import File, Schema, Table
from detflow.backup.progress import Step
from detflow.errors import DataLoss, FailedPrecondition
from detflow.postgres import migration_files
from detflow.store import ObjectStore

if TYPE_CHECKING:
    from asyncpg import Connection, Record

_CHUNK_BYTES = 1 << 20


async def estimate_bytes(conn: Connection[Record], schemas: Sequence[str]) -> int:
    """Returns about how large the tables are on disk."""
    size: int = await conn.fetchval(
        "select coalesce(sum(pg_table_size(c.oid)), 0)::bigint from pg_class c"
        " where c.relkind = 'r' and c.relnamespace::regnamespace::text = any($1::text[])",
        list(schemas),
    )
    return size


async def dump(
    conn: Connection[Record], schema: str, target: ObjectStore, prefix: str, step: Step
) -> Schema:
    """Writes the tables of a schema, as the connection's transaction sees them.

    Args:
        conn: Connection in a repeatable-read transaction.
        schema: Name of the schema.
        target: Where the backup is.
        prefix: What the files' keys begin with.
        step: Advanced by the bytes a table has on disk.
    """
    tables = []
    for name in await _list_tables(conn, schema):
        columns = await _columns(conn, schema, name)
        tables.append(await _dump_table(conn, schema, name, columns, target, prefix))
        step.advance(
            await conn.fetchval("select pg_table_size($1::regclass)", f'"{schema}"."{name}"')
        )
    migrations = await conn.fetch(f'select name from "{schema}".migration order by name')
    sequences = await conn.fetch(
        "select sequencename, last_value from pg_sequences"
        " where schemaname = $1 and last_value is not null",
        schema,
    )
    return Schema(
        name=schema,
        migrations=[row["name"] for row in migrations],
        tables=tables,
        sequences={row["sequencename"]: row["last_value"] for row in sequences},
    )


async def _dump_table(
    conn: Connection[Record],
    schema: str,
    name: str,
    columns: Sequence[str],
    target: ObjectStore,
    prefix: str,
) -> Table:
    with tempfile.TemporaryDirectory(prefix="detflow-backup-") as folder:
        path = Path(folder) / "rows.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:

            async def write(data: bytes) -> None:
                await asyncio.to_thread(file.write, data)

            done = await conn.copy_from_table(
                name, schema_name=schema, columns=list(columns), output=write
            )
        stored = await asyncio.to_thread(target.put, f"{prefix}/{schema}.{name}.gz", path)
    return Table(name=name, columns=columns, num_rows=int(done.split()[-1]), file=File.of(stored))


async def check_empty(conn: Connection[Record], schemas: Sequence[str]) -> None:
    """Checks that services have never used the database.

    Raises:
        FailedPrecondition: NOT_EMPTY: a schema has tables.
    """
    found = await conn.fetchval(
        "select schemaname from pg_tables where schemaname = any($1::text[]) limit 1",
        list(schemas),
    )
    if found is not None:
        raise FailedPrecondition(
            f"the database has tables in the schema {found}: restore into an empty database, in"
            " which detflow was never started",
            reason="NOT_EMPTY",
        )


async def restore(
    conn: Connection[Record], schema: Schema, source: ObjectStore, step: Step
) -> None:
    """Makes the tables of a schema and fills them, in the caller's transaction.

    They belong to whom the schema belongs, so that its service can change them later.

    Raises:
        FailedPrecondition: NEWER_BACKUP: this release lacks a migration of the backup.
        DataLoss: A file of the backup is gone or damaged.
    """
    owner = await conn.fetchval(
        "select nspowner::regrole::text from pg_namespace where nspname = $1", schema.name
    )
    if owner is None:
        await conn.execute(f'create schema "{schema.name}"')
    else:
        await conn.execute(f"set local role {owner}")
    await conn.execute(f'set local search_path = "{schema.name}"')
    await conn.execute(
        "create table migration (name text primary key, apply_time timestamptz not null"
        " default now())"
    )
    for name, path in _migrations(schema.name):
        if name in schema.migrations:
            await conn.execute(await asyncio.to_thread(path.read_text))
    names = ", ".join(f'"{table.name}"' for table in schema.tables)
    await conn.execute(f"truncate {names}")  # of what migrations have put there
    for table in schema.tables:
        await _fill(conn, schema.name, table, source)
        step.advance(table.file.size_bytes)
    for sequence, value in schema.sequences.items():
        await conn.execute(
            "select setval($1::regclass, $2)", f'"{schema.name}"."{sequence}"', value
        )
    await conn.execute("reset role")
    await conn.execute("reset search_path")


def check_known(schema: Schema, release: str) -> None:
    """Checks that this release can make the tables of a backup.

    Raises:
        FailedPrecondition: NEWER_BACKUP.
    """
    unknown = set(schema.migrations) - {name for name, _ in _migrations(schema.name)}
    if unknown:
        raise FailedPrecondition(
            f"the backup was made by detflow {release}, which has the migration {min(unknown)} that"
            " this detflow does not know: restore it with that release or a newer one",
            reason="NEWER_BACKUP",
            metadata={"migration": min(unknown)},
        )


async def _fill(conn: Connection[Record], schema: str, table: Table, source: ObjectStore) -> None:
    with tempfile.TemporaryDirectory(prefix="detflow-restore-") as folder:
        path = Path(folder) / "rows.gz"
        await asyncio.to_thread(source.download, table.file.stored, path)

        async def chunks() -> AsyncIterator[bytes]:
            with gzip.open(path, "rb") as file:
                while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
                    yield chunk

        try:
            done = await conn.copy_to_table(
                table.name, schema_name=schema, columns=list(table.columns), source=chunks()
            )
        except asyncpg.InsufficientPrivilegeError:
            raise
        except (
            asyncpg.DataError,
            asyncpg.SyntaxOrAccessError,
            asyncpg.IntegrityConstraintViolationError,
        ) as error:
            raise DataLoss(
                f"{table.file.key} does not fit its table: {error}", reason="DAMAGED_BACKUP"
            ) from error
    if int(done.split()[-1]) != table.num_rows:
        raise DataLoss(
            f"{table.file.key} has {done.split()[-1]} rows, not {table.num_rows}",
            reason="DAMAGED_BACKUP",
        )


def _migrations(schema: str) -> list[tuple[str, Path]]:
    """Finds the migrations of a service; by its files, for nothing here imports services."""
    found = importlib.util.find_spec(f"services.{schema}")
    if found is None or found.origin is None:
        raise FailedPrecondition(
            f"this installation has no {schema} service, and so not its migrations: restore where"
            " the services are installed",
            reason="NO_SERVICES",
        )
    return migration_files(Path(found.origin).parent / "migrations")


async def _list_tables(conn: Connection[Record], schema: str) -> list[str]:
    """Returns the tables; what a foreign key points to comes first."""
    rows = await conn.fetch("select tablename from pg_tables where schemaname = $1", schema)
    order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter(
        {row["tablename"]: () for row in rows}
    )
    references = await conn.fetch(
        """
        select f.relname as referrer, t.relname as referred from pg_constraint c
        join pg_class f on f.oid = c.conrelid join pg_class t on t.oid = c.confrelid
        where c.contype = 'f' and c.connamespace = $1::regnamespace and f.oid <> t.oid
        """,
        schema,
    )
    for row in references:
        order.add(row["referrer"], row["referred"])
    return list(order.static_order())


async def _columns(conn: Connection[Record], schema: str, table: str) -> list[str]:
    """Returns the columns that hold values of their own, and not what is computed from others."""
    rows = await conn.fetch(
        "select attname from pg_attribute where attrelid = $1::regclass and attnum > 0"
        " and not attisdropped and attgenerated = '' order by attnum",
        f'"{schema}"."{table}"',
    )
    return [row["attname"] for row in rows]
