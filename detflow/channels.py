"""gRPC channels between services, and for the client: deadlines, retries, traces, typed errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import grpc.aio
from google.rpc import status_pb2
from grpc_status import rpc_status
from opentelemetry import propagate

from detflow.errors import DetflowError, from_status

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


class _DeadlineAndTrace(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Gives a unary call the default deadline, unless it has one, and the current trace."""

    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        details = grpc.aio.ClientCallDetails(
            method=client_call_details.method,
            timeout=client_call_details.timeout or DEADLINE_SECONDS,
            metadata=grpc.aio.Metadata(*(client_call_details.metadata or ()), *carrier.items()),
            credentials=client_call_details.credentials,
            wait_for_ready=client_call_details.wait_for_ready,
        )
        return await continuation(details, request)


def channel(address: str) -> grpc.aio.Channel:
    """Opens a channel to a service; unary calls get a deadline and are retried on UNAVAILABLE."""
    return grpc.aio.insecure_channel(
        address, options=OPTIONS, interceptors=[cast(Any, _DeadlineAndTrace())]
    )


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
