"""The errors of detflow, and their one translation to and from google.rpc.Status.

Handlers raise these; the interceptor in `detflow.server` turns them into gRPC statuses, the client
turns statuses back into them, and failures found while working are stored on the resource in the
same form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import quote

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from detflow.v1 import common_pb2

DOMAIN = "detflow"
MAX_VIOLATIONS = 100
_TRAILER_BYTES = 7000  # of the 8 KiB; the rest is for other headers


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with what a user sent.

    Attributes:
        field: Path inside the request, or inside the archive with its line or element.
        reason: Machine-readable, UPPER_SNAKE_CASE.
        description: Sentence for a person: the value and the remedy.
    """

    field: str
    reason: str
    description: str


class DetflowError(Exception):
    """Base of every error that has a status code.

    Args:
        message: One sentence that names the value and the remedy.
        reason: Machine-readable reason, UPPER_SNAKE_CASE; by default the name of the status code.
        violations: What is wrong in detail; at most 100 are sent.
        total: How many violations there are in all, if more than given.
        metadata: Further facts for programs, e.g. the name of the resource in the way.
        retry_seconds: When to try again; 0 says nothing of it.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[Violation] = (),
        total: int | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_seconds: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code.name
        self.violations = tuple(violations[:MAX_VIOLATIONS])
        self.total = len(violations) if total is None else total
        self.metadata = dict(metadata or {})
        self.retry_seconds = retry_seconds


class InvalidArgument(DetflowError):
    """The request or the data in it is wrong, whatever the state of the system."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class FailedPrecondition(DetflowError):
    """The resource is not in a state that allows this."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotFound(DetflowError):
    """There is no such resource, or not for this caller."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(DetflowError):
    """Something with this identity exists."""

    code = grpc.StatusCode.ALREADY_EXISTS


class Aborted(DetflowError):
    """A concurrent change came first; read again and retry."""

    code = grpc.StatusCode.ABORTED


class ResourceExhausted(DetflowError):
    """A limit is reached."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class OutOfRange(DetflowError):
    """A position is beyond what is kept."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Unavailable(DetflowError):
    """Something needed is away for now; retry."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(DetflowError):
    """The caller's time ran out."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DataLoss(DetflowError):
    """Stored bytes are gone or differ from their recorded hash."""

    code = grpc.StatusCode.DATA_LOSS


class Unauthenticated(DetflowError):
    """The caller is not known."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(DetflowError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Cancelled(DetflowError):
    """The caller gave up."""

    code = grpc.StatusCode.CANCELLED


class Unimplemented(DetflowError):
    """The server does not have this method."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(DetflowError):
    """A defect of detflow; the message holds nothing but the request id."""

    code = grpc.StatusCode.INTERNAL


def bad_field(field: str, reason: str, problem: str) -> InvalidArgument:
    """Makes the error for one field of a request; `problem` names the value and the remedy."""
    return InvalidArgument(
        f"{field}: {problem}", reason=reason, violations=[Violation(field, reason, problem)]
    )


def not_found(name: str, remedy: str = "") -> NotFound:
    """Makes the error for a resource that is not there; one of another project is told the same."""
    return NotFound(f"{name} does not exist{remedy}", metadata={"resource": name})


_BY_CODE: dict[int, type[DetflowError]] = {
    cls.code.value[0]: cls for cls in DetflowError.__subclasses__()
}


def to_status(error: DetflowError) -> status_pb2.Status:
    """Renders an error: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata)
    )
    if error.violations:
        info.metadata["violations_total"] = str(error.total)
    status.details.add().Pack(info)
    if error.violations:
        status.details.add().Pack(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=v.field, reason=v.reason, description=v.description
                    )
                    for v in error.violations
                ]
            )
        )
    retry_seconds = error.retry_seconds or int(isinstance(error, Unavailable))
    if retry_seconds:
        delay = Duration(seconds=retry_seconds)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def to_trailer(error: DetflowError) -> status_pb2.Status:
    """Renders an error small enough to end a call with.

    A status travels in the trailing headers, of which clients take 8 KiB; with more they see
    RESOURCE_EXHAUSTED instead. So long texts are cut and the last violations left out; their total
    is in the ErrorInfo.
    """
    status = to_status(error)
    if _header_bytes(status) <= _TRAILER_BYTES:
        return status
    short = type(error)(
        _cut(error.message, 500),
        reason=error.reason,
        total=error.total,
        retry_seconds=error.retry_seconds,
        metadata={key: _cut(value, 200) for key, value in [*error.metadata.items()][:8]},
    )
    violations: list[Violation] = []
    room = _TRAILER_BYTES - _header_bytes(to_status(short)) - 100
    for one in error.violations:
        one = Violation(_cut(one.field, 200), one.reason, _cut(one.description, 300))
        num_bytes = len((one.field + one.reason + one.description).encode())
        room -= num_bytes * 4 // 3 + 20
        if room < 0:
            break
        violations.append(one)
    short.violations = tuple(violations)
    return to_status(short)


def _header_bytes(status: status_pb2.Status) -> int:
    """Size of a status in headers: all of it in base64, and its message percent-encoded."""
    return len(status.SerializeToString()) * 4 // 3 + len(quote(status.message))


def _cut(text: str, num_bytes: int) -> str:
    """Shortens a text to a number of bytes in UTF-8."""
    data = text.encode()
    return text if len(data) <= num_bytes else data[:num_bytes].decode(errors="ignore") + "..."


def from_status(status: status_pb2.Status) -> DetflowError:
    """Rebuilds the error that `to_status` rendered."""
    reason, metadata, total = "", dict[str, str](), None
    violations: list[Violation] = []
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
            total = int(metadata.pop("violations_total", "0")) or None
        elif detail.Unpack(bad):
            violations = [Violation(v.field, v.reason, v.description) for v in bad.field_violations]
    cls = _BY_CODE.get(status.code, DetflowError)
    return cls(status.message, reason=reason, violations=violations, total=total, metadata=metadata)


def failure(error: DetflowError) -> common_pb2.Failure:
    """Renders an error to be stored on a resource."""
    return common_pb2.Failure(status=to_status(error))
