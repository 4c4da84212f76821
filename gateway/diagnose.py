"""Checks a JSON value against a message, field by field, and says everything that does not fit.

It runs before protobuf's own parser, which takes `[]` for a message and two spellings of one field
without a word, names one field at most and prints the whole schema into its errors.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from typing import Any

from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from detflow.errors import MAX_VIOLATIONS, Violation

_F = FieldDescriptor
_INTEGERS = {
    _F.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _F.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _F.CPPTYPE_UINT32: (0, 2**32 - 1),
    _F.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_MAX_DEPTH = 100
_FLOAT_MAX = 3.4028234663852886e38
_TEXT_FORMS: dict[str, Any] = {
    "google.protobuf.Timestamp": (timestamp_pb2.Timestamp, "an RFC 3339 time"),
    "google.protobuf.Duration": (duration_pb2.Duration, 'seconds such as "1.5s"'),
    "google.protobuf.FieldMask": (field_mask_pb2.FieldMask, "camelCase field names with commas"),
}
_ANY_JSON = ("google.protobuf.Value", "google.protobuf.Any")


def field_named(message: Descriptor, name: str) -> FieldDescriptor | None:
    """Finds a field by its camelCase or snake_case name."""
    field = message.fields_by_camelcase_name.get(name) or message.fields_by_name.get(name)
    return field


def has_text_form(message: Descriptor) -> bool:
    """Whether JSON writes this message as one string."""
    return message.full_name in _TEXT_FORMS


def from_text(field: FieldDescriptor, text: str) -> Any:
    """Turns a query parameter into its field's JSON value; what does not fit stays a string."""
    if field.cpp_type == _F.CPPTYPE_BOOL:
        return {"true": True, "false": False}.get(text, text)
    if field.cpp_type == _F.CPPTYPE_ENUM and re.fullmatch(r"-?[0-9]{1,10}", text):
        return int(text)
    return text


def explain(message: Descriptor, data: Any) -> list[Violation]:
    """Lists what does not fit, at most 100, with paths such as `recipe.augmentations[1]`."""
    found: list[Violation] = []
    _message(message, data, "", found, 0)
    return found[:MAX_VIOLATIONS]


def _add(found: list[Violation], path: str, reason: str, description: str) -> None:
    if len(found) < MAX_VIOLATIONS:
        found.append(Violation(path, reason, description))


def _message(message: Descriptor, data: Any, path: str, found: list[Violation], depth: int) -> None:
    if depth > _MAX_DEPTH:
        _add(found, path, "TOO_DEEP", f"is nested deeper than {_MAX_DEPTH} levels")
    elif message.full_name in _TEXT_FORMS:
        kind, wanted = _TEXT_FORMS[message.full_name]
        try:
            kind().FromJsonString(data)
        except (ValueError, AttributeError, TypeError):
            _add(found, path, "WRONG_TYPE", f"must be {wanted}")
    elif message.full_name in _ANY_JSON:
        _depth_of(data, path, found, depth)
    elif message.full_name == "google.protobuf.ListValue":
        if isinstance(data, list):
            _depth_of(data, path, found, depth)
        else:
            _add(found, path, "WRONG_TYPE", "must be a list")
    elif not isinstance(data, dict):
        _add(found, path, "WRONG_TYPE", "must be an object")
    elif message.full_name == "google.protobuf.Struct":
        _depth_of(data, path, found, depth)
    else:
        _fields(message, data, path, found, depth)


