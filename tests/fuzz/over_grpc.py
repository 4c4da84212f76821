"""Fuzzed calls by gRPC: every method, streams in both directions, with random and damaged bytes."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from random import Random
from typing import Any

import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc

from detflow.channels import OPTIONS
from gateway.routes import SERVICES
from tests.fuzz.cases import PATIENCE_SECONDS, Outcome
from tests.fuzz.messages import Messages, Names, damaged

METHODS = [
    (service, rpc)
    for service, descriptors in SERVICES.items()
    for descriptor in descriptors
    for rpc in descriptor.methods
]
# What a caller has not caused by what it sent, or cannot do anything about.
FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}
_ANSWERS_READ = 3
# What the client's library says when the answer came before it had sent all of a stream.
_BROKEN_OFF = "Internal error from Core"
_WATCH_SECONDS = 0.2
_LARGE = 5 << 20  # more than a message may have
_UPLOADED = (b"", b"PK\x03\x04", b"\x1f\x8b\x08", b"\xff\xd8\xff\xe0", b"x" * 100_000)


class GrpcSurface:
    """Sends cases to the services.

    Args:
        addresses: gRPC address by service.
        names: Resources that there are.
        token: Shown with every call.
    """

    def __init__(self, addresses: Mapping[str, str], names: Names, token: str) -> None:
        self._names = names
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._channels = {
            service: grpc.aio.insecure_channel(address, options=OPTIONS)
            for service, address in addresses.items()
        }

    async def close(self) -> None:
        await asyncio.gather(*(channel.close(None) for channel in self._channels.values()))

    async def serving(self) -> dict[str, bool]:
        """Asks every service whether it serves."""
        checks = {
            service: health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=10
            )
            for service, channel in self._channels.items()
        }
        return {
            service: (await check).status == health_pb2.HealthCheckResponse.SERVING
            for service, check in checks.items()
        }

    async def send(self, rng: Random) -> Outcome:
        """Sends the case that `rng` makes."""
        service, rpc = rng.choice(METHODS)
        path = f"/{rpc.containing_service.full_name}/{rpc.name}"
        if rng.random() < 0.01:
            path += rng.choice(("x", "/x", "%00"))
        requests = self._requests(rng, rpc)
        odd = _odd_metadata(rng)
        seconds = rng.choice((PATIENCE_SECONDS,) * 20 + (0.001, 0.02))
        channel = self._channels[service]
        if rpc.client_streaming and rpc.server_streaming:
            make: Any = channel.stream_stream
        elif rpc.client_streaming:
            make = channel.stream_unary
        else:
            make = channel.unary_stream if rpc.server_streaming else channel.unary_unary
        call = make(path, request_serializer=None, response_deserializer=None)(
            _each(requests) if rpc.client_streaming else requests[0],
            timeout=seconds,
            metadata=(*self._metadata, *odd),
        )
        code, details = await _outcome(call, streams=rpc.server_streaming)
        wrong = code in FAULTS and path.endswith(f"/{rpc.name}")
        sent = f"{path} {odd} {[one[:2000].hex() for one in requests[:10]]}"
        return Outcome(f"{rpc.name} {code.name}", f"{code.name}: {details}" * wrong, sent)

    def _requests(self, rng: Random, rpc: MethodDescriptor) -> Sequence[bytes]:
        messages = Messages(rng, self._names)
        if not rpc.client_streaming:
            return [_bytes(rng, messages, rpc)]
        requests: list[bytes] = []
        for _ in range(rng.choice((0, 1, 2, 3, 5))):
            requests.append(_bytes(rng, messages, rpc))
        if rng.random() < 0.6:  # as it should be: what the bytes are of, bytes, how many
            make = message_factory.GetMessageClass(rpc.input_type)
            opening = make()
            messages.fill(opening, rpc.input_type.fields[0], 1)
            data = rng.choice(_UPLOADED)
            whole = [opening, make(chunk=data)]
            if "size_bytes" in rpc.input_type.fields_by_name:
                whole.append(make(size_bytes=len(data)))
            requests = [*(one.SerializeToString() for one in whole), *requests[:1]]
        return requests


def _bytes(rng: Random, messages: Messages, rpc: MethodDescriptor) -> bytes:
    kind = rng.random()
    data = messages.make(rpc.input_type).SerializeToString()
    if kind < 0.25:
        return damaged(rng, data)
    return rng.randbytes(_LARGE) if kind > 0.999 else data


def _odd_metadata(rng: Random) -> Sequence[tuple[str, str | bytes]]:
    return rng.choice(
        (
            *[()] * 12,
            (("x-request-id", rng.choice(("a b", "x" * 500, "%00", "../x"))),),
            (("traceparent", rng.choice(("00-0-0-0", "x", "00-" + "f" * 32 + "-" + "f" * 16))),),
            (("x-bin-bin", rng.randbytes(20)),),
            (("accept-language", "ko"), ("cookie", "a=b"), ("x-forwarded-for", "127.0.0.1")),
            tuple((f"x-{number}", "y" * 50) for number in range(40)),
        )
    )


async def _each(requests: Sequence[bytes]) -> AsyncIterator[bytes]:
    for one in requests:
        yield one


async def _outcome(call: Any, *, streams: bool) -> tuple[grpc.StatusCode, str]:
    """Waits for an answer, of a stream for its beginning; returns how it ended, and its text."""
    try:
        if streams:
            await _read_some(call)
        else:
            await call
    except asyncio.CancelledError:
        if not call.cancelled():  # it is we who are
            raise
        return grpc.StatusCode.CANCELLED, ""
    except grpc.aio.AioRpcError as error:
        if error.details() == _BROKEN_OFF:
            return grpc.StatusCode.CANCELLED, ""
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def _read_some(call: Any) -> None:
    try:
        for _ in range(_ANSWERS_READ):
            reading = asyncio.create_task(call.read())
            done, _ = await asyncio.wait({reading}, timeout=_WATCH_SECONDS)
            if not done:
                call.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                return
            if reading.result() is grpc.aio.EOF:  # type: ignore[attr-defined]
                return
    finally:
        call.cancel()
