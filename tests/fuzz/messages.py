"""Random requests, made from the descriptors: mostly such that validation lets them through.

The same `random.Random` gives the same message, so that a case is known by its seed.
"""

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from buf.validate import validate_pb2

_F = FieldDescriptor
TEXTS = (
    *("", " ", "x", "a b", "-", "..", "../..", "a/b", "a\\b", "%2e%2e", "C:\\x", "NaN", "null"),
    *("0", "-1", "1e999", "٣", "한국어", "🦊" * 10, "e\u0301", "\u202eevil", "\u200b", "\ufeff"),
    *("a\x00b", "a\nb", "\x1b[2J", "<script>alert(1)</script>", "' or 1=1 --", "${7*7}", "{{7*7}}"),
    *("x" * 63, "x" * 64, "x" * 300, "x" * 70_000, "http://127.0.0.1/", "file:///etc/passwd"),
    *("s3://bucket/key", "projects/-", "projects/p/versions/-", "\U0010ffff", "\ud7ff"),
)
NUMBERS = (0, 1, 2, 3, 4, 8, 16, 32, 50, 64, 100, 640, 1000, -1, 10**6, 2**31 - 1, -(2**31))
FLOATS = (0.0, 0.5, 1.0, 0.25, 0.9, 1e-9, -0.0, -1.0, 2.0, 100.0, 1e308, -1e308, 5e-324)
ODD_FLOATS = (float("nan"), float("inf"), float("-inf"))
_RANGES = {
    _F.TYPE_INT32: (-(2**31), 2**31 - 1),
    _F.TYPE_SINT32: (-(2**31), 2**31 - 1),
    _F.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    _F.TYPE_UINT32: (0, 2**32 - 1),
    _F.TYPE_FIXED32: (0, 2**32 - 1),
    _F.TYPE_INT64: (-(2**63), 2**63 - 1),
    _F.TYPE_SINT64: (-(2**63), 2**63 - 1),
    _F.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    _F.TYPE_UINT64: (0, 2**64 - 1),
    _F.TYPE_FIXED64: (0, 2**64 - 1),
}
_SPECIAL = "google.protobuf."
_MAX_DEPTH = 6


@dataclass(frozen=True)
class Names:
    """Resource names that there are, which requests are to hold where they fit.

    Attributes:
        names: Such as projects/p and projects/p/versions/v.
    """

    names: Sequence[str]

    def fitting(self, pattern: str) -> list[str]:
        """Returns those that a field with this pattern may hold."""
        return [name for name in self.names if re.search(pattern, name)]


