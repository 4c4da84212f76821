"""Errors over HTTP: `{"error": {"code", "status", "message", "details"}}` with google.rpc details.

One place turns whatever a backend or the gateway itself raises into a status, and a status into an
answer. Text that no detflow error wrote (gRPC's own messages hold addresses, tracebacks hold code)
never leaves the gateway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import orjson
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from detflow.errors import DOMAIN, DetflowError, to_status

HTTP_CODES = {
    "OK": 200,
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}
"""google.rpc.Code by name -> HTTP status, as google/rpc/code.proto says."""

ETAG_MISMATCH = "ETAG_MISMATCH"
"""Reason of a change of something that is no longer what the caller saw."""

_WRONG_OFFSET = "WRONG_OFFSET"
"""Reason of a write that does not begin where the upload ends: 409, as the drafts have it."""

# Said instead of gRPC's own text.
_PLAIN = {
    "UNAVAILABLE": "a service of detflow cannot be reached; retry",
    "DEADLINE_EXCEEDED": "the answer took too long; retry, or allow it 60 s with X-Request-Timeout",
    "CANCELLED": "the call was cancelled",
    "UNIMPLEMENTED": "the running service does not have this method; upgrade it",
    "RESOURCE_EXHAUSTED": "the request or the answer is larger than a message may be",
    "DATA_LOSS": "stored data is damaged",
}
_HIDDEN = ("UNKNOWN", "INTERNAL")
_INTERNAL_TEXT = "internal error; the log has more under this request id"


class HttpError(Exception):
    """An error of HTTP itself, with an HTTP status of its own (405, 413, ...).

    Args:
        http: HTTP status.
        code: google.rpc code by name.
        message: One sentence that names the value and the remedy.
        reason: Machine-readable, UPPER_SNAKE_CASE.
        headers: Headers of the answer, e.g. Allow.
    """

    def __init__(
        self,
        http: int,
        code: str,
        message: str,
        *,
        reason: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.http = http
        self.headers = dict(headers or {})
        self.status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message)
        self.status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))


def status_of(error: BaseException, request_id: str) -> status_pb2.Status:
    """Renders any exception as a status that may be shown to the caller."""
    if isinstance(error, HttpError):
        return error.status
    if isinstance(error, DetflowError):
        return _shown(to_status(error), request_id)
    if isinstance(error, grpc.aio.AioRpcError):
        return _shown(_of_rpc(error), request_id)
    return _shown(status_pb2.Status(code=code_pb2.INTERNAL), request_id)


def _of_rpc(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    code = error.code()
    number: int = code.value[0]
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                break
            if status.code == number:
                return status
    status = status_pb2.Status(code=number, message=_PLAIN.get(code.name, error.details() or ""))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=code.name, domain=DOMAIN))
    if code is grpc.StatusCode.UNAVAILABLE:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1)))
    return status


def _shown(status: status_pb2.Status, request_id: str) -> status_pb2.Status:
    shown = status_pb2.Status(code=status.code, message=status.message)
    hidden = name_of(status) in _HIDDEN
    for detail in status.details:
        kind = detail.TypeName()
        if kind.startswith("google.rpc.") and kind != "google.rpc.DebugInfo" and not hidden:
            shown.details.add().CopyFrom(detail)
    if hidden:
        shown.message = _INTERNAL_TEXT
        shown.details.add().Pack(error_details_pb2.ErrorInfo(reason=name_of(status), domain=DOMAIN))
        shown.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    return shown


def name_of(status: status_pb2.Status) -> str:
    """Name of a status' code; UNKNOWN for a number nobody defined."""
    names = code_pb2.Code.DESCRIPTOR.values_by_number
    return names[status.code].name if status.code in names else "UNKNOWN"


def http_of(status: status_pb2.Status) -> int:
    """HTTP status that stands for a code."""
    return HTTP_CODES[name_of(status)]


def body_of(status: status_pb2.Status, http: int) -> dict[str, Any]:
    """The JSON value of an error."""
    return {
        "error": {
            "code": http,
            "status": name_of(status),
            "message": status.message,
            "details": [_detail(one) for one in status.details],
        }
    }


def answer(
    error: BaseException, request_id: str, *, is_conditional: bool = False
) -> tuple[int, dict[str, str], bytes]:
    """Returns HTTP status, headers and body for any exception.

    Args:
        error: What was raised.
        request_id: Shown with internal errors.
        is_conditional: Whether the request had an If-Match: then it is 412 that it does not hold.
    """
    status = status_of(error, request_id)
    http = error.http if isinstance(error, HttpError) else http_of(status)
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    retry, info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.reason == _WRONG_OFFSET:
            http = 409
            headers["upload-offset"] = info.metadata["committed_bytes"]
        if is_conditional and info.reason == ETAG_MISMATCH:
            http = 412
        if detail.Unpack(retry):
            delay = retry.retry_delay
            headers["retry-after"] = str(max(delay.seconds + (delay.nanos > 0), 1))
    if http == 401:
        headers["www-authenticate"] = "Bearer"
    return http, headers, orjson.dumps(body_of(status, http))


def _detail(detail: Any) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json_format.MessageToDict(detail)
    except (TypeError, DecodeError):  # a type of google.rpc that this gateway does not know yet
        return {"@type": detail.type_url}
    return value
