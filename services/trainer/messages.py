"""Trainings as the API shows them and as workers are told of them."""

from __future__ import annotations

from detflow.times import timestamp
from detflow.v1 import training_pb2
from detflow.v1.training_pb2 import Preflight, Resources
from detflow.v1.worker_pb2 import Checkpoint, WorkerSpec
from services.trainer.domain import Plan, Training
from services.trainer.executors import Device

_QUEUED_BATCH_SIZE = 2


def plan_message(plan: Plan) -> training_pb2.Training:
    """Returns what is wanted as the API shows it."""
    message = training_pb2.Training(
        model=plan.model,
        batch_size=plan.batch_size,
        epochs=plan.epochs,
        priority=plan.priority,
        step_batch_size=plan.batch_size,
        warm_start=plan.warm_start,
        resources=resources_message(plan),
    )
    message.hyperparameters.update(dict(plan.hyperparameters))
    return message


def resources_message(plan: Plan) -> Resources | None:
    """Returns the devices that train together; None for one."""
    if plan.num_devices == 1:
        return None
    return Resources(num_nodes=plan.num_nodes, num_devices_per_node=plan.num_devices_per_node)


def to_message(
    training: Training,
    *,
    queue_position: int = 0,
    wait_reason: training_pb2.Training.WaitReason.ValueType = (
        training_pb2.Training.WAIT_REASON_UNSPECIFIED
    ),
) -> training_pb2.Training:
    """Returns a training as the API shows it; its place in the queue is `queue`'s to know."""
    message = plan_message(training)
    message.MergeFrom(
        training_pb2.Training(
            name=training.name,
            state=training_pb2.Training.State.Value(training.state),
            revision=training.revision,
            step_batch_size=training.step_batch_size,
            preflight=training.preflight,
            attempt=training.attempt,
            num_epochs_done=training.num_epochs_done,
            failure=training.failure,
            weights=training.weights,
            queue_position=queue_position,
            wait_reason=wait_reason,
            create_time=timestamp(training.create_time),
            start_time=timestamp(training.start_time),
            end_time=timestamp(training.end_time),
        )
    )
    if training.stop_mode:
        message.stop_mode = training_pb2.StopMode.Value(f"STOP_MODE_{training.stop_mode}")
    return message


def plan_spec(plan: Plan) -> WorkerSpec:
    """Returns what the worker of a preflight is told."""
    spec = WorkerSpec(
        model=plan.model,
        batch_size=plan.batch_size,
        step_batch_size=plan.batch_size,
        epochs=plan.epochs,
        manifest=plan.manifest,
        warm_start_weights=plan.warm_start_weights,
        resources=resources_message(plan),
        preflight=True,
    )
    spec.hyperparameters.update(dict(plan.hyperparameters))
    return spec


def queued_spec(training: Training, device: Device) -> WorkerSpec:
    """Returns what the preflight of a training that waits for a device is told.

    It is tried on the CPU. Where its turn will come on a GPU, few images have to do: what memory
    and time they take there is not to be known here.
    """
    spec = plan_spec(training)
    spec.step_batch_size = training.step_batch_size
    spec.hyperparameters["device"] = Device.CPU
    if device is not Device.CPU:
        spec.batch_size = min(spec.batch_size, _QUEUED_BATCH_SIZE)
        spec.step_batch_size = min(spec.step_batch_size, _QUEUED_BATCH_SIZE)
    return spec


def queued_preflight(found: Preflight, device: Device) -> Preflight:
    """Returns what was found in the queue, without what says nothing of the device to come."""
    if device is Device.CPU:
        return found
    checks = [check for check in found.checks if check.name != "memory"]
    return Preflight(checks=checks, device=found.device, disk_bytes=found.disk_bytes)


def worker_spec(training: Training, checkpoint: Checkpoint | None, device: Device) -> WorkerSpec:
    """Returns what the worker of the current attempt is told.

    Args:
        training: As it was claimed.
        checkpoint: What it goes on from, if anything.
        device: What it gets.
    """
    spec = plan_spec(training)
    spec.training = training.name
    spec.attempt = training.attempt
    spec.step_batch_size = training.step_batch_size
    spec.preflight = checkpoint is None and not _is_tried_on(device, training.preflight)
    if checkpoint is not None:
        spec.checkpoint.CopyFrom(checkpoint)
        spec.ClearField("warm_start_weights")
    return spec


def _is_tried_on(device: Device, preflight: Preflight | None) -> bool:
    return preflight is not None and preflight.device.partition(":")[0] == device