def _fields(
    message: Descriptor, data: dict[str, Any], path: str, found: list[Violation], depth: int
) -> None:
    seen: dict[str, str] = {}
    for name, value in data.items():
        here = f"{path}.{name}" if path else name
        field = field_named(message, name)
        if field is None:
            _add(found, here, "UNKNOWN_FIELD", "there is no such field")
            continue
        group = field.containing_oneof
        key = group.name if group is not None and value is not None else field.name
        if key in seen:
            _add(found, here, "DUPLICATE_KEY", f"cannot stand beside {seen[key]}")
        seen[key] = name
        if value is None:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if not isinstance(value, dict):
                _add(found, here, "WRONG_TYPE", "must be an object")
                continue
            key_field = field.message_type.fields_by_name["key"]
            value_field = field.message_type.fields_by_name["value"]
            for k, v in value.items():
                if key_field.cpp_type != _F.CPPTYPE_BOOL or k not in ("true", "false"):
                    _single(key_field, k, f"{here}[{k!r}]", found, depth)
                _single(value_field, v, f"{here}[{k!r}]", found, depth)
        elif field.is_repeated:
            if not isinstance(value, list):
                _add(found, here, "WRONG_TYPE", "must be a list")
                continue
            for index, item in enumerate(value):
                _single(field, item, f"{here}[{index}]", found, depth)
        else:
            _single(field, value, here, found, depth)


def _single(
    field: FieldDescriptor, value: Any, path: str, found: list[Violation], depth: int
) -> None:
    if field.message_type is not None:
        _message(field.message_type, value, path, found, depth + 1)
    elif value is None:
        _add(found, path, "WRONG_TYPE", "must not be null")
    elif field.cpp_type in _INTEGERS:
        _integer(field, value, path, found)
    elif field.cpp_type in (_F.CPPTYPE_DOUBLE, _F.CPPTYPE_FLOAT):
        _number(field, value, path, found)
    elif field.cpp_type == _F.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            _add(found, path, "WRONG_TYPE", "must be true or false")
    elif field.cpp_type == _F.CPPTYPE_ENUM:
        _enum(field, value, path, found)
    elif field.type == _F.TYPE_BYTES:
        try:
            base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
        except (TypeError, ValueError, binascii.Error):
            _add(found, path, "WRONG_TYPE", "must be base64")
    elif not isinstance(value, str):
        _add(found, path, "WRONG_TYPE", "must be a string")
    elif any("\ud800" <= c <= "\udfff" for c in value):
        _add(found, path, "BAD_TEXT", "has an unpaired surrogate")


def _integer(field: FieldDescriptor, value: Any, path: str, found: list[Violation]) -> None:
    low, high = _INTEGERS[field.cpp_type]
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,30}", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        _add(found, path, "WRONG_TYPE", "must be a whole number")
    elif not low <= value <= high:
        _add(found, path, "OUT_OF_RANGE", f"must be between {low} and {high}")


def _number(field: FieldDescriptor, value: Any, path: str, found: list[Violation]) -> None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        _add(found, path, "WRONG_TYPE", "must be a number")
        return
    if isinstance(value, bool) or (math.isnan(number) and value != "NaN"):
        _add(found, path, "WRONG_TYPE", "must be a number")
    elif field.cpp_type == _F.CPPTYPE_FLOAT and abs(number) > _FLOAT_MAX:
        _add(found, path, "OUT_OF_RANGE", "is too large for a 32-bit number")


def _enum(field: FieldDescriptor, value: Any, path: str, found: list[Violation]) -> None:
    assert field.enum_type is not None
    names = [one.name for one in field.enum_type.values]
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        _add(found, path, "WRONG_TYPE", f"must be one of {', '.join(names)}")
    elif isinstance(value, str) and value not in names:
        _add(found, path, "UNKNOWN_VALUE", f"must be one of {', '.join(names)}")
    elif isinstance(value, int) and not -(2**31) <= value < 2**31:
        _add(found, path, "OUT_OF_RANGE", f"must be one of {', '.join(names)}")


def _depth_of(data: Any, path: str, found: list[Violation], depth: int) -> None:
    """Finds what a free-form value cannot hold: too many levels, text that is not Unicode."""
    level = [data]
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            _add(found, path, "TOO_DEEP", f"is nested deeper than {_MAX_DEPTH} levels")
            return
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                deeper += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                deeper += one
            elif isinstance(one, str) and any("\ud800" <= c <= "\udfff" for c in one):
                _add(found, path, "BAD_TEXT", "has an unpaired surrogate")
                return
            elif isinstance(one, int) and abs(one) > 2**1023:
                _add(found, path, "OUT_OF_RANGE", "is too large for a number")
                return
        level = deeper
