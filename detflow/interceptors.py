"""What happens around every call: trace, guard, validation, errors to statuses, log, metrics.

Servicers just raise; `Boundary` is the only place that turns exceptions into gRPC statuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn, Self, TypeAlias

import grpc
import grpc.aio
import protovalidate
import structlog
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status
from prometheus_client import Counter, Histogram

from detflow import access, telemetry
from detflow.errors import (
    Cancelled,
    DeadlineExceeded,
    DetflowError,
    Internal,
    InvalidArgument,
    Unimplemented,
    Violation,
    to_trailer,
)
from detflow.guard import Admission, Guard

log = telemetry.get_logger(__name__)

REQUEST_ID = "x-request-id"
_HEALTH = "/grpc.health.v1.Health/"
_UNKNOWN = "/unknown/unknown"  # what is counted of methods that are not there
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # others are not repeated in logs and answers
_UNARY_SECONDS = 60.0
_TRIAL_SECONDS = 600.0
"""Of a call that tries out what it is asked to do (`validate_only`), a training on its data."""
_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time a call took on the server.",
    ["grpc_service", "grpc_method", "grpc_code"],
)
_HANDLED = Counter(
    "grpc_server_handled",
    "Calls that were answered.",
    ["grpc_service", "grpc_method", "grpc_code"],
)
_validator = protovalidate.Validator()

Context: TypeAlias = Any  # grpc.aio.ServicerContext; its stubs lack abort_with_status


def check(request: Any) -> None:
    """Validates a message by the rules in its proto.

    Raises:
        InvalidArgument: One violation per broken rule, with the field's path.
    """
    if isinstance(request, _Unreadable):
        raise InvalidArgument(
            "the message cannot be read; make it from the .proto files of this version of detflow",
            reason="MALFORMED_MESSAGE",
        )
    found = _validator.collect_violations(request)
    violations = [
        Violation(
            ".".join(_element(e) for e in v.proto.field.elements) if v.proto.field else "",
            v.proto.rule_id.replace(".", "_").upper(),
            _description(request, v),
        )
        for v in found
    ] or [
        Violation(path, "BAD_TEXT", "must not contain the character U+0000; take it out")
        for path in _find_nul(request, "")
    ]
    if not violations:
        return
    first = violations[0]
    raise InvalidArgument(
        f"{first.field or 'request'}: {first.description}",
        reason="INVALID_FIELD",
        violations=violations,
    )


def _description(request: Message, violation: Any) -> str:
    """Says what is wrong; of an enum by the names of its values, where the rule has numbers."""
    kind, _, rule = violation.proto.rule_id.partition(".")
    if violation.proto.rule_id == "string.in":
        return f"must be one of {', '.join(one or 'nothing' for one in violation.rule_value)}"
    if kind != "enum":
        return str(violation.proto.message)
    descriptor: Any = request.DESCRIPTOR
    *above, last = violation.proto.field.elements
    for element in above:
        descriptor = descriptor.fields_by_name[element.field_name].message_type
    values = descriptor.fields_by_name[last.field_name].enum_type.values
    given = violation.rule_value if rule in ("in", "not_in") else ()
    allowed = [one.name for one in values if not given or (one.number in given) == (rule == "in")]
    return f"must be one of {', '.join(allowed)}"


class _Unreadable:
    """Stands for a request whose bytes are no such message."""


def _reading(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Leaves it to the call to refuse what cannot be read: gRPC itself would answer UNKNOWN."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable()

    return read


def _find_nul(message: Any, path: str) -> Iterator[str]:
    """Finds text that Postgres cannot hold."""
    for field in _fields_with_text(message.DESCRIPTOR):
        value, here = getattr(message, field.name), f"{path}{field.name}"
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key, one in value.items():
                if isinstance(key, str) and "\0" in key:
                    yield here
                yield from _find_nul_in(one, f"{here}[{key!r}]")
        elif field.is_repeated:
            for index, one in enumerate(value):
                yield from _find_nul_in(one, f"{here}[{index}]")
        elif field.message_type is None or message.HasField(field.name):
            yield from _find_nul_in(value, here)


def _find_nul_in(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Message):
        yield from _find_nul(value, f"{path}.")
    elif isinstance(value, str) and "\0" in value:
        yield path


@functools.cache
def _fields_with_text(message: Descriptor) -> list[FieldDescriptor]:
    kinds = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE)
    return [field for field in message.fields if field.type in kinds]


def _element(element: Any) -> str:
    subscript = element.subscript
    return f"{element.field_name}[{subscript.value}]" if subscript else str(element.field_name)


class Boundary(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every method.

    Args:
        guard: What every call but health checks has to pass; None lets everybody in.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        method, guard = handler_call_details.method, self._guard
        ours = method.startswith("/detflow.")
        if method.startswith(_HEALTH) or (guard is None and not (ours and handler)):
            return handler
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(_unknown(guard))
        inner = (
            handler.unary_unary
            or handler.stream_unary
            or handler.unary_stream
            or handler.stream_stream
        )
        streams_in = handler.request_streaming
        if handler.response_streaming:
            wrapped: Any = _streaming(method, inner, guard, streams_in=streams_in)
            make: Any = (
                grpc.stream_stream_rpc_method_handler
                if streams_in
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            wrapped = _answering(method, inner, guard, streams_in=streams_in)
            make = (
                grpc.stream_unary_rpc_method_handler
                if streams_in
                else grpc.unary_unary_rpc_method_handler
            )
        return make(wrapped, _reading(handler.request_deserializer), handler.response_serializer)


def _answering(method: str, inner: Any, guard: Guard | None, *, streams_in: bool) -> Any:
    async def call(request: Any, context: Context) -> Any:
        async with _Call(method, context) as this, this.admission(guard) as admitted:
            if streams_in:
                return await inner(_checked(request, admitted), context)
            check(request)
            if admitted:
                await admitted.authorize(request)
            is_trial = getattr(request, "validate_only", False)
            async with asyncio.timeout(_TRIAL_SECONDS if is_trial else _UNARY_SECONDS):
                return await inner(request, context)

    return call


def _streaming(method: str, inner: Any, guard: Guard | None, *, streams_in: bool) -> Any:
    # A coroutine that writes, not a generator: a generator may be closed from another context,
    # where the span could not be ended.
    async def call(request: Any, context: Context) -> None:
        async with _Call(method, context) as this, this.admission(guard) as admitted:
            if streams_in:
                request = _checked(request, admitted)
            else:
                check(request)
                if admitted:
                    await admitted.authorize(request)
            async with contextlib.aclosing(inner(request, context)) as responses:
                async for response in responses:
                    await context.write(response)

    return call


def _unknown(guard: Guard | None) -> Any:
    """Refuses a method that is not there, and who may not even know that."""

    async def call(requests: Any, context: Context) -> None:
        async with _Call(_UNKNOWN, context) as this, this.admission(guard):
            raise Unimplemented("there is no such method here")

    return call


async def _checked(requests: AsyncIterator[Any], admitted: Admission | None) -> AsyncIterator[Any]:
    async for request in requests:
        check(request)
        if admitted:
            await admitted.authorize(request)
        yield request


class _Call:
    """One call: its span, its log line, its status."""

    def __init__(self, method: str, context: Context) -> None:
        self._method = method
        self._context = context
        self._start = time.perf_counter()

    def admission(
        self, guard: Guard | None
    ) -> contextlib.AbstractAsyncContextManager[Admission | None]:
        """Returns what to enter to be let in; None is what comes of it where access is open."""
        if guard is None:
            access.enter(access.OWNER)
            return contextlib.nullcontext()
        return guard.admit(self._method, self._context, self._request_id)

    async def __aenter__(self) -> Self:
        carrier = {str(k): str(v) for k, v in self._context.invocation_metadata() or ()}
        self._span = telemetry.span(self._method, carrier)
        trace_id = self._span.__enter__()
        given = carrier.get(REQUEST_ID, "")
        self._request_id = given if _REQUEST_ID.fullmatch(given) else trace_id
        structlog.contextvars.bind_contextvars(request_id=self._request_id)
        self._context.set_trailing_metadata(((REQUEST_ID, self._request_id),))
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        code = "OK"
        try:
            if error is not None:
                translated = self._translate(error)
                code = translated.code.name
                await self._abort(translated)
        finally:
            service, method = self._method.removeprefix("/").split("/")
            _HANDLED.labels(service, method, code).inc()
            _SECONDS.labels(service, method, code).observe(time.perf_counter() - self._start)
            self._span.__exit__(None, None, None)

    def _translate(self, error: BaseException) -> DetflowError:
        if isinstance(error, DetflowError):
            log.info("call refused", method=self._method, code=error.code.name, reason=error.reason)
            return error
        if isinstance(error, asyncio.CancelledError):
            return Cancelled("the caller went away")
        if isinstance(error, TimeoutError):
            log.warning("call took too long", method=self._method)
            return DeadlineExceeded("the server needed too long; retry", reason="SERVER_TIMEOUT")
        log.error("call failed", method=self._method, exc_info=error)
        return Internal(
            f"internal error; report request id {self._request_id}",
            metadata={"request_id": self._request_id},
        )

    async def _abort(self, error: DetflowError) -> NoReturn:
        if isinstance(error, Cancelled):
            raise asyncio.CancelledError
        await self._context.abort_with_status(rpc_status.to_status(to_trailer(error)))
        raise AssertionError("abort_with_status raises")
