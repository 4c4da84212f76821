"""Request headers that stand for fields of the request, and the ETag of what is answered.

`Idempotency-Key` is the request_id of a create. `If-Match` is the etag that an update or a deletion
demands; the service compares, in its transaction. `If-None-Match` saves a body that the client has.
A header that a route cannot honour is refused: whoever sends it relies on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from detflow.errors import Aborted, InvalidArgument, Violation
from gateway.errors import ETAG_MISMATCH
from gateway.routes import Binding

MAX_KEY_LENGTH = 64

# The draft (draft-ietf-httpapi-idempotency-key-header) wants quotes; many send the key bare.
_KEY = re.compile(rb'"([ !#-\[\]-~]{1,64})"|([!#-~]{1,64})')
_ETAG = re.compile(rb'"[!#-~]{0,62}"')
_SAFE_METHODS = ("GET", "HEAD")


def takes_key(binding: Binding) -> bool:
    """Whether a route takes an Idempotency-Key."""
    return not binding.rpc.client_streaming and _has(binding.rpc.input_type, "request_id")


def takes_if_match(binding: Binding) -> bool:
    """Whether a route takes an If-Match with an ETag."""
    return binding.http_method not in _SAFE_METHODS and _etag_parent(binding) is not None


def has_etag(binding: Binding) -> bool:
    """Whether the answers of a route have an ETag."""
    return not binding.rpc.server_streaming and _has(binding.rpc.output_type, "etag")


def apply(binding: Binding, request: Any, headers: Mapping[bytes, bytes]) -> None:
    """Puts Idempotency-Key and If-Match into the request.

    Raises:
        Aborted: ETAG_MISMATCH, If-Match holds a weak ETag, which matches nothing (RFC 9110).
        InvalidArgument: A header is malformed, not taken here, or says something else than the
            field that it stands for.
    """
    key = headers.get(b"idempotency-key")
    if key is not None and binding.http_method == "POST":
        _fill(request, "request_id", _read_key(binding, key), "Idempotency-Key")
    condition = headers.get(b"if-match", b"*").strip()
    if condition != b"*" and binding.http_method not in _SAFE_METHODS:
        etag = _read_if_match(binding, condition)
        parent = _etag_parent(binding)
        _fill(getattr(request, parent) if parent else request, "etag", etag, "If-Match")


def etag_of(message: Message) -> str:
    """Returns the ETag of a resource, with its quotes; empty if it has none."""
    etag: str = getattr(message, "etag", "")
    return etag if _ETAG.fullmatch(etag.encode()) else ""


def names(if_none_match: bytes, etag: str) -> bool:
    """Whether a client has what this ETag stands for: whether If-None-Match names it (RFC 9110).

    Args:
        if_none_match: The header.
        etag: With its quotes.
    """
    known = [one.strip() for one in if_none_match.decode("latin-1").split(",")]
    return "*" in known or etag in known or f"W/{etag}" in known


def _read_key(binding: Binding, key: bytes) -> str:
    if not takes_key(binding):
        raise _refused(
            "Idempotency-Key",
            f"{binding.http_method} {binding.template.text} takes none: a repetition would not be"
            " recognised; send the request without it",
        )
    match = _KEY.fullmatch(key.strip())
    if match is None:
        raise _refused(
            "Idempotency-Key",
            f"must be 1 to {MAX_KEY_LENGTH} printable ASCII characters, in double quotes if there"
            " are blanks among them, such as a random UUID",
        )
    return (match[1] or match[2]).decode()


def _read_if_match(binding: Binding, condition: bytes) -> str:
    if _etag_parent(binding) is None:
        raise _refused(
            "If-Match",
            f"{binding.http_method} {binding.template.text} cannot be made to depend on an ETag;"
            " send the request without it",
        )
    if condition.startswith(b"W/"):
        raise Aborted(
            "If-Match compares strongly, and a weak ETag (W/) matches nothing; send the ETag of"
            " the answer as it is",
            reason=ETAG_MISMATCH,
        )
    if not _ETAG.fullmatch(condition):
        raise _refused("If-Match", "must be one ETag in its double quotes, or *")
    return condition.decode()


def _fill(target: Any, field: str, value: str, header: str) -> None:
    given = getattr(target, field)
    if given not in ("", value):
        raise _refused(header, f"is {value!r}, but {field} is {given!r}; send one of them")
    setattr(target, field, value)


def _refused(header: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"header {header}: {description}",
        reason="BAD_HEADER",
        violations=[Violation(header, "BAD_HEADER", description)],
    )


def _etag_parent(binding: Binding) -> str | None:
    """Where in the request the etag is: "" for the request itself, a field of it, or None."""
    message = binding.rpc.input_type
    if _has(message, "etag"):
        return ""
    inner = (
        message.fields_by_name[binding.body].message_type if binding.body not in ("", "*") else None
    )
    is_update = binding.http_method == "PATCH"
    return binding.body if is_update and inner is not None and _has(inner, "etag") else None


def _has(message: Any, name: str) -> bool:
    field = message.fields_by_name.get(name)
    return field is not None and field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated
