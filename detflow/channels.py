"""gRPC channels between services, and for the client: deadlines, retries, tokens, typed errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from google.rpc import status_pb2
from grpc_status import rpc_status
from opentelemetry import propagate

from detflow import tls
from detflow.errors import DetflowError, from_status
from detflow.settings import Settings

DEADLINE_SECONDS = 5.0
_UPLOADS = (
    ("DatasetService", "UploadArchive"),
    ("DatasetService", "WriteUpload"),
    ("WeightsService", "UploadWeights"),
    ("PredictionService", "PredictImage"),
    ("PredictionService", "PredictImages"),
)
"""Streams from the client. gRPC must not repeat them: it may end the process while it tries
("ILLEGAL STATE: FORWARDED_BATCH" in 1.85), and who sends knows better where to go on."""

_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            },
            {
                "name": [
                    {"service": f"detflow.v1.{service}", "method": method}
                    for service, method in _UPLOADS
                ]
            },
        ]
    }
)
OPTIONS = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.max_receive_message_length", 32 << 20),  # a prediction may bring a picture with it
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class _Calling:
    """Adds the token of the services and the current trace to the metadata of a call."""

    def __init__(self, token: str) -> None:
        self._token = (("authorization", f"Bearer {token}"),) if token else ()

    def details(
        self, given: grpc.aio.ClientCallDetails, timeout: float | None
    ) -> grpc.aio.ClientCallDetails:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return grpc.aio.ClientCallDetails(
            method=given.method,
            timeout=timeout,
            metadata=grpc.aio.Metadata(*(given.metadata or ()), *self._token, *carrier.items()),
            credentials=given.credentials,
            wait_for_ready=given.wait_for_ready,
        )


class _Unary(_Calling, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Of calls with one answer, which get the default deadline unless they have one."""

    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        timeout = client_call_details.timeout or DEADLINE_SECONDS
        return await continuation(self.details(client_call_details, timeout), request)


class _Streams(_Calling):
    """Of calls with many answers, or many requests."""

    async def _go_on(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        details = self.details(client_call_details, client_call_details.timeout)
        return await continuation(details, request)


# gRPC takes one object for one kind of calls only.
class _UnaryStream(_Streams, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    intercept_unary_stream: Any = _Streams._go_on


class _StreamUnary(_Streams, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    intercept_stream_unary: Any = _Streams._go_on


class _StreamStream(_Streams, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    intercept_stream_stream: Any = _Streams._go_on


def credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """Returns what a process trusts and shows where the services have TLS, or None.

    Raises:
        InvalidArgument: A file of the settings cannot be used.
    """
    if not settings.tls_ca_file:
        return None
    return tls.client_credentials(
        ca_file=settings.tls_ca_file,
        cert_file=settings.tls_cert_file,
        key_file=settings.tls_key_file,
    )


def channel(address: str, settings: Settings | None = None) -> grpc.aio.Channel:
    """Opens a channel to a service; unary calls get a deadline and are retried on UNAVAILABLE.

    Args:
        address: host:port of the service.
        settings: Of the service that calls: its token, and whether there is TLS. None calls as
            nobody and without TLS.

    Raises:
        InvalidArgument: A file of TLS cannot be used.
    """
    settings = settings or Settings()
    token = settings.service_token
    kinds = (_Unary, _UnaryStream, _StreamUnary, _StreamStream)
    interceptors: list[Any] = [kind(token) for kind in kinds]
    trusted = credentials(settings)
    if trusted is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS, interceptors=interceptors)
    return grpc.aio.secure_channel(address, trusted, options=OPTIONS, interceptors=interceptors)


@contextlib.contextmanager
def translate() -> Iterator[None]:
    """Turns a failed call into the DetflowError that the other side raised."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def from_rpc_error(error: grpc.RpcError) -> DetflowError:
    """Rebuilds the error of a failed call, sync or async."""
    call: Any = error  # both flavours of RpcError are also the call
    status = rpc_status.from_call(call)
    if status is None:
        code = call.code()
        status = status_pb2.Status(code=code.value[0], message=call.details() or code.name)
    return from_status(status)
