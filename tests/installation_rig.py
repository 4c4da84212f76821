"""The database and object store of an installation that no process uses: made, filled, compared."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import pytest

from detflow.backup import SCHEMAS, System
from detflow.local.postgres import Cluster
from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject

_SERVICES = Path(__file__).parent.parent / "services"
_TEMPLATE = "template_installation"
_numbers = itertools.count(1)

Rows = dict[str, list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Installation:
    """One, stopped.

    Attributes:
        urls: Database URL of each service, with its own role.
        system: The same as its operator reaches it.
        store: Its objects.
    """

    urls: dict[str, str]
    system: System
    store: ObjectStore

    async def execute(self, service: str, statement: str, *values: object) -> None:
        """Runs a statement as a service."""
        conn = await asyncpg.connect(self.urls[service], server_settings={"search_path": service})
        await conn.execute(statement, *values)
        await conn.close()

    async def migrate(self) -> None:
        """Makes the tables, as the services do when they start."""
        for service, url in self.urls.items():
            database = await Database.connect(url, service, max_size=1)
            await database.migrate(_SERVICES / service / "migrations")
            await database.close()

    async def rows(self) -> Rows:
        """Reads everything."""
        conn = await asyncpg.connect(self.system.database_url)
        tables = await conn.fetch(
            "select schemaname, tablename from pg_tables where schemaname = any($1::text[])",
            list(SCHEMAS),
        )
        found = {}
        for schema, table in sorted((row[0], row[1]) for row in tables):
            rows = await conn.fetch(f'select * from "{schema}"."{table}"')
            found[f"{schema}.{table}"] = sorted((tuple(row) for row in rows), key=repr)
        await conn.close()
        return found

    async def add_upload(self, upload_id: str, content: bytes, project: str = "p") -> StoredObject:
        """Adds a received upload, with its bytes in the object store; returns these."""
        stored = await asyncio.to_thread(self.store.put, f"uploads/{upload_id}/0", content)
        await self.execute(
            "preprocess",
            "insert into upload (id, project_id, size_bytes, sha256, state, committed_bytes,"
            " expire_time) values ($1, $2, $3, $4, 'RECEIVED', $3, now() + interval '7 days')",
            upload_id,
            project,
            stored.size_bytes,
            stored.sha256,
        )
        await self.execute(
            "preprocess",
            "insert into upload_part (upload_id, start, size_bytes, sha256, key)"
            " values ($1, 0, $2, $3, $4)",
            upload_id,
            stored.size_bytes,
            stored.sha256,
            stored.key,
        )
        return stored


class MakeInstallation(Protocol):
    """Makes an installation: its roles and schemas, and with `migrated` its tables."""

    async def __call__(self, *, migrated: bool = False) -> Installation: ...


@pytest.fixture
async def make_installation(
    postgres_cluster: Cluster, tmp_path: Path
) -> AsyncIterator[MakeInstallation]:
    """`one = await make_installation()`: one that was never started."""
    admin = await asyncpg.connect(postgres_cluster.url(database="postgres"))
    made: list[str] = []

    async def make(*, migrated: bool = False) -> Installation:
        name = f"installation_{next(_numbers)}"
        if migrated and not await exists(_TEMPLATE):
            template = await create(_TEMPLATE)
            await template.migrate()
        if migrated:
            await admin.execute(f"create database {name} template {_TEMPLATE} strategy file_copy")
        else:
            await create(name)
        made.append(name)
        return at(name)

    async def exists(name: str) -> bool:
        found: bool = await admin.fetchval(
            "select exists (select from pg_database where datname = $1)", name
        )
        return found

    async def create(name: str) -> Installation:
        await admin.execute(f"create database {name}")
        inside = await asyncpg.connect(postgres_cluster.url(database=name))
        for service in SCHEMAS:
            await inside.execute(f"create schema {service} authorization {service}")
        await inside.close()
        return at(name)

    def at(name: str) -> Installation:
        store_url = (tmp_path / name).as_uri()
        return Installation(
            urls={service: postgres_cluster.url(service, name) for service in SCHEMAS},
            system=System(database_url=postgres_cluster.url(database=name), store_url=store_url),
            store=ObjectStore(store_url),
        )

    yield make
    for name in made:
        await admin.execute(f"drop database {name} with (force)")
    await admin.close()
