"""A service installs without the others' dependencies and starts alone."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def version_only_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with `detflow[version]` and nothing else, at the locked versions."""
    folder = tmp_path_factory.mktemp("alone")
    source = folder / "source"
    # pip builds in the source tree; a copy keeps build/ out of the checkout.
    files = subprocess.run(
        ["git", "ls-files", "-z", "pyproject.toml", "README.md", "LICENSE", "buf", "detflow",
         "services", "gateway"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in files.rstrip("\0").split("\0"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPOSITORY / name).read_bytes())
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--constraint",
         REPOSITORY / "requirements.lock", f"{source}[version]"],
        check=True,
    )  # fmt: skip
    return python


def _distributions(python: Path) -> list[Path]:
    return list(python.parent.parent.glob("lib/python*/site-packages/*.dist-info"))


@pytest.mark.slow
async def test_version_service_installs_and_serves_without_torch(
    version_only_python: Path,
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    bus: Any,
    tmp_path: Path,
) -> None:
    installed = {path.name.split("-")[0].lower() for path in _distributions(version_only_python)}
    assert "grpcio" in installed
    assert not installed & {
        "torch",
        "torchvision",
        "ultralytics",
        "opencv-python-headless",
        "numpy",
    }

    service = await asyncio.create_subprocess_exec(
        version_only_python,
        "-m",
        "services.version",
        env={
            "PATH": os.environ["PATH"],
            "DETFLOW_DATABASE_URL": await make_database_url("version"),
            "DETFLOW_NATS_URL": nats_url,
            "DETFLOW_STORE_URL": (tmp_path / "store").as_uri(),
            "DETFLOW_DATA_DIR": str(tmp_path / "scratch"),
            "DETFLOW_LISTEN": "127.0.0.1:0",
            "DETFLOW_ACCESS": "open",
        },
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert service.stderr is not None
    try:
        async with asyncio.timeout(30):
            lines = []
            while b'"serving"' not in (line := await service.stderr.readline()):
                lines.append(line.decode())
                assert line, "".join(lines)
            address = line.split(b'"address": "')[1].split(b'"')[0].decode()
            async with aio.insecure_channel(address) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(service="detflow.v1.VersionService")
                )
                async for answer in watch:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        break
                watch.cancel()
        service.terminate()
        async with asyncio.timeout(20):
            await service.stderr.read()
            assert await service.wait() == 0
    finally:
        if service.returncode is None:
            service.kill()
            await service.wait()
