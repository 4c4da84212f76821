"""Real servers for the tests: one Postgres and one nats-server per session, all else per test.

The shared package is imported inside the fixtures: tests of pure modules need nothing of it.
"""

import itertools
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from detflow.local import nats as local_nats
from detflow.local import postgres as local_postgres

if TYPE_CHECKING:
    from detflow.events import Bus
    from detflow.postgres import Database
    from detflow.store import ObjectStore
    from tests.stack_rig import Stack


REPOSITORY = Path(__file__).parent.parent
_numbers = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def exact_numbers() -> Iterator[None]:
    """Ends with a module what workers turn on: taking the tiniest numbers for zero."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def servers_directory() -> Iterator[Path]:
    """Folder of the session's servers; not pytest's, which keeps three sessions on disk."""
    path = Path(tempfile.mkdtemp(prefix="detflow-tests-"))
    yield path
    shutil.rmtree(path)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(local_postgres.STOP_SIGNAL)
    process.wait(timeout=30)


@pytest.fixture(scope="session")
def postgres_cluster(servers_directory: Path) -> Iterator[local_postgres.Cluster]:
    """A running Postgres of the session, without fsync."""
    cluster = local_postgres.prepare(servers_directory / "postgres", fsync=False)
    process = cluster.start(servers_directory / "postgres.log")
    yield cluster
    _stop(process)


@pytest.fixture(scope="session")
def database_templates() -> set[str]:
    """Services whose migrated template database exists."""
    return set()


@pytest.fixture
async def make_database_url(
    postgres_cluster: local_postgres.Cluster, database_templates: set[str]
) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """`url = await make_database_url("version")`: a fresh migrated database."""
    import asyncpg

    from detflow.postgres import Database

    admin = await asyncpg.connect(postgres_cluster.url(database="postgres"))
    made: list[str] = []

    async def make_template(service: str) -> None:
        template = f"template_{service}"
        if not await admin.fetchval("select true from pg_roles where rolname = $1", service):
            url = postgres_cluster.url(service)
            password = url.split(":")[2].split("@")[0]
            await admin.execute(f"create role {service} login password '{password}'")
        await admin.execute(f"create database {template} owner {service}")
        inside = await asyncpg.connect(postgres_cluster.url(database=template))
        await inside.execute(f"create schema if not exists {service} authorization {service}")
        await inside.close()
        migrations = REPOSITORY / "services" / service / "migrations"
        url = postgres_cluster.url(service, template)
        database = await Database.connect(url, schema=service)
        await database.migrate(migrations)
        await database.close()
        database_templates.add(service)

    async def make(service: str) -> str:
        if service not in database_templates:
            await admin.execute(f"drop database if exists template_{service} with (force)")
            await make_template(service)
        name = f"test_{next(_numbers)}_{service}"
        await admin.execute(
            f"create database {name} template template_{service} strategy file_copy owner {service}"
        )
        made.append(name)
        return postgres_cluster.url(service, name)

    yield make
    for name in made:
        await admin.execute(f"drop database {name} with (force)")
    await admin.close()


@pytest.fixture
async def make_database(
    make_database_url: Callable[[str], Awaitable[str]],
) -> "AsyncIterator[Callable[[str], Awaitable[Database]]]":
    """`db = await make_database("version")`: a connected, fresh, migrated database."""
    from detflow.postgres import Database

    opened: list[Database] = []

    async def make(service: str) -> Database:
        database = await Database.connect(await make_database_url(service), schema=service)
        opened.append(database)
        return database

    yield make
    for database in opened:
        await database.close()


@pytest.fixture(scope="session")
def nats_url(servers_directory: Path) -> Iterator[str]:
    """Address of the session's nats-server, with its token."""
    server = local_nats.prepare(servers_directory / "nats")
    process = server.start(servers_directory / "nats.log")
    yield server.url
    _stop(process)


@pytest.fixture
async def bus(nats_url: str) -> "AsyncIterator[Bus]":
    """A connected Bus whose streams exist and are empty; consumers of earlier tests are gone."""
    from detflow.events import Bus

    bus = await Bus.connect(nats_url, "test")
    for stream in await bus.js.streams_info():
        await bus.js.delete_stream(str(stream.config.name))
    await bus.ensure_streams()
    yield bus
    await bus.close()


@pytest.fixture
def store(tmp_path: Path) -> "ObjectStore":
    """An empty object store in a folder."""
    from detflow.store import ObjectStore

    return ObjectStore(f"file://{tmp_path / 'store'}")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Stack]":
    """The whole stack as processes; it must end on SIGTERM and leave nothing behind."""
    from tests.stack_rig import end, free_base_port, start

    running = start(tmp_path_factory.mktemp("data"), free_base_port())
    yield running
    end(running, signal.SIGTERM)
    assert running.process.returncode == 0
