"""The whole of detflow on one machine: which processes there are, and what each is told."""

import asyncio
import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from detflow.local import nats, postgres, process
from detflow.local.running import (
    ACCESS,
    BASE_PORT,
    OWNER_TOKEN,
    Running,
    StackError,
    locked,
)
from detflow.local.supervisor import Program, Supervisor

_PORT_SECONDS = 3.0
# What the environment says of how clients and other installations are reached is not for these.
_NOT_INHERITED = ("DETFLOW_TLS_", "DETFLOW_OWNER_TOKEN", "DETFLOW_TOKEN")


@contextlib.asynccontextmanager
async def stack(
    data_dir: Path,
    *,
    port: int = BASE_PORT,
    on_line: Callable[[str, str], None] | None = None,
    on_event: Callable[[str], None] | None = None,
    fsync: bool = True,
) -> AsyncIterator[Supervisor]:
    """Runs the stack: ready when the context is entered, gone when it is left.

    Args:
        data_dir: Folder of everything it keeps; made if it is not there.
        port: Port of the gateway; the services take the four after it.
        on_line: Called with (process, line) for everything the processes print.
        on_event: Called with a sentence when a process crashes and is started again.
        fsync: False only where the data may be lost, in tests.

    Raises:
        StackError: Another stack uses the folder, a port is taken or a process does not start.
    """
    with locked(data_dir) as (data_dir, note):
        note(Running(pid=os.getpid(), port=port, ready=False))
        await asyncio.to_thread(_wait_for_ports, port)
        supervisor = Supervisor(
            logs=data_dir / "logs", directory=data_dir, on_line=on_line, on_event=on_event
        )
        try:
            cluster = await asyncio.to_thread(postgres.prepare, data_dir / "postgres", fsync=fsync)
            server = await asyncio.to_thread(nats.prepare, data_dir / "nats")
            await supervisor.start([_postgres(cluster), _nats(server)])
            await supervisor.start(_services(data_dir, port, cluster, server))
            note(Running(pid=os.getpid(), port=port, ready=True))
            yield supervisor
        except (postgres.PostgresError, nats.NatsError) as error:
            raise StackError(str(error)) from error
        finally:
            await supervisor.stop()


def _wait_for_ports(port: int) -> None:
    """Waits a moment for the processes of a killed stack to give their ports back.

    Raises:
        StackError: A port is taken by another program.
    """
    ports = range(port, port + 1 + len(postgres.SERVICES))
    deadline = time.monotonic() + _PORT_SECONDS
    while taken := [number for number in ports if not process.is_free(number)]:
        if time.monotonic() > deadline:
            raise StackError(
                f"port {taken[0]} is in use by another program: choose others with --port N"
                f" (detflow takes N to N+{len(ports) - 1})"
            )
        time.sleep(0.05)


def _postgres(cluster: postgres.Cluster) -> Program:
    async def is_ready() -> bool:
        return cluster.is_ready()

    return Program(
        name="postgres",
        command=cluster.command(),
        is_ready=is_ready,
        before_start=lambda: postgres.clear_stale_pid(cluster.data),
        stop_signal=postgres.STOP_SIGNAL,
        # SIGKILL would leave its children behind.
        death_signal=postgres.STOP_SIGNAL,
    )


def _nats(server: nats.NatsServer) -> Program:
    return Program(
        name="nats",
        command=server.command(),
        is_ready=lambda: asyncio.to_thread(server.is_ready),
    )


def _services(
    data_dir: Path, port: int, cluster: postgres.Cluster, server: nats.NatsServer
) -> list[Program]:
    addresses = {
        name: f"127.0.0.1:{port + number}" for number, name in enumerate(postgres.SERVICES, 1)
    }
    access = data_dir / ACCESS
    access.mkdir(mode=0o700, exist_ok=True)
    common = {
        **{key: value for key, value in os.environ.items() if not key.startswith(_NOT_INHERITED)},
        "PYTHONUNBUFFERED": "1",
        "DETFLOW_SERVICE_TOKEN": process.secret(access / "service-token"),
        "DETFLOW_NATS_URL": server.url,
        # The embedded Postgres and NATS are all there is; objects may be in a bucket.
        "DETFLOW_STORE_URL": os.environ.get("DETFLOW_STORE_URL") or (data_dir / "store").as_uri(),
        **{f"DETFLOW_{name.upper()}_ADDRESS": address for name, address in addresses.items()},
    }
    (data_dir / "store").mkdir(exist_ok=True)
    owner_token = process.secret(access / OWNER_TOKEN)
    programs = [
        Program(
            name=name,
            command=[sys.executable, "-m", f"services.{name}"],
            environment={
                **common,
                "DETFLOW_DATABASE_URL": cluster.url(name),
                "DETFLOW_LISTEN": address,
                "DETFLOW_DATA_DIR": str(data_dir / "work" / name),
                **({"DETFLOW_OWNER_TOKEN": owner_token} if name == "version" else {}),
            },
            is_ready=functools.partial(_is_serving, address),
        )
        for name, address in addresses.items()
    ]
    programs.append(
        Program(
            name="gateway",
            command=[sys.executable, "-m", "gateway"],
            environment={
                **common,
                "DETFLOW_HTTP_LISTEN": f"127.0.0.1:{port}",
                "DETFLOW_DATA_DIR": str(data_dir / "work" / "gateway"),
            },
            is_ready=functools.partial(_answers_ready, port),
        )
    )
    return programs


async def _is_serving(address: str) -> bool:
    """Asks the gRPC health service, on a fresh channel: a failed one waits to reconnect."""
    host, port = address.split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=2.0
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _answers_ready(port: int) -> bool:
    """Asks the gateway's /readyz."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = await reader.readline()
            writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split(b" ")[1:2] == [b"200"]


async def run(
    data_dir: Path,
    *,
    port: int = BASE_PORT,
    on_ready: Callable[[Supervisor], None],
    on_stop: Callable[[], None],
    on_line: Callable[[str, str], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> None:
    """Runs the stack until SIGINT or SIGTERM; a second one kills what has not ended.

    Raises:
        StackError: As `stack`.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    supervisors: list[Supervisor] = []

    def asked() -> None:
        if stop.is_set():
            for supervisor in supervisors:
                supervisor.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)

    async def serve() -> None:
        async with stack(data_dir, port=port, on_line=on_line, on_event=on_event) as supervisor:
            supervisors.append(supervisor)
            await asyncio.to_thread(on_ready, supervisor)
            await stop.wait()
            on_stop()

    serving = asyncio.create_task(serve())
    asking = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, asking], return_when=asyncio.FIRST_COMPLETED)
    if not supervisors:
        # Asked to stop while it was starting: leaving the context stops what runs already.
        serving.cancel()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
