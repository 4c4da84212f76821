"""What an export is, what may be asked of one and how its state may change: pure rules."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from detflow.errors import FailedPrecondition, InvalidArgument, Violation
from detflow.v1 import export_pb2
from detflow.v1.common_pb2 import Failure, StoredObject

MAX_ATTEMPTS = 3
"""Times an export is begun before it fails, if its process dies or something is away."""

DEFAULT_OPSET = 17
OPSETS = range(13, 21)
MAX_IMAGE_SIZE_PX = 4096


class State(StrEnum):
    """State of an export; the names are those of detflow.v1.Export.State."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED}),
    State.RUNNING: frozenset({State.QUEUED, State.SUCCEEDED, State.FAILED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

FINAL = frozenset(state for state, targets in TRANSITIONS.items() if not targets)


def sources_of(target: State) -> list[State]:
    """Returns the states from which `target` may be reached in one step."""
    return [state for state in State if target in TRANSITIONS[state]]


def after_death(attempt: int) -> State:
    """Returns where an export goes whose attempt died of what another one can survive."""
    return State.QUEUED if attempt < MAX_ATTEMPTS else State.FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One export as it is stored.

    Attributes:
        training: Name of the training.
        options: Format and options, each with its value in force.
        attempt: Number of times it was begun; processes that shut down give theirs back.
        owner: Trainer process that makes it; None unless it is RUNNING.
        object: The file, once there.
    """

    id: str
    training: str
    state: State
    revision: int
    options: export_pb2.Export
    file_name: str
    attempt: int
    owner: str | None
    object: StoredObject | None
    max_box_difference_px: float
    max_confidence_difference: float
    failure: Failure | None
    create_time: datetime.datetime
    end_time: datetime.datetime | None

    @property
    def name(self) -> str:
        """Resource name."""
        return f"{self.training}/exports/{self.id}"

    @property
    def folder(self) -> str:
        """What the keys of all its objects begin with."""
        return f"exports/{self.id}"

    @property
    def attempt_folder(self) -> str:
        """What the keys of this attempt's objects begin with; no other attempt ever has it."""
        return f"{self.folder}/{self.attempt}-{self.owner}"


_FORMATS_OF = {
    "dynamic": (export_pb2.Export.ONNX, export_pb2.Export.OPENVINO),
    "simplify": (export_pb2.Export.ONNX,),
    "opset": (export_pb2.Export.ONNX,),
    "end_to_end": (export_pb2.Export.ONNX,),
}


def stride_of(model: str) -> int:
    """Returns what the sides of a model's input are multiples of."""
    return 128 if model.startswith("efficientdet") else 32


def resolve(asked: export_pb2.Export, *, model: str, image_size_px: int) -> export_pb2.Export:
    """Returns the options of an export, each with its value in force.

    Args:
        asked: As the user sent it; the fields the server sets are ignored.
        model: Id of the trained model.
        image_size_px: Side of the square it was trained with.

    Raises:
        InvalidArgument: A violation for each option that does not fit, with what is allowed.
    """
    violations = [
        Violation(f"export.{field}", reason, description)
        for field, reason, description in _problems(asked, model)
    ]
    if violations:
        first = violations[0]
        raise InvalidArgument(
            f"{first.field}: {first.description}", reason=first.reason, violations=violations
        )
    return export_pb2.Export(
        format=asked.format,
        precision=asked.precision or export_pb2.Export.FP32,
        image_size_px=asked.image_size_px or image_size_px,
        batch_size=asked.batch_size or 1,
        dynamic=asked.dynamic,
        simplify=asked.simplify,
        opset=(asked.opset or DEFAULT_OPSET) if asked.format == export_pb2.Export.ONNX else 0,
        end_to_end=asked.end_to_end,
    )


def _problems(asked: export_pb2.Export, model: str) -> list[tuple[str, str, str]]:
    found = []
    format_name = export_pb2.Export.Format.Name(asked.format)
    if asked.precision == export_pb2.Export.INT8 and asked.format != export_pb2.Export.OPENVINO:
        found.append(
            (
                "precision",
                "UNSUPPORTED_PRECISION",
                f"INT8 is for OPENVINO; with {format_name} choose FP32 or FP16",
            )
        )
    stride = stride_of(model)
    if asked.image_size_px % stride or asked.image_size_px > MAX_IMAGE_SIZE_PX:
        found.append(
            (
                "image_size_px",
                "OUT_OF_RANGE",
                f"is {asked.image_size_px}; for {model} it must be a multiple of {stride} from "
                f"{stride} to {MAX_IMAGE_SIZE_PX}",
            )
        )
    for field, formats in _FORMATS_OF.items():
        if getattr(asked, field) and asked.format not in formats:
            names = " and ".join(export_pb2.Export.Format.Name(one) for one in formats)
            found.append(
                (
                    field,
                    "UNSUPPORTED_OPTION",
                    f"is for {names}; leave it out with {format_name}",
                )
            )
    if asked.format == export_pb2.Export.ONNX and asked.opset and asked.opset not in OPSETS:
        found.append(
            (
                "opset",
                "OUT_OF_RANGE",
                f"is {asked.opset}; it must be from {OPSETS[0]} to {OPSETS[-1]}",
            )
        )
    return found


def file_name(options: export_pb2.Export, *, model: str, training_id: str) -> str:
    """Returns the name to save the file under, e.g. yolov8n-d1abc-640-fp16.onnx."""
    parts = [model, training_id, str(options.image_size_px)]
    if options.precision != export_pb2.Export.FP32:
        parts.append(export_pb2.Export.Precision.Name(options.precision).lower())
    if options.end_to_end:
        parts.append("end-to-end")
    if options.format == export_pb2.Export.ONNX:
        return "-".join(parts) + ".onnx"
    return "-".join([*parts, export_pb2.Export.Format.Name(options.format).lower()]) + ".zip"


def check_installed(asked: export_pb2.Export) -> None:
    """Checks that the optional libraries of a format are there.

    Raises:
        FailedPrecondition: OPENVINO_MISSING.
    """
    libraries = {
        "openvino": asked.format == export_pb2.Export.OPENVINO,
        "nncf": asked.precision == export_pb2.Export.INT8,
    }
    for name, is_needed in libraries.items():
        if is_needed and importlib.util.find_spec(name) is None:
            raise FailedPrecondition(
                f"{name} is not installed where the trainer runs; install it there with "
                "pip install 'detflow[openvino]' and ask again",
                reason="OPENVINO_MISSING",
            )
