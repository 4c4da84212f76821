"""Between HTTP and protobuf: path, query and JSON body become a request, its answer JSON.

JSON is protojson: camelCase (snake_case is read too), enums by name, 64-bit integers as strings.
What is silently dropped elsewhere is refused here with the field's name: unknown fields, repeated
keys, values out of range.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import parse_qsl

import orjson
from google.api import field_behavior_pb2
from google.protobuf import field_mask_pb2, json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from detflow.errors import InvalidArgument, Violation
from gateway import diagnose
from gateway.routes import Binding

_FIELD_MASK = "google.protobuf.FieldMask"
_NOT_DATA = (field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IDENTIFIER)
_MAX_QUERY_PARAMETERS = 200


def decode_request(
    binding: Binding, values: Sequence[str], query: bytes, body: bytes | None
) -> Message:
    """Builds the RPC's request.

    Args:
        binding: The route; of an upload this makes its first message.
        values: Path variables in the order of the template.
        query: Raw query string.
        body: Raw JSON body; None or empty for none.

    Raises:
        InvalidArgument: Something does not fit; each violation names its field.
    """
    message = binding.request()
    data = _parse_body(binding, body)
    if data is not None:
        fill(message, {binding.body: data} if binding.body != "*" else data)
        _check_agreement(binding, values, data)
    if query:
        fill(message, _parse_query(binding, query))
    if binding.http_method == "PATCH" and isinstance(data, dict):
        _infer_update_mask(binding, message, data)
    for variable, value in zip(binding.template.variables, values, strict=True):
        target: Any = message
        *parents, last = variable.path.split(".")
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return message


def encode(message: Message) -> bytes:
    """Renders an answer as JSON; counts of 0 and empty lists show."""
    return orjson.dumps(to_json(message))


def to_json(message: Message) -> dict[str, Any]:
    """Renders a message as a JSON value; error details of a type unknown here are left out."""
    try:
        return _message_to_dict(message)
    except TypeError:
        known = type(message)()
        known.CopyFrom(message)
        _drop_unknown_details(known)
        return _message_to_dict(known)


def _message_to_dict(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = json_format.MessageToDict(
        message, always_print_fields_with_no_presence=True
    )
    return value


def _drop_unknown_details(message: Message) -> None:
    known = error_details_pb2.DESCRIPTOR.message_types_by_name
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        items = list(value) if field.is_repeated else [value]
        if field.message_type.full_name == "google.protobuf.Any" and field.is_repeated:
            del value[:]
            value.extend(one for one in items if one.TypeName().split(".")[-1] in known)
        else:
            for item in items:
                _drop_unknown_details(item)


def fill(message: Message, data: Any) -> None:
    """Reads protojson into a message.

    Raises:
        InvalidArgument: It does not fit; the violations name the fields.
    """
    violations = diagnose.explain(cast(Descriptor, message.DESCRIPTOR), data)
    cause: Exception | None = None
    if not violations:
        try:
            json_format.ParseDict(data, message)
        except (json_format.ParseError, ValueError, TypeError, RecursionError) as error:
            cause = error
            violations = [Violation("", "INVALID_JSON", "the value does not fit the request")]
    if violations:
        first = violations[0]
        raise InvalidArgument(
            f"{first.field or 'body'}: {first.description}",
            reason="INVALID_JSON",
            violations=violations,
        ) from cause


def _parse_body(binding: Binding, body: bytes | None) -> Any:
    if not body:
        if binding.body and binding.body != "*":
            raise InvalidArgument(
                f"the body must be {binding.body} as JSON; it is empty",
                reason="EMPTY_BODY",
                violations=[Violation(binding.body, "REQUIRED", "send it as the JSON body")],
            )
        return None
    if not binding.body:
        raise InvalidArgument(
            f"{binding.http_method} {binding.template.text} takes no body", reason="UNEXPECTED_BODY"
        )
    try:
        data = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except InvalidArgument:
        raise
    except RecursionError as error:
        raise InvalidArgument("the body is nested too deeply", reason="TOO_DEEP") from error
    except ValueError as error:
        where = (
            f" at line {error.lineno} column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else ""
        )
        raise InvalidArgument(
            f"the body is not JSON in UTF-8{where}", reason="MALFORMED_JSON"
        ) from error
    if not isinstance(data, dict):
        raise InvalidArgument("the body must be a JSON object", reason="INVALID_JSON")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidArgument(
            f"the JSON key {twice!r} is there twice; keep one",
            reason="DUPLICATE_KEY",
            violations=[Violation(twice, "DUPLICATE_KEY", "the key is there twice; keep one")],
        )
    return value


def _refuse_constant(text: str) -> Any:
    raise InvalidArgument(f"{text} is not JSON", reason="MALFORMED_JSON")


def _parse_query(binding: Binding, query: bytes) -> dict[str, Any]:
    try:
        pairs = parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MAX_QUERY_PARAMETERS,
        )
    except ValueError as error:
        raise InvalidArgument(
            "the query string must be percent-encoded UTF-8 with at most "
            f"{_MAX_QUERY_PARAMETERS} parameters",
            reason="BAD_QUERY",
        ) from error
    data: dict[str, Any] = {}
    for key, text in pairs:
        path, field = _query_field(binding, key)
        parent = data
        for name in path[:-1]:
            parent = parent.setdefault(name, {})
        value = diagnose.from_text(field, text)
        if field.is_repeated:
            parent.setdefault(path[-1], []).append(value)
        elif path[-1] in parent:
            raise _bad_parameter(key, "DUPLICATE_KEY", "is there twice; keep one")
        else:
            parent[path[-1]] = value
    return data


def _query_field(binding: Binding, key: str) -> tuple[list[str], FieldDescriptor]:
    """Resolves a query parameter to its path of JSON names, and the leaf field."""
    if binding.query is None:
        raise _bad_parameter(key, "UNKNOWN_FIELD", "is not known; this route takes none")
    message: Descriptor | None = binding.rpc.input_type
    path: list[str] = []
    names: list[str] = []
    field: FieldDescriptor | None = None
    for name in (binding.query + "." + key if binding.query else key).split("."):
        if message is None or (field is not None and field.is_repeated):
            raise _bad_parameter(key, "UNKNOWN_FIELD", "is no field of the request")
        field = diagnose.field_named(message, name)
        if field is None:
            raise _bad_parameter(key, "UNKNOWN_FIELD", "is no field of the request")
        path.append(field.json_name)
        names.append(field.name)
        message = field.message_type
    assert field is not None
    dotted = ".".join(names)
    if any(dotted == v.path or v.path.startswith(f"{dotted}.") for v in binding.template.variables):
        raise _bad_parameter(key, "IN_PATH", "is taken from the path")
    if binding.body == "*" or names[0] == binding.body:
        raise _bad_parameter(key, "IN_BODY", "belongs into the JSON body")
    if field.message_type is not None and not diagnose.has_text_form(field.message_type):
        raise _bad_parameter(key, "NOT_A_VALUE", "is an object; name one of its fields with a dot")
    return path, field


def _bad_parameter(key: str, reason: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"query parameter {key}: {description}",
        reason="BAD_QUERY",
        violations=[Violation(key, reason, description)],
    )


def _check_agreement(binding: Binding, values: Sequence[str], data: dict[str, Any]) -> None:
    """Refuses a body that names another resource than the path does."""
    for variable, value in zip(binding.template.variables, values, strict=True):
        parts = variable.path.split(".")
        if binding.body != "*":
            if parts[0] != binding.body:
                continue
            parts = parts[1:]
        inside: Any = data
        message: Descriptor | None = binding.rpc.input_type
        if binding.body != "*" and message is not None:
            message = message.fields_by_name[binding.body].message_type
        for part in parts:
            if message is None or not isinstance(inside, dict):
                break
            field = message.fields_by_name[part]
            inside = inside.get(field.json_name, inside.get(field.name))
            message = field.message_type
        if isinstance(inside, str) and inside not in ("", value):
            raise InvalidArgument(
                f"{variable.path} is {inside!r} in the body but {value!r} in the path",
                reason="PATH_MISMATCH",
                violations=[Violation(variable.path, "PATH_MISMATCH", f"must be {value!r}")],
            )


def _infer_update_mask(binding: Binding, message: Message, data: dict[str, Any]) -> None:
    """Names the fields of the body in `update_mask`, if the caller gave none (AIP-134).

    Fields that only the server sets, and the etag, which is a condition and no data, are left out.
    """
    mask = binding.rpc.input_type.fields_by_name.get("update_mask")
    if (
        mask is None
        or mask.message_type is None
        or mask.message_type.full_name != _FIELD_MASK
        or message.HasField("update_mask")
        or binding.body == "*"
    ):
        return
    resource = binding.rpc.input_type.fields_by_name[binding.body].message_type
    assert resource is not None
    inferred = field_mask_pb2.FieldMask(paths=_paths(resource, data, ""))
    message.MergeFrom(binding.request(update_mask=inferred))


def _paths(message: Descriptor, data: dict[str, Any], prefix: str) -> list[str]:
    paths: list[str] = []
    for name, value in data.items():
        field = diagnose.field_named(message, name)
        if field is None or (not prefix and field.name == "etag"):
            continue
        behaviours = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        if any(one in _NOT_DATA for one in behaviours):
            continue
        nested = field.message_type
        if (
            isinstance(value, dict)
            and value
            and nested is not None
            and not field.is_repeated
            and not nested.full_name.startswith("google.protobuf.")
        ):
            paths += _paths(nested, value, f"{prefix}{field.name}.")
        else:
            paths.append(f"{prefix}{field.name}")
    return paths
