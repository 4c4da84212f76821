"""Schemas of messages, for the OpenAPI document: what their JSON looks like, and its limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from buf.validate import validate_pb2

Json = dict[str, Any]

_F = FieldDescriptor
REF = "#/components/schemas/"
"""Where the schemas are in the document."""

_SCALARS: dict[int, Json] = {
    _F.TYPE_BOOL: {"type": "boolean"},
    _F.TYPE_STRING: {"type": "string"},
    _F.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    _F.TYPE_DOUBLE: {"type": "number", "format": "double"},
    _F.TYPE_FLOAT: {"type": "number", "format": "float"},
    _F.TYPE_INT32: {"type": "integer", "format": "int32"},
    _F.TYPE_UINT32: {"type": "integer", "format": "int32", "minimum": 0},
    # 64-bit integers are strings in protojson: JavaScript's numbers cannot hold them.
    _F.TYPE_INT64: {"type": "string", "format": "int64"},
    _F.TYPE_UINT64: {"type": "string", "format": "int64"},
}
WELL_KNOWN: dict[str, Json] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
    "google.protobuf.FieldMask": {"type": "string", "examples": ["displayName"]},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True},
    "google.protobuf.Value": {},
    "google.protobuf.ListValue": {"type": "array", "items": {}},
    "google.protobuf.Any": {
        "type": "object",
        "properties": {"@type": {"type": "string"}},
        "required": ["@type"],
        "additionalProperties": True,
    },
}
"""Of messages that JSON writes in a form of their own."""


class Schemas:
    """Collects the schemas that are referred to.

    Args:
        texts: Descriptions by full name.
    """

    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = texts
        self._done: dict[str, Json] = {"Error": _error_schema()}

    def all(self) -> dict[str, Json]:
        """All of them, by name."""
        return self._done

    def message(self, message: Descriptor, without: Iterable[str] = ()) -> Json:
        """A reference to a message's schema; inline where fields are left out of it."""
        if message.full_name in WELL_KNOWN:
            return dict(WELL_KNOWN[message.full_name])
        if without:
            return self._object(message, without)
        name = _name(message)
        if name not in self._done:
            self._done[name] = {}  # a placeholder ends recursion
            self._done[name] = self._object(message, ())
        return {"$ref": f"{REF}{name}"}

    def part(self, message: Descriptor) -> Json:
        """A message's schema in which nothing is required: what is not named stays as it is."""
        schema = self._object(message, ())
        schema.pop("required", None)
        return schema

    def field(self, field: FieldDescriptor, *, limits: bool = True) -> Json:
        """The schema of a field's value, with its description and limits."""
        nested = field.message_type
        if nested is not None and nested.GetOptions().map_entry:
            value = self.field(nested.fields_by_name["value"])
            schema: Json = {"type": "object", "additionalProperties": value}
        else:
            schema = self._single(field)
            if field.is_repeated:
                schema = {"type": "array", "items": schema}
        if limits:
            schema |= _limits(field)
            text = self._texts.get(field.full_name)
            if text:
                schema["description"] = text
        return schema

    def _single(self, field: FieldDescriptor) -> Json:
        if field.message_type is not None:
            return self.message(field.message_type)
        if field.enum_type is not None:
            return self._enum(field.enum_type)
        return dict(_SCALARS[field.type])

    def _enum(self, enum: EnumDescriptor) -> Json:
        name = _name(enum)
        if name not in self._done:
            lines = [self._texts.get(enum.full_name, "")]
            parent = enum.full_name
            lines += [
                f"- `{value.name}`: {self._texts.get(f'{parent}.{value.name}', '')}"
                for value in enum.values
            ]
            self._done[name] = {
                "type": "string",
                "enum": [value.name for value in enum.values],
                "description": "\n".join(lines),
            }
        return {"$ref": f"{REF}{name}"}

    def _object(self, message: Descriptor, without: Iterable[str]) -> Json:
        fields = [field for field in message.fields if field.name not in without]
        schema: Json = {
            "type": "object",
            "description": self._texts.get(message.full_name, ""),
            "properties": {field.json_name: self._property(field) for field in fields},
        }
        required = [f.json_name for f in fields if has(f, field_behavior_pb2.REQUIRED)]
        if required:
            schema["required"] = required
        return schema

    def _property(self, field: FieldDescriptor) -> Json:
        schema = self.field(field)
        if has(field, field_behavior_pb2.OUTPUT_ONLY) or has(field, field_behavior_pb2.IDENTIFIER):
            schema["readOnly"] = True
        return schema


def _name(element: Descriptor | EnumDescriptor) -> str:
    return element.full_name.removeprefix("detflow.v1.").removeprefix("google.")


def _limits(field: FieldDescriptor) -> Json:
    rules = field.GetOptions().Extensions[validate_pb2.field]
    limits: Json = {}
    kind = rules.WhichOneof("type")
    if kind == "string":
        if rules.string.HasField("pattern"):
            limits["pattern"] = rules.string.pattern
        if rules.string.HasField("min_len"):
            limits["minLength"] = rules.string.min_len
        if rules.string.HasField("max_len"):
            limits["maxLength"] = rules.string.max_len
    elif kind in ("int32", "double") and not field.is_repeated:
        numbers = getattr(rules, kind)
        for rule, keyword in (("gte", "minimum"), ("lte", "maximum")):
            if numbers.HasField(rule):
                limits[keyword] = getattr(numbers, rule)
    elif kind == "repeated":
        if rules.repeated.HasField("max_items"):
            limits["maxItems"] = rules.repeated.max_items
        if rules.repeated.unique:
            limits["uniqueItems"] = True
    return limits


def has(field: FieldDescriptor, behaviour: int) -> bool:
    """Whether a field has a google.api.field_behavior."""
    return behaviour in field.GetOptions().Extensions[field_behavior_pb2.field_behavior]


def _error_schema() -> Json:
    return {
        "type": "object",
        "description": "A google.rpc.Status as JSON.",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "status", "message", "details"],
                "properties": {
                    "code": {"type": "integer", "description": "The HTTP status."},
                    "status": {"type": "string", "description": "Name of the google.rpc.Code."},
                    "message": {"type": "string", "description": "The value and the remedy."},
                    "details": {
                        "type": "array",
                        "description": "ErrorInfo (reason), BadRequest (fields), RetryInfo, ...",
                        "items": dict(WELL_KNOWN["google.protobuf.Any"]),
                    },
                },
            }
        },
    }
