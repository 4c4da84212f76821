"""A gateway over real HTTP in front of one real gRPC server that answers for all services."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from detflow import telemetry
from detflow.interceptors import Boundary
from detflow.settings import Settings
from gateway.__main__ import Server, listen
from gateway.app import Gateway
from gateway.backends import Backends
from gateway.routes import SERVICES

Reply = Callable[[Any, Any], Any]
TERMINAL_SECONDS = 20


@dataclass
class Backend:
    """Answers every RPC: by `replies[method name]`, or with an echo of the common fields."""

    replies: dict[str, Reply] = field(default_factory=dict)
    calls: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    health: Any = field(default_factory=health_aio.HealthServicer)
    address: str = ""

    def handlers(self) -> list[Any]:
        return [
            grpc.method_handlers_generic_handler(
                service.full_name, {rpc.name: self._handler(rpc) for rpc in service.methods}
            )
            for group in SERVICES.values()
            for service in group
        ]

    def _handler(self, rpc: MethodDescriptor) -> Any:
        request_type = message_factory.GetMessageClass(rpc.input_type)
        response_type = message_factory.GetMessageClass(rpc.output_type)

        async def unary(request: Any, context: Any) -> Any:
            self._record(rpc, request, context)
            reply = self.replies.get(rpc.name)
            try:
                if reply:
                    return await reply(request, context)
                if rpc.client_streaming:
                    num_bytes = sum([len(one.chunk) async for one in request])
                    has_size = "size_bytes" in rpc.output_type.fields_by_name
                    return response_type(size_bytes=num_bytes) if has_size else response_type()
                return echo(request, response_type())
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            self._record(rpc, request, context)
            reply = self.replies.get(rpc.name)
            try:
                if reply:
                    async for one in reply(request, context):
                        yield one
                else:
                    yield echo(request, response_type())
            except (asyncio.CancelledError, GeneratorExit):
                self.cancelled.set()
                raise

        if rpc.client_streaming:
            make: Any = grpc.stream_unary_rpc_method_handler
        elif rpc.server_streaming:
            make = grpc.unary_stream_rpc_method_handler
        else:
            make = grpc.unary_unary_rpc_method_handler
        return make(
            stream if rpc.server_streaming else unary,
            request_type.FromString,
            response_type.SerializeToString,
        )

    def _record(self, rpc: MethodDescriptor, request: Any, context: Any) -> None:
        self.calls.append((rpc.name, request, dict(context.invocation_metadata())))

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        server = grpc.aio.server(interceptors=[Boundary()])
        server.add_generic_rpc_handlers(tuple(self.handlers()))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await server.start()
        await self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        try:
            yield
        finally:
            await server.stop(0)


@dataclass
class Rig:
    """A running gateway with its backend and a client."""

    backend: Backend
    gateway: Gateway
    server: Server
    port: int
    http: httpx.AsyncClient
    stopped: asyncio.Task[None]

    async def raw(self, request: bytes) -> tuple[int, bytes]:
        """Sends bytes as they are (httpx would tidy the path); returns the status and the rest."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            answer = await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), body

    async def get_raw(self, path: bytes) -> tuple[int, bytes]:
        """GETs an untidied path."""
        return await self.raw(
            b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )


def echo(request: Message, response: Message) -> Message:
    """Copies the fields that both messages have with the same type."""
    own = response.DESCRIPTOR.fields_by_name
    for one, value in request.ListFields():
        other = own.get(one.name)
        if other and other.type == one.type and not one.is_repeated and not other.message_type:
            setattr(response, one.name, value)
    return response


@contextlib.asynccontextmanager
async def in_front_of(
    addresses: Mapping[str, str], settings: Settings, **client: Any
) -> AsyncIterator[tuple[Gateway, Server, httpx.AsyncClient, asyncio.Task[None]]]:
    """Runs a gateway in front of services, by key of SERVICES, with a client of it.

    Args:
        addresses: gRPC addresses by key of SERVICES.
        settings: Of the gateway, which listens on loopback in any case.
        client: What the client is made with.
    """
    async with contextlib.AsyncExitStack() as stack:
        backends = Backends(addresses)
        stack.push_async_callback(backends.close)
        telemetry.trace_to("gateway", settings)
        gateway = Gateway(backends, settings)
        stack.push_async_callback(gateway.close)
        server = Server(gateway, settings, signals=False)
        listening = stack.enter_context(listen("127.0.0.1", 0))
        scheme = "https" if settings.tls_cert_file else "http"
        url = f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
        stopped = asyncio.create_task(server.serve(sockets=[listening]))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, timeout=TERMINAL_SECONDS, **client)
        )
        try:
            yield gateway, server, http, stopped
        finally:
            server.should_exit = True
            await stopped


@contextlib.asynccontextmanager
async def running(settings: Settings | None = None) -> AsyncIterator[Rig]:
    """Runs a backend, which lets everybody in, and a gateway in front of it."""
    settings = settings or Settings(drain_seconds=5)
    backend = Backend()
    async with (
        backend.serve(),
        in_front_of(dict.fromkeys(SERVICES, backend.address), settings) as running,
    ):
        gateway, server, http, stopped = running
        port = http.base_url.port
        assert port is not None
        yield Rig(backend, gateway, server, port, http, stopped)


def failing(error: Exception) -> Callable[[Any, Any], Awaitable[Any]]:
    """A unary reply that raises."""

    async def reply(_request: Any, _context: Any) -> Any:
        raise error

    return reply


def details(answer: httpx.Response, kind: str) -> dict[str, Any]:
    """The detail of this type, e.g. ErrorInfo, in an error answer."""
    for one in answer.json()["error"]["details"]:
        if one["@type"].endswith(f"google.rpc.{kind}"):
            found: dict[str, Any] = one
            return found
    raise AssertionError(f"no {kind} in {answer.text}")
