"""Looks into an uploaded weights file; runs in a sandbox, for nobody knows what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from detflow.v1.weights_pb2 import Weights
from detflow.v1.worker_pb2 import InspectJob, JobMessage
from services.trainer.worker import weights


def run(job: InspectJob, emit: Callable[[JobMessage], None]) -> None:
    """Tells what a file holds.

    Raises:
        InvalidArgument: UNSAFE_WEIGHTS: it holds anything but tensors and plain values.
    """
    found = weights.read(Path(job.path))
    tensors = found.state_dict.values()
    emit(
        JobMessage(
            weights=Weights(
                model=found.model,
                class_names=found.class_names,
                num_tensors=len(tensors),
                num_parameters=sum(tensor.numel() for tensor in tensors),
            )
        )
    )
