"""Postgres: a pool per service in a schema of its own, and plain-SQL migrations.

Each `NNNN_name.sql` runs once, in order, in one transaction, under an advisory lock, so that
replicas starting together don't collide.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import asyncpg

from detflow import faults, telemetry
from detflow.errors import Unavailable

if TYPE_CHECKING:
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    Connection: TypeAlias = (
        asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    )
else:
    Connection = asyncpg.Connection

log = telemetry.get_logger(__name__)

_SHARED_MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LOCK = 0x646574666C6F77
"""Advisory lock ("detflow") of whoever makes or changes tables."""

_MIGRATION_SECONDS = 3600.0  # large tables take their time
_LOCK_SECONDS = 1

CONNECTION_ERRORS = (
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.AdminShutdownError,
    asyncpg.exceptions.CrashShutdownError,
    asyncpg.exceptions.CannotConnectNowError,
    asyncpg.exceptions.TooManyConnectionsError,
    asyncpg.exceptions.IdleInTransactionSessionTimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection lost in the middle of its hand-over
    ConnectionError,
    TimeoutError,
)
"""What asyncpg raises while Postgres is away, starting or stopping."""

CONNECTION_TROUBLE = (Unavailable, asyncpg.PostgresError, OSError, *CONNECTION_ERRORS)
"""What somebody meets who holds a connection for himself: make another one."""


class Database:
    """A pool of connections whose search path is one service's schema."""

    def __init__(self, pool: Pool, url: str, schema: str) -> None:
        self._pool = pool
        self.url = url
        self.schema = schema

    @classmethod
    async def connect(
        cls, url: str, schema: str, *, min_size: int = 1, max_size: int = 10
    ) -> Database:
        """Opens the pool.

        Raises:
            Unavailable: Postgres does not answer.
        """
        try:
            pool = await asyncpg.create_pool(
                url,
                min_size=min_size,
                max_size=max_size,
                timeout=10,
                command_timeout=60,
                reset=_keep,
                server_settings={
                    "search_path": schema,
                    "application_name": f"detflow-{schema}",
                    # A process that is frozen must not keep its rows from those that run.
                    "idle_in_transaction_session_timeout": "30s",
                },
            )
        except (*CONNECTION_ERRORS, OSError) as error:
            raise Unavailable("cannot connect to Postgres; check DETFLOW_DATABASE_URL") from error
        return cls(pool, url, schema)

    async def close(self) -> None:
        """Closes the pool at once; whatever still runs on it is rolled back."""
        self._pool.terminate()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lends a connection without a transaction.

        Raises:
            Unavailable: Postgres is away.
        """
        with translate(OSError):
            conn = await self._pool.acquire(timeout=10)
        try:
            with translate():
                yield conn
        except Unavailable as error:
            if isinstance(error.__cause__, asyncpg.InternalClientError):
                # Its protocol state is lost: it must not be lent again.
                with contextlib.suppress(asyncpg.InterfaceError):  # nor can it: it has gone already
                    conn.terminate()
            raise
        finally:
            with translate():
                await self._pool.release(conn)

    @contextlib.asynccontextmanager
    async def transaction(
        self, isolation: Literal["read_committed", "repeatable_read", "serializable"] | None = None
    ) -> AsyncIterator[Connection]:
        """Lends a connection in a transaction that is committed, or rolled back on an error.

        Raises:
            Unavailable: Postgres is away. If it went away during the commit, the outcome is
                unknown: retry with the same request id or event id.
        """
        async with self.connection() as conn:
            async with conn.transaction(isolation=isolation):
                yield conn
                faults.point("postgres.before_commit")
            faults.point("postgres.after_commit")

    async def listen(self) -> asyncpg.Connection[asyncpg.Record]:
        """Opens a connection of its own, outside the pool, for LISTEN and session locks.

        Raises:
            Unavailable: Postgres does not answer.
        """
        with translate(OSError):
            return await asyncpg.connect(
                self.url,
                timeout=10,
                server_settings={
                    "search_path": self.schema,
                    "application_name": f"detflow-{self.schema}-listen",
                },
            )

    async def hear(self, channel: str, heard: Callable[[str], None], *, pause: float) -> None:
        """Passes notifications on until cancelled; connects again by itself.

        What is told while the connection is lost is not heard: look at the tables from time to
        time.

        Args:
            channel: Name after LISTEN.
            heard: Called with the payload of each.
            pause: Seconds before connecting again.
        """
        while True:
            try:
                conn = await self.listen()
                lost = asyncio.Event()
                conn.add_termination_listener(lambda *_, lost=lost: lost.set())
                try:
                    await conn.add_listener(channel, lambda *told: heard(str(told[-1])))
                    await lost.wait()
                finally:
                    conn.terminate()
            except CONNECTION_TROUBLE as error:
                log.warning("changes are not heard", channel=channel, error=str(error))
            await asyncio.sleep(pause)

    async def migrate(self, folder: Path | None) -> None:
        """Brings the schema up to date: shared tables (outbox, inbox), then the service's own."""
        async with self.connection() as conn:
            await conn.execute(
                "select pg_advisory_lock($1)", MIGRATION_LOCK, timeout=_MIGRATION_SECONDS
            )
            try:
                # `create schema if not exists` asks for the right to create it in any case.
                if not await conn.fetchval("select to_regnamespace($1)", self.schema):
                    await conn.execute(f'create schema "{self.schema}"')
                await conn.execute(
                    "create table if not exists migration (name text primary key,"
                    " apply_time timestamptz not null default now())"
                )
                for name, path in migration_files(folder):
                    await self._apply(conn, name, path)
            finally:
                await conn.execute("select pg_advisory_unlock($1)", MIGRATION_LOCK)

    @classmethod
    async def _apply(cls, conn: Connection, name: str, path: Path) -> None:
        """Applies a migration unless it was.

        While it waits for the lock of a table, everybody else who wants to read that waits behind
        it: so it gives up soon, lets them go first, and tries again.
        """
        deadline = time.monotonic() + _MIGRATION_SECONDS
        while True:
            try:
                async with conn.transaction():
                    await conn.execute(f"set local lock_timeout = '{_LOCK_SECONDS}s'")
                    if await conn.fetchval("select 1 from migration where name = $1", name):
                        return
                    await conn.execute(
                        path.read_text(),  # noqa: ASYNC240  # once, at start
                        timeout=_MIGRATION_SECONDS,
                    )
                    await conn.execute("insert into migration (name) values ($1)", name)
                    return
            except asyncpg.LockNotAvailableError:
                if time.monotonic() > deadline:
                    raise
                log.warning("migration waits for a table in use", migration=name)
                await asyncio.sleep(_LOCK_SECONDS)


def migration_files(folder: Path | None) -> list[tuple[str, Path]]:
    """Returns the name and file of each migration in their order: the shared ones, a service's."""
    return [
        (f"{source.parent.name}/{path.name}", path)
        for source in [_SHARED_MIGRATIONS, *([folder] if folder else [])]
        for path in sorted(source.glob("*.sql"))
    ]


async def _keep(connection: Connection) -> None:
    """Leaves a connection as it is when it goes back to the pool.

    asyncpg would reset the session, a second round trip for each use; nothing here leaves session
    state behind: locks and settings are the transaction's.
    """


@contextlib.contextmanager
def translate(*also: type[Exception]) -> Iterator[None]:
    """Turns the many ways of Postgres being away into Unavailable.

    Args:
        also: What else means that here: an OSError while connecting, but not in a caller's block.
    """
    away: tuple[type[Exception], ...] = (*CONNECTION_ERRORS, *also)
    try:
        yield
    except away as error:
        raise Unavailable("the database is away for the moment; retry") from error
