"""The gRPC channels to the services: one per service, and one callable per route."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, Self

import grpc
import orjson
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from detflow import channels, telemetry
from detflow.errors import InvalidArgument
from detflow.settings import Settings
from gateway.routes import SERVICES, Binding, bindings, rpcs

Metadata = tuple[tuple[str, str], ...]

DEFAULT_TIMEOUT_SECONDS = 30.0
MAX_TIMEOUT_SECONDS = 60.0
CHECK_TIMEOUT_SECONDS = 600.0
"""Of a call that tries out on the real data what it is asked to do (`validate_only`)."""
_HEALTH_TIMEOUT_SECONDS = 2.0
_MAX_MESSAGE_BYTES = 64 << 20

_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_FORWARDED = (b"authorization", b"accept-language")
_PRINTABLE = re.compile(rb"[\x20-\x7e]{1,8200}")  # a JWT is the longest


class Backends:
    """Open channels; close with `await close()`.

    Args:
        addresses: gRPC address by key of SERVICES.
        credentials: What is trusted and shown where the services have TLS.
    """

    def __init__(
        self,
        addresses: Mapping[str, str],
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._channels = {
            service: _open(address, credentials, _options(service))
            for service, address in addresses.items()
        }
        self._calls: dict[Binding, Any] = {}
        self.bindings = tuple(bindings())
        self.rpcs = tuple(rpcs())
        for binding in (*self.bindings, *self.rpcs):
            channel = self._channels[binding.service]
            rpc = binding.rpc
            if rpc.client_streaming:
                make: Any = channel.stream_unary
            elif rpc.server_streaming:
                make = channel.unary_stream
            else:
                make = channel.unary_unary
            self._calls[binding] = make(
                binding.grpc_path,
                request_serializer=binding.request.SerializeToString,
                response_deserializer=binding.response.FromString,
            )
        self._gets = {
            one.template.text: one
            for one in self.bindings
            if one.http_method == "GET" and one.rpc.name.startswith("Get")
        }
        self._health = {
            service: channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            for service, channel in self._channels.items()
        }

    @classmethod
    def connect(cls, settings: Settings) -> Self:
        """Opens the channels the settings name; connecting happens with the first call.

        Raises:
            InvalidArgument: A file of TLS cannot be used.
        """
        return cls(
            {name: getattr(settings, f"{name}_address") for name in SERVICES},
            channels.credentials(settings),
        )

    def channel(self, service: str) -> grpc.aio.Channel:
        """Returns the channel to a service, by its key of SERVICES."""
        return self._channels[service]

    async def close(self) -> None:
        """Closes all channels."""
        await asyncio.gather(*(channel.close(None) for channel in self._channels.values()))

    async def unary(
        self, binding: Binding, request: Message, timeout_seconds: float, metadata: Metadata
    ) -> Message:
        """Calls a unary RPC.

        Raises:
            grpc.aio.AioRpcError: It failed.
        """
        response: Message = await self._calls[binding](
            request, timeout=timeout_seconds, metadata=metadata
        )
        return response

    async def ask(self, rpc: str, request: Message, metadata: Metadata) -> Message:
        """Calls the unary RPC of this name for the gateway itself.

        Raises:
            grpc.aio.AioRpcError: It failed.
        """
        binding = next(one for one in self.rpcs if one.rpc.name == rpc)
        return await self.unary(binding, request, DEFAULT_TIMEOUT_SECONDS, metadata)

    async def describe(self, binding: Binding, name: str, metadata: Metadata) -> Any:
        """Gets the resource that a download is of: what is at its path without the verb, if any.

        Raises:
            grpc.aio.AioRpcError: It failed.
        """
        get = self._gets.get(binding.template.text.removesuffix(f":{binding.template.verb}"))
        if get is None:
            return None
        return await self.unary(get, get.request(name=name), DEFAULT_TIMEOUT_SECONDS, metadata)

    def stream(self, binding: Binding, request: Message, metadata: Metadata) -> Any:
        """Starts a server-streaming RPC; the call has `read()` and `cancel()`."""
        return self._calls[binding](request, metadata=metadata)

    def upload(self, binding: Binding, metadata: Metadata) -> Any:
        """Starts a client-streaming RPC; the call has `write()`, `done_writing()`, `cancel()`."""
        return self._calls[binding](metadata=metadata)

    async def health(self) -> dict[str, str]:
        """Asks every service how it is: SERVING, NOT_SERVING, ..., or UNREACHABLE."""
        states = await asyncio.gather(*(self._check(service) for service in self._health))
        return dict(zip(self._health, states, strict=True))

    async def _check(self, service: str) -> str:
        try:
            answer = await self._health[service](
                health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_SECONDS
            )
        except grpc.aio.AioRpcError:
            return "UNREACHABLE"
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return name


def is_check(request: Message) -> bool:
    """Whether a request only asks to be tried out, which takes up to minutes."""
    return bool(getattr(request, "validate_only", False))


def timeout_seconds(headers: Mapping[bytes, bytes], *, check: bool = False) -> float:
    """Deadline of a unary call: 30 s, or what the caller asks for, up to 60 s; of a check 600 s.

    Asked for by X-Request-Timeout (seconds) or grpc-timeout (gRPC's notation).

    Raises:
        InvalidArgument: The header is no positive duration.
    """
    text = headers.get(b"x-request-timeout")
    name = "X-Request-Timeout"
    unit = 1.0
    if text is None:
        text = headers.get(b"grpc-timeout")
        if text is None:
            return CHECK_TIMEOUT_SECONDS if check else DEFAULT_TIMEOUT_SECONDS
        name = "grpc-timeout"
        unit = _UNITS.get(text[-1:].decode("latin-1"), 0.0)
        text = text[:-1]
    value = float(text) * unit if re.fullmatch(rb"[0-9]{1,8}(\.[0-9]{1,9})?", text) else 0.0
    if value <= 0:
        raise InvalidArgument(
            f"{name} must be a positive duration, e.g. "
            + ("10" if name == "X-Request-Timeout" else "10S"),
            reason="BAD_TIMEOUT",
        )
    return min(value, CHECK_TIMEOUT_SECONDS if check else MAX_TIMEOUT_SECONDS)


def metadata_of(headers: Mapping[bytes, bytes], request_id: str) -> Metadata:
    """Metadata of a call: the request id, its trace, and what services may want to see."""
    carrier: dict[str, str] = {}
    telemetry.inject(carrier)
    pairs = [("x-request-id", request_id), *carrier.items()]
    for name in _FORWARDED:
        value = headers.get(name)
        if value is not None and _PRINTABLE.fullmatch(value):
            pairs.append((name.decode(), value.decode("ascii")))
    return tuple(pairs)


def _open(
    address: str,
    credentials: grpc.ChannelCredentials | None,
    options: list[tuple[str, str | int]],
) -> grpc.aio.Channel:
    # Not as services open theirs: here the token is that of whoever calls.
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _options(service: str) -> list[tuple[str, str | int]]:
    # Reads are repeated while a service restarts; writes never, their outcome is unknown here.
    reads = [
        {"service": rpc.containing_service.full_name, "method": rpc.name}
        for descriptor in SERVICES[service]
        for rpc in descriptor.methods
        if rpc.name.startswith(("Get", "List"))
    ]
    config = {
        "methodConfig": [
            {
                "name": reads,
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    return [
        ("grpc.service_config", orjson.dumps(config).decode()),
        ("grpc.enable_retries", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.keepalive_time_ms", 30000),
        ("grpc.keepalive_timeout_ms", 10000),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        # Connections of its own: two gateways in one process (a test) don't share back-off.
        ("grpc.use_local_subchannel_pool", 1),
    ]
