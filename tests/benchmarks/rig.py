"""The real stack as processes, with a small READY version in it, for the benchmarks to load."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import grpc.aio

from detflow import channels
from detflow.client import Client
from detflow.local import stack
from detflow.local.demo_data import write_dataset
from detflow.local.nats import NatsServer
from detflow.local.running import owner_token
from detflow.local.supervisor import Program
from detflow.settings import Settings
from tests.stack_rig import free_base_port

_IDLE_TRAINER = Path(__file__).parent / "idle_trainer.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rig:
    """A running stack.

    Attributes:
        port: Port of the gateway; version, preprocess, trainer and metrics follow.
        client: SDK client; its calls block.
        token: Token of the stack's owner.
        nats_url: Address of NATS, with its token.
        version: Resource name of a READY version of a few images.
    """

    port: int
    client: Client
    token: str
    nats_url: str
    version: str

    def channel(self, service: int) -> grpc.aio.Channel:
        """Opens a channel to a service, 1 to 4 in the order of `port`, as the owner."""
        calling = Settings(service_token=self.token)
        return channels.channel(f"127.0.0.1:{self.port + service}", calling)


@contextlib.asynccontextmanager
async def running(*, idle_worker: bool = False) -> AsyncIterator[Rig]:
    """Runs a stack in a temporary folder.

    Args:
        idle_worker: Start a worker that does nothing, so that the benchmark can play it.
    """
    urls: list[str] = []
    make = stack._services

    def services(data_dir: Path, port: int, cluster: Any, server: NatsServer) -> Sequence[Program]:
        urls.append(server.url)
        return [
            dataclasses.replace(program, command=[sys.executable, str(_IDLE_TRAINER)])
            if idle_worker and program.name == "trainer"
            else program
            for program in make(data_dir, port, cluster, server)
        ]

    port = free_base_port()
    with tempfile.TemporaryDirectory(prefix="detflow-bench-") as name:
        folder = Path(name)
        # One caller loads it as many would.
        no_limits = {"DETFLOW_CALLS_PER_SECOND": "0", "DETFLOW_OPEN_CALLS": "0"}
        with (
            mock.patch.object(stack, "_services", services),
            mock.patch.dict(os.environ, no_limits),
        ):
            async with stack.stack(folder / "data", port=port):
                token = owner_token(folder / "data")
                client = Client(f"127.0.0.1:{port}", environ={}, token=token)
                version = await asyncio.to_thread(_make_version, client, folder / "shapes")
                yield Rig(port=port, client=client, token=token, nats_url=urls[0], version=version)
                client.close()


def _make_version(client: Client, folder: Path) -> str:
    write_dataset(folder, 20)
    dataset = client.datasets.import_(folder)
    created = client.versions.create(dataset.name)
    return str(client.versions.wait(created.name).name)


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent * 100) // 10_000) - 1)]
