"""The gateway as a process: memory of an upload, SIGTERM during a stream and a request."""

import asyncio
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from detflow.v1 import trainer_pb2
from gateway.protocol import MAX_CONNECTIONS
from tests.gateway_rig import Backend

MIB = 1 << 20
WATCH = "/v1/projects/p/versions/v/trainings/t:watch"
START_SECONDS = 30


def _allow_few_files() -> None:
    """Sets the limit that many systems begin with."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))


class Process:
    """`python -m gateway` in front of a backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.url = ""

    async def start(self) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("DETFLOW_")
        }
        for service in ("VERSION", "PREPROCESS", "TRAINER", "METRICS"):
            environment[f"DETFLOW_{service}_ADDRESS"] = self.backend.address
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "gateway"),
            env=environment | {"DETFLOW_HTTP_LISTEN": "127.0.0.1:0", "DETFLOW_ACCESS": "open"},
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=_allow_few_files,
        )
        assert self.process.stderr is not None
        async with asyncio.timeout(START_SECONDS):
            async for line in self.process.stderr:
                entry = json.loads(line)
                if entry["event"] == "gateway listens":
                    self.url = f"http://127.0.0.1:{entry['port']}"
                    break
        assert self.url
        self.log = asyncio.create_task(self.process.stderr.read())

    def peak_kib(self) -> int:
        """Largest resident size so far."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

    async def stop(self) -> int:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        code = await self.process.wait()
        await self.log
        return code


@pytest.fixture
async def gateway() -> AsyncIterator[Process]:
    backend = Backend()
    async with backend.serve():
        process = Process(backend)
        await process.start()
        try:
            yield process
        finally:
            await process.stop()


async def test_64_mib_go_through_with_flat_memory(gateway: Process) -> None:
    async def blocks() -> AsyncIterator[bytes]:
        block = os.urandom(MIB)
        for _ in range(64):
            yield block

    async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
        headers = {"content-type": "application/zip"}
        await http.post("/v1/projects/p/uploads", content=b"x" * MIB, headers=headers)
        before = gateway.peak_kib()
        answer = await http.post("/v1/projects/p/uploads", content=blocks(), headers=headers)
    assert answer.json()["sizeBytes"] == str(64 * MIB)
    assert gateway.peak_kib() - before < 24 * 1024


async def test_sigterm_finishes_requests_ends_streams_and_exits_with_0(gateway: Process) -> None:
    began, release = asyncio.Event(), asyncio.Event()

    async def slow(_request: Any, _context: Any) -> Any:
        began.set()
        await release.wait()
        return trainer_pb2.ListModelsResponse()

    async def endless(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield trainer_pb2.WatchTrainingResponse(cursor="c1")
        await asyncio.Event().wait()

    gateway.backend.replies |= {"ListModels": slow, "WatchTraining": endless}
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        request = asyncio.create_task(http.get("/v1/models"))
        await began.wait()
        async with http.stream("GET", WATCH) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == "id: c1"
            gateway.process.send_signal(signal.SIGTERM)
            assert "retry: 1000" in [line async for line in lines]
        release.set()
        assert (await request).status_code == 200
    assert await gateway.stop() == 0


async def test_files_may_be_open_for_as_many_connections_as_are_taken(gateway: Process) -> None:
    soft, hard = resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE)
    assert soft == min(hard, 2 * MAX_CONNECTIONS)


async def test_bad_address_is_one_line_and_no_traceback() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "gateway"),
        env=os.environ | {"DETFLOW_HTTP_LISTEN": "nowhere", "DETFLOW_SERVICE_TOKEN": "s" * 32},
        stderr=asyncio.subprocess.PIPE,
    )
    _, text = await process.communicate()
    assert process.returncode == 1
    assert text == b"DETFLOW_HTTP_LISTEN must be host:port, not 'nowhere'\n"
