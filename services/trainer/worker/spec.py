"""What a worker is told to do: the WorkerSpec file, checked and in Python values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from google.protobuf import json_format

from detflow.errors import InvalidArgument
from detflow.names import last_segment
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint, WorkerSpec

Value: TypeAlias = float | bool | str
"""Value of a hyper-parameter; whole numbers travel as doubles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which of the processes that train together this one is.

    Attributes:
        rank: From 0; that one is the worker everybody knows.
        num_nodes: Machines.
        num_per_node: Processes on each, one per device; they have consecutive ranks.
        address: host:port at which rank 0 meets the others; empty for a port of its own choice,
            which only processes of its own machine can reach.
        file: What the others of the machine are told to do.
    """

    rank: int = 0
    num_nodes: int = 1
    num_per_node: int = 1
    address: str = ""
    file: Path = Path()

    @property
    def num_ranks(self) -> int:
        """Processes in all."""
        return self.num_nodes * self.num_per_node

    @property
    def local_rank(self) -> int:
        """Number among the processes of its machine, from 0."""
        return self.rank % self.num_per_node


ALONE = Place()


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One attempt at one training.

    Attributes:
        training: projects/{project}/versions/{version}/trainings/{training}
        attempt: Number of the attempt; every record carries it.
        model: Id of the model, e.g. yolov8n.
        batch_size: Images per step.
        step_batch_size: Images that are in memory at once; a step goes on until it has seen all.
        epochs: Passes over the training split, in all attempts together.
        hyperparameters: Value by name.
        manifest: Manifest of the bundle.
        checkpoint: Checkpoint to go on from, if any.
        warm_start_weights: Weights to begin with where there is no checkpoint, if any.
        preflight: Everything shall be tried before the first step.
        place: Which of the processes that train together this one is.
        folder: Work folder of this attempt.
    """

    training: str
    attempt: int
    model: str
    batch_size: int
    step_batch_size: int
    epochs: int
    hyperparameters: Mapping[str, Value]
    manifest: StoredObject
    checkpoint: Checkpoint | None
    warm_start_weights: StoredObject | None = None
    preflight: bool = False
    place: Place = ALONE
    folder: Path

    @property
    def training_id(self) -> str:
        """Id of the training."""
        return last_segment(self.training)

    @property
    def epochs_done(self) -> int:
        """Epochs finished by earlier attempts."""
        return self.checkpoint.epoch if self.checkpoint else 0

    @property
    def steps_done(self) -> int:
        """Steps that earlier attempts have done in the epoch after these."""
        return self.checkpoint.step if self.checkpoint else 0

    def key(self, name: str) -> str:
        """Returns the object store key of one of this attempt's artifacts."""
        return f"trainings/{self.training_id}/{self.attempt}/{name}"


def read_spec(path: Path, *, rank: int = 0, address: str = "") -> Spec:
    """Reads a WorkerSpec in protobuf's JSON form; the folder of the file becomes the work folder.

    Args:
        path: The file.
        rank: Which of the processes that train together this one is.
        address: host:port at which they meet.

    Raises:
        InvalidArgument: It cannot be read, or a field is missing or out of range.
    """
    message = WorkerSpec()
    try:
        json_format.Parse(path.read_text(encoding="utf-8"), message)
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise InvalidArgument(
            f"{path} is no WorkerSpec in JSON: {error}", reason="BAD_SPEC"
        ) from error
    missing = [
        name
        for name in ("training", "attempt", "model", "batch_size", "epochs", "manifest")
        if not getattr(message, name) or (name == "manifest" and not message.manifest.sha256)
    ]
    if missing:
        raise InvalidArgument(f"{path} lacks {', '.join(missing)}", reason="BAD_SPEC")
    path = path.resolve()
    place = Place(
        rank=rank,
        num_nodes=message.resources.num_nodes or 1,
        num_per_node=message.resources.num_devices_per_node or 1,
        address=address,
        file=path,
    )
    # Files of the same name must not meet.
    return parse_spec(message, path.parent / f"rank-{rank}" if rank else path.parent, place)


def parse_spec(message: WorkerSpec, folder: Path, place: Place = ALONE) -> Spec:
    """Turns a complete WorkerSpec into Python values.

    Args:
        message: What the worker is told.
        folder: Work folder.
        place: Which of the processes that train together this one is.
    """
    return Spec(
        training=message.training,
        attempt=message.attempt,
        model=message.model,
        batch_size=message.batch_size,
        step_batch_size=message.step_batch_size or message.batch_size,
        epochs=message.epochs,
        hyperparameters={
            name: getattr(value, str(value.WhichOneof("kind")))
            for name, value in message.hyperparameters.fields.items()
        },
        manifest=message.manifest,
        checkpoint=message.checkpoint if message.HasField("checkpoint") else None,
        warm_start_weights=(
            message.warm_start_weights if message.HasField("warm_start_weights") else None
        ),
        preflight=message.preflight,
        place=place,
        folder=folder,
    )
