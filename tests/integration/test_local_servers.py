import asyncio
import os
import signal
import stat
from pathlib import Path

import asyncpg
import nats
import pytest

from detflow.local import nats as local_nats
from detflow.local import postgres as local_postgres


@pytest.fixture
def running(tmp_path: Path) -> local_postgres.Cluster:
    return local_postgres.prepare(tmp_path / "postgres", fsync=False)


async def test_each_service_has_its_own_schema_and_sees_no_other(
    postgres_cluster: local_postgres.Cluster,
) -> None:
    version = await asyncpg.connect(postgres_cluster.url("version"))
    try:
        await version.execute("create table version.probe (id int)")
        await version.execute("drop table version.probe")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await version.execute("create table trainer.probe (id int)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await version.execute("create table public.probe (id int)")
    finally:
        await version.close()


async def test_wrong_password_is_refused(postgres_cluster: local_postgres.Cluster) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(
            f"postgresql://postgres:wrong@127.0.0.1:{postgres_cluster.port}/detflow"
        )


def test_postgres_comes_back_after_kill_and_ignores_a_stale_pid_file(
    tmp_path: Path, running: local_postgres.Cluster
) -> None:
    log = tmp_path / "log"
    first = running.start(log)
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = local_postgres.prepare(tmp_path / "postgres", fsync=False)
    assert again.url() == running.url()
    second = again.start(log)

    async def select() -> int:
        connection = await asyncpg.connect(again.url())
        try:
            return int(await connection.fetchval("select 1"))
        finally:
            await connection.close()

    assert asyncio.run(select()) == 1
    second.send_signal(local_postgres.STOP_SIGNAL)
    assert second.wait(timeout=10) == 0
    # A pid file of a crash whose number another program has now.
    pid_file = running.data / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{running.data}\n")
    third = local_postgres.prepare(tmp_path / "postgres", fsync=False).start(log)
    third.send_signal(local_postgres.STOP_SIGNAL)
    assert third.wait(timeout=10) == 0


def test_half_made_cluster_is_made_again(tmp_path: Path) -> None:
    partial = tmp_path / "postgres" / "data.partial"
    partial.mkdir(parents=True)
    (partial / "PG_VERSION").write_text("18")
    cluster = local_postgres.prepare(tmp_path / "postgres", fsync=False)
    assert not partial.exists()
    assert (cluster.data / "postgresql.conf").exists()
    mode = stat.S_IMODE((cluster.directory / "postgres.password").stat().st_mode)
    assert mode == 0o600


async def test_nats_needs_its_token_and_keeps_it(tmp_path: Path, nats_url: str) -> None:
    connection = await nats.connect(nats_url)
    info = await connection.jetstream().account_info()
    assert info.streams >= 0
    await connection.close()

    host, port = nats_url.split("@")[1].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    assert (await reader.readline()).startswith(b"INFO ")
    writer.write(b'CONNECT {"auth_token": "wrong"}\r\nPING\r\n')
    assert await reader.readline() == b"-ERR 'Authorization Violation'\r\n"
    writer.close()
    prepared = local_nats.prepare(tmp_path / "nats")
    assert local_nats.prepare(tmp_path / "nats").url == prepared.url
    mode = stat.S_IMODE((tmp_path / "nats" / "nats.conf").stat().st_mode)
    assert mode == 0o600