class Messages:
    """Makes messages.

    Args:
        rng: Decides everything.
        names: Resources that there are.
    """

    def __init__(self, rng: Random, names: Names) -> None:
        self._rng = rng
        self._names = names

    def make(self, descriptor: Descriptor, depth: int = 0) -> Message:
        """Makes a message of this type."""
        message = message_factory.GetMessageClass(descriptor)()
        make = _MAKERS.get(descriptor.full_name)
        if make is not None:
            make(self, message)
            return message
        chosen = {
            oneof.name: self._rng.choice(list(oneof.fields)).name for oneof in descriptor.oneofs
        }
        for field in descriptor.fields:
            if field.containing_oneof and chosen[field.containing_oneof.name] != field.name:
                continue
            if depth > _MAX_DEPTH or self._rng.random() > (0.7 if depth < 2 else 0.4):
                continue
            self.fill(message, field, depth)
        return message

    def fill(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        """Fills one field."""
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._fill_map(message, field, depth)
        elif field.is_repeated:
            target = getattr(message, field.name)
            for _ in range(self._rng.choice((0, 1, 1, 2, 3, self._rng.choice((3, 5, 200))))):
                if field.message_type is not None:
                    target.append(self.make(field.message_type, depth + 1))
                else:
                    target.append(self._scalar(field))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self.make(field.message_type, depth + 1))
        else:
            setattr(message, field.name, self._scalar(field))

    def _fill_map(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        assert field.message_type is not None
        key, value = (field.message_type.fields_by_name[one] for one in ("key", "value"))
        target = getattr(message, field.name)
        for _ in range(self._rng.choice((0, 1, 2, 5))):
            name = self._scalar(key)
            if value.message_type is not None:
                target[name].CopyFrom(self.make(value.message_type, depth + 1))
            else:
                target[name] = self._scalar(value)

    def _scalar(self, field: FieldDescriptor) -> Any:
        rng = self._rng
        if field.enum_type is not None:
            known = [value.number for value in field.enum_type.values]
            return rng.choice(known) if rng.random() < 0.9 else rng.choice((-1, 99, 2**31 - 1))
        if field.type == _F.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type in (_F.TYPE_DOUBLE, _F.TYPE_FLOAT):
            return rng.choice(ODD_FLOATS) if rng.random() < 0.1 else rng.choice(FLOATS)
        if field.type == _F.TYPE_BYTES:
            return rng.randbytes(rng.choice((0, 1, 10, 1000)))
        if field.type == _F.TYPE_STRING:
            return self._text(field)
        low, high = _RANGES[field.type]
        number = rng.choice((*NUMBERS, low, high, rng.randrange(100)))
        return min(max(number, low), high)

    def _text(self, field: FieldDescriptor) -> str:
        rng = self._rng
        if rng.random() < 0.15:
            return self.odd_text()
        rules = field.GetOptions().Extensions[validate_pb2.field]
        string = rules.repeated.items.string if field.is_repeated else rules.string
        allowed: list[str] = list(getattr(string, "in"))
        if allowed:
            return rng.choice(allowed)
        if string.pattern:
            fitting = self._names.fitting(string.pattern)
            if fitting:
                return rng.choice(fitting)
        if field.name.endswith(("_token", "cursor", "etag")):
            return rng.choice(("", "", self.odd_text()))
        if field.name == "request_id":
            return rng.choice(("", f"r{rng.randrange(1000)}"))
        return rng.choice(("", f"x{rng.randrange(10**6)}", rng.choice(self._names.names)))

    def odd_text(self) -> str:
        """Makes a text that nobody would expect."""
        rng = self._rng
        if rng.random() < 0.7:
            return rng.choice(TEXTS)
        codes = [rng.choice((rng.randrange(128), rng.randrange(0xD800))) for _ in range(20)]
        return "".join(map(chr, codes))

    def _struct(self, message: Any) -> None:
        for _ in range(self._rng.randrange(4)):
            self._value(message.fields[self.odd_text()[:100]])

    def _value(self, message: Any) -> None:
        rng = self._rng
        kind = rng.randrange(7)
        if kind == 0:
            message.null_value = 0
        elif kind == 1:
            message.number_value = rng.choice((*FLOATS, *ODD_FLOATS, *NUMBERS))
        elif kind == 2:
            message.string_value = self.odd_text()
        elif kind == 3:
            message.bool_value = rng.random() < 0.5
        elif kind == 4:
            message.list_value.values.add().number_value = rng.choice(FLOATS)
        elif kind == 5:
            deep = message
            for _ in range(rng.choice((1, 20, 60))):
                deep = deep.list_value.values.add()
        # Else it says nothing at all, which is no value.

    def _moment(self, message: Any) -> None:
        rng = self._rng
        message.seconds = rng.choice((0, 1, -1, 1_700_000_000, 253_402_300_799, 2**62, -(2**62)))
        message.nanos = rng.choice((0, 1, -1, 999_999_999, 10**9, -(2**31)))

    def _mask(self, message: Any) -> None:
        paths = ("display_name", "labels", "priority", "quota", "name", "*", "", "a.b", "labels.x")
        for _ in range(self._rng.randrange(3)):
            message.paths.append(self._rng.choice((*paths, self.odd_text()[:300])))

    def _any(self, message: Any) -> None:
        message.type_url = self._rng.choice(("", "x", "type.googleapis.com/google.protobuf.Any"))
        message.value = self._rng.randbytes(5)


_MAKERS: dict[str, Callable[[Messages, Message], None]] = {
    f"{_SPECIAL}Struct": Messages._struct,
    f"{_SPECIAL}Value": Messages._value,
    f"{_SPECIAL}Timestamp": Messages._moment,
    f"{_SPECIAL}Duration": Messages._moment,
    f"{_SPECIAL}FieldMask": Messages._mask,
    f"{_SPECIAL}Any": Messages._any,
}


def damaged(rng: Random, data: bytes) -> bytes:
    """Changes the bytes of a message a little, or altogether."""
    kind = rng.randrange(8)
    if kind == 0 or not data:
        return rng.randbytes(rng.choice((1, 5, 50, 1000)))
    changed = bytearray(data)
    if kind == 1:
        return bytes(changed[: rng.randrange(len(changed))])
    if kind == 2:
        return bytes(changed * rng.choice((2, 3)))
    if kind == 3:  # a field that says it is longer than the message
        return bytes(changed) + b"\x0a" + rng.choice((b"\xff\xff\xff\xff\x0f", b"\x7f"))
    if kind == 4:  # groups, which this syntax does not have, one in the other
        return bytes(changed) + b"\x0b" * rng.choice((1, 100, 5000))
    if kind == 5:  # unknown fields
        number = rng.randrange(1000, 10**6) << 3
        return bytes(changed) + _varint(number) + _varint(rng.randrange(2**64))
    for _ in range(rng.choice((1, 1, 3, 10))):
        place = rng.randrange(max(len(changed), 1))
        if kind == 6 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        else:
            changed[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
    return bytes(changed)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += struct.pack("B", value & 127 | 128)
        value >>= 7
    return out + struct.pack("B", value)
