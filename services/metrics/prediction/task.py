"""What the metrics service asks of a process that predicts, and how both write it to a pipe."""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any, Self

import orjson

from detflow.resize import KEEP_SIZE, Resize

_LENGTH = struct.Struct("<Q")

PREDICTED, FAILED, MODEL_WANTED = b"P", b"F", b"M"
"""What an answer begins with: a Prediction follows, or a google.rpc.Status, or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One image and what to do with it; the bytes of the image come behind it.

    Attributes:
        model_sha256: What the model is known by.
        model_path: Its file; empty while the process is expected to have it.
        resize: What the version's recipe does with the sizes of images.
        grayscale: Whether it makes them gray.
        confidence_threshold: Least confidence of a detection.
        nms_iou: Of two of one class that overlap more the less confident is dropped.
        max_detections: How many at most.
        drawn_side_px: Longest side of the picture with boxes; 0 for none.
    """

    model_sha256: str
    model_path: str = ""
    resize: Resize = KEEP_SIZE
    grayscale: bool = False
    confidence_threshold: float = 0.25
    nms_iou: float = 0.7
    max_detections: int = 300
    drawn_side_px: int = 0

    def to_bytes(self) -> bytes:
        """Renders it."""
        return orjson.dumps(dataclasses.asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads what `to_bytes` rendered."""
        fields: dict[str, Any] = orjson.loads(data)
        resize: dict[str, Any] = fields.pop("resize")
        size = resize.pop("exact_size")
        return cls(resize=Resize(exact_size=tuple(size) if size else None, **resize), **fields)


def frame(data: bytes | bytearray) -> bytes:
    """Returns what tells the reader of a pipe how many bytes follow."""
    return _LENGTH.pack(len(data))


FRAME_BYTES = _LENGTH.size


def frame_length(data: bytes) -> int:
    """Reads what `frame` wrote."""
    (length,) = _LENGTH.unpack(data)
    return int(length)
