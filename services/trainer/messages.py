"""Trainings as the API shows them and as workers are told of them."""

from __future__ import annotations

from detflow.times import timestamp
from detflow.v1 import training_pb2
from detflow.v1.training_pb2 import Resources
from detflow.v1.worker_pb2 import Checkpoint, WorkerSpec
from services.trainer.domain import Plan, Training


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


def to_message(training: Training, queue_position: int = 0) -> training_pb2.Training:
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


def worker_spec(training: Training, checkpoint: Checkpoint | None) -> WorkerSpec:
    """Returns what the worker of the current attempt is told."""
    spec = plan_spec(training)
    spec.training = training.name
    spec.attempt = training.attempt
    spec.step_batch_size = training.step_batch_size
    spec.preflight = training.preflight is None and checkpoint is None
    if checkpoint is not None:
        spec.checkpoint.CopyFrom(checkpoint)
        spec.ClearField("warm_start_weights")
    return spec
