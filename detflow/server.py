"""A service process: settings, connections, gRPC server, background tasks, drain."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import prometheus_client
import uvloop
from google.protobuf.internal import api_implementation
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from detflow import access, channels, faults, gauges, telemetry, tls
from detflow.audit import Audit
from detflow.errors import DetflowError, InvalidArgument, Unavailable
from detflow.events import Bus
from detflow.guard import Guard
from detflow.identities import Identify, asking
from detflow.interceptors import Boundary
from detflow.outbox import Relay
from detflow.postgres import Database
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.tasks import cancel_all, wait
from detflow.v1 import access_pb2_grpc
from detflow.watch import Watcher

log = telemetry.get_logger(__name__)

T = TypeVar("T")

_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),  # a second process on the same port must fail, not share it
)
_READY = prometheus_client.Gauge("detflow_ready", "1 while the process serves, else 0")
_HEALTH_SECONDS = 1.0
_START_SECONDS = 30.0


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a process's main coroutine; a DetflowError at start is one line, not a traceback."""
    if api_implementation.Type() != "upb":
        raise SystemExit("protobuf runs without its C implementation; reinstall protobuf")
    try:
        uvloop.run(main())
    except DetflowError as error:
        raise SystemExit(error.message) from error


class Service:
    """A service between start and stop. Use it as an async context manager in `__main__`.

    Args:
        name: Name of the service; also its Postgres schema.
        migrations: Folder with its migrations.
        settings: Read from the environment if not given.

    Attributes:
        settings: Settings of the process.
        db: Pool in the service's schema, migrated.
        bus: NATS connection, streams made.
        store: Object store.
        watcher: Fan-out of the event stream.
        identify: Says whose a token is; asks the version service unless that is what this is.
        address: host:port the server listens on, once it serves.
    """

    settings: Settings
    db: Database
    bus: Bus
    store: ObjectStore
    watcher: Watcher
    identify: Identify

    def __init__(
        self, name: str, *, migrations: Path | None, settings: Settings | None = None
    ) -> None:
        self.name = name
        self.settings = settings or Settings.load()
        self.address = ""
        self._migrations = migrations
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._service_names: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._drains: list[Callable[[], Awaitable[None]]] = []
        self._figures = gauges.OUTBOX
        self._more_figures: Callable[[], Awaitable[None]] | None = None
        self._stop = asyncio.Event()
        self._crash: BaseException | None = None
        self.serving = asyncio.Event()

    async def __aenter__(self) -> Self:
        telemetry.configure(self.name, self.settings)
        faults.arm(self.settings)
        self.settings.require("database_url", "nats_url", "store_url")
        access.check_settings(self.settings)
        self._shown = _certificate(self.settings)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._connect()
        except TimeoutError as error:
            raise Unavailable(
                f"Postgres or NATS did not answer within {_START_SECONDS:.0f} s: check"
                " DETFLOW_DATABASE_URL and DETFLOW_NATS_URL"
            ) from error
        await self.db.migrate(self._migrations)
        # Made here and not earlier: it belongs to the running event loop.
        self._version = channels.channel(self.settings.version_address, self.settings)
        self.identify = asking(access_pb2_grpc.AccessServiceStub(self._version))
        boundary = Boundary(self._make_guard())
        self._server: aio.Server = aio.server(interceptors=[boundary], options=_OPTIONS)
        self.store = ObjectStore(self.settings.store_url)
        self.settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.watcher = Watcher(self.bus)
        self.spawn(self.watcher.run(), "watcher")
        self.spawn(Relay(self.db, self.bus, f"detflow/{self.name}").run(), "relay")
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await cancel_all(self._tasks)
        await self._version.close(None)
        await self.bus.close()
        await self.db.close()
        if self._crash is not None and error is None:
            raise self._crash

    def _make_guard(self) -> Guard | None:
        if self.settings.access == "open":
            return None
        return Guard(self.settings, Audit(self.db), lambda token: self.identify(token))

    async def _connect(self) -> None:
        self.db = await _patiently(lambda: Database.connect(self.settings.database_url, self.name))
        self.bus = await _patiently(self._bus)
        await _patiently(self.bus.ensure_streams)

    async def _bus(self) -> Bus:
        s = self.settings
        return await Bus.connect(s.nats_url, self.name, events_bytes=s.events_bytes)

    def add(self, register: Callable[[Any, aio.Server], None], servicer: Any) -> None:
        """Adds a servicer: `add(add_VersionServiceServicer_to_server, VersionService(...))`."""
        register(servicer, self._server)
        name = register.__name__.removeprefix("add_").removesuffix("Servicer_to_server")
        self._service_names.append(f"detflow.v1.{name}")

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs a background task; if it fails, the process ends and is restarted."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def on_drain(self, finish: Callable[[], Awaitable[None]]) -> None:
        """Registers what is awaited between the last call and the closing of connections."""
        self._drains.append(finish)

    def figures(
        self,
        queries: Sequence[gauges.Query],
        more: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Says what Prometheus is told beside what all services tell, see detflow/gauges.py."""
        self._figures = (*self._figures, *queries)
        self._more_figures = more

    def stop(self) -> None:
        """Begins the drain, as SIGTERM does."""
        self._stop.set()

    async def serve(self) -> None:
        """Serves until SIGTERM or SIGINT; then watches end and the other calls may finish."""
        reflection.enable_server_reflection(
            [
                *self._service_names,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ],
            self._server,
        )
        host = self.settings.listen.rsplit(":", 1)[0]
        try:
            if self._shown is None:
                port = self._server.add_insecure_port(self.settings.listen)
            else:
                port = self._server.add_secure_port(self.settings.listen, self._shown)
        except RuntimeError as error:
            raise Unavailable(
                f"cannot listen on {self.settings.listen}: is it in use? set DETFLOW_LISTEN",
                reason="PORT_IN_USE",
            ) from error
        self.address = f"{host}:{port}"
        if self._shown is None and not access.is_local(self.settings.listen):
            log.warning(
                "tokens travel unencrypted: set DETFLOW_TLS_CERT_FILE", address=self.address
            )
        if self.settings.metrics_listen:
            metrics_host, metrics_port = self.settings.metrics_listen.rsplit(":", 1)
            prometheus_client.start_http_server(int(metrics_port), metrics_host)
            self.spawn(gauges.report(self.db, self._figures, self._more_figures), "figures")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        await self._server.start()
        self.spawn(self._report_health(), "health")
        log.info("serving", address=self.address)
        self.serving.set()
        await self._stop.wait()
        log.info("draining")
        await self._health.enter_graceful_shutdown()
        self.watcher.close()
        await self._server.stop(self.settings.drain_seconds)
        for finish in self._drains:
            await finish()
        log.info("stopped")

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("background task failed", task=task.get_name(), exc_info=error)
            self._crash = self._crash or error
            self._stop.set()

    async def _report_health(self) -> None:
        """Keeps the health status true: SERVING only while Postgres and NATS answer."""
        while not self._stop.is_set():
            healthy = self.bus.connected
            try:
                async with asyncio.timeout(3), self.db.connection() as conn:
                    await conn.execute("select 1")
            except (Unavailable, TimeoutError):
                healthy = False
            status = (
                health_pb2.HealthCheckResponse.SERVING
                if healthy
                else health_pb2.HealthCheckResponse.NOT_SERVING
            )
            _READY.set(healthy)
            for name in ("", *self._service_names):
                await self._health.set(name, status)
            await wait(self._stop, _HEALTH_SECONDS)


def _certificate(settings: Settings) -> grpc.ServerCredentials | None:
    """Returns what a service shows, and asks for, where it serves with TLS.

    Raises:
        InvalidArgument: A setting is missing, or a file cannot be used.
    """
    if not settings.tls_cert_file:
        if settings.tls_key_file or settings.tls_client_ca_file:
            raise InvalidArgument(
                "set DETFLOW_TLS_CERT_FILE too: without it nothing is served with TLS",
                reason="MISSING_SETTING",
            )
        return None
    # The services call each other, and what serves with TLS is called with TLS.
    settings.require("tls_ca_file")
    return tls.server_credentials(
        cert_file=settings.tls_cert_file,
        key_file=settings.tls_key_file,
        client_ca_file=settings.tls_client_ca_file,
    )


async def _patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeats a connection attempt until the caller's timeout."""
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            log.warning("waiting", error=str(error))
            await asyncio.sleep(0.2)
