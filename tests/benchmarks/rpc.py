"""Unary calls per second: GetVersion by gRPC, and by HTTP through the gateway, in one run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import psutil

from detflow import access
from detflow.access import Principal
from detflow.guard import Guard
from detflow.settings import Settings
from detflow.v1 import version_pb2, version_pb2_grpc
from tests.benchmarks import rig

_CONCURRENCY = 32

Worker = Callable[[float], Awaitable[list[float]]]


def run(quick: bool = False) -> dict[str, Any]:
    """Asks for one version as fast as 32 callers can, first by gRPC, then by HTTP keep-alive.

    The callers run in one process beside the servers and share the machine with them.

    Args:
        quick: One second each instead of ten.

    Returns:
        Calls per second, p50 and p99 in milliseconds and CPU time per call (of the callers, and of
        the whole stack, which a busy machine changes little) of both; the ratios HTTP / gRPC; and
        the CPU time of the guard in each call.
    """
    return asyncio.run(_run(1.0 if quick else 10.0))


async def _run(seconds: float) -> dict[str, Any]:
    async with rig.running() as stack:
        direct = await _grpc(stack, seconds)
        through = await _http(stack, seconds)
    guard_us = await _guard()
    return {
        "guard_cpu_us_per_call": round(guard_us, 1),
        "guard_share": round(guard_us / direct["server_cpu_ms_per_call"] / 1000, 4),
        "concurrency": _CONCURRENCY,
        "gRPC": direct,
        "HTTP": through,
        "rate_ratio": round(through["per_second"] / direct["per_second"], 3),
        "server_cpu_ratio": round(
            through["server_cpu_ms_per_call"] / direct["server_cpu_ms_per_call"], 3
        ),
    }


async def _guard() -> float:
    """Returns the microseconds of CPU time that it takes to let a caller in who is known."""
    key = Principal(
        kind=access.Kind.API_KEY,
        subject="projects/default/apiKeys/k",
        display_name="k",
        roles={"default": access.Role.VIEWER},
    )

    async def identify(token: str) -> Principal:
        return key

    audit: Any = None  # of a call that changes nothing
    guard = Guard(Settings(service_token="s" * 64, calls_per_second=1e9), audit, identify)
    request = version_pb2.GetVersionRequest(name="projects/default/versions/v")
    context = mock.Mock(invocation_metadata=lambda: ((access.METADATA, "Bearer " + "t" * 47),))
    num_calls = 20_000
    start = time.process_time()
    for _ in range(num_calls):
        async with guard.admit("/detflow.v1.VersionService/GetVersion", context, "r") as admitted:
            await admitted.authorize(request)
    return (time.process_time() - start) / num_calls * 1e6


async def _grpc(stack: rig.Rig, seconds: float) -> dict[str, float]:
    async with stack.channel(1) as channel:
        stub = version_pb2_grpc.VersionServiceStub(channel)
        request = version_pb2.GetVersionRequest(name=stack.version)

        async def call(until: float) -> list[float]:
            latencies = []
            while (start := time.perf_counter()) < until:
                await stub.GetVersion(request)
                latencies.append(time.perf_counter() - start)
            return latencies

        return await _load(call, seconds)


async def _http(stack: rig.Rig, seconds: float) -> dict[str, float]:
    request = (
        f"GET /v1/{stack.version} HTTP/1.1\r\nHost: 127.0.0.1:{stack.port}\r\n"
        f"Authorization: Bearer {stack.token}\r\n\r\n"
    ).encode()

    async def call(until: float) -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        latencies = []
        try:
            while (start := time.perf_counter()) < until:
                writer.write(request)
                await _read_response(reader)
                latencies.append(time.perf_counter() - start)
        finally:
            writer.close()
        return latencies

    return await _load(call, seconds)


async def _read_response(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise RuntimeError(head.decode())
    length = next(
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    )
    await reader.readexactly(length)


async def _load(call: Worker, seconds: float) -> dict[str, float]:
    await call(time.perf_counter() + min(seconds / 4, 1.0))  # connections, caches
    start, cpu, servers = time.perf_counter(), time.process_time(), _server_cpu_seconds()
    latencies = [
        latency
        for group in await asyncio.gather(*(call(start + seconds) for _ in range(_CONCURRENCY)))
        for latency in group
    ]
    wall = time.perf_counter() - start
    return {
        "per_second": round(len(latencies) / wall, 1),
        "p50_ms": round(rig.percentile(latencies, 50) * 1000, 2),
        "p99_ms": round(rig.percentile(latencies, 99) * 1000, 2),
        "caller_cpu_ms_per_call": round((time.process_time() - cpu) / len(latencies) * 1000, 3),
        "server_cpu_ms_per_call": round(
            (_server_cpu_seconds() - servers) / len(latencies) * 1000, 3
        ),
    }


def _server_cpu_seconds() -> float:
    """Returns the CPU time of the whole stack so far, Postgres included."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
