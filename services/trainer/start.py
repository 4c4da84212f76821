"""What is checked before a training is queued."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct, Value

from detflow.errors import FailedPrecondition, bad_field
from detflow.v1 import training_pb2, version_pb2
from detflow.v1.common_pb2 import StoredObject
from services.trainer.domain import Plan
from services.trainer.executors import Device, Slots
from services.trainer.hyperparameters import resolve
from services.trainer.models import get_model
from services.trainer.queue import devices_on

DEFAULT_BATCH_SIZE = 16
DEFAULT_EPOCHS = 200

_Version = version_pb2.Version


def make_plan(asked: training_pb2.Training, *, project: str, version: str, slots: Slots) -> Plan:
    """Checks and completes what a user asks for; what it builds on is found later.

    Args:
        asked: What the user set.
        project: Id of the project.
        version: Id of the version.
        slots: What the executor has.

    Raises:
        InvalidArgument: A field is wrong.
        FailedPrecondition: NO_SUCH_DEVICE or TOO_MANY_DEVICES: the executor has not so many.
    """
    model = get_model(asked.model)
    batch_size = asked.batch_size if asked.HasField("batch_size") else DEFAULT_BATCH_SIZE
    epochs = asked.epochs if asked.HasField("epochs") else DEFAULT_EPOCHS
    plan = Plan(
        project=project,
        version=version,
        model=model.id,
        batch_size=batch_size,
        epochs=epochs,
        hyperparameters=resolve(
            _plain(asked.hyperparameters), model=model, batch_size=batch_size, epochs=epochs
        ),
        manifest=StoredObject(),
        priority=asked.priority,
        num_nodes=asked.resources.num_nodes or 1,
        num_devices_per_node=asked.resources.num_devices_per_node or 1,
        warm_start=asked.warm_start if asked.HasField("warm_start") else None,
    )
    check_devices(plan, slots)
    return plan


def check_devices(plan: Plan, slots: Slots) -> None:
    """Checks that an executor has the devices a plan needs, free or not.

    Raises:
        InvalidArgument: OUT_OF_RANGE, there are more devices than images in a batch.
        FailedPrecondition: NO_SUCH_DEVICE or TOO_MANY_DEVICES.
    """
    wanted = str(plan.hyperparameters.get("device", "auto"))  # an old one has none
    device = next(device for device in Device if wanted in devices_on(device, slots))
    if not slots.of(device):
        raise FailedPrecondition(
            f"the trainer has no slot for device {wanted}; choose auto",
            reason="NO_SUCH_DEVICE",
            metadata={"device": wanted},
        )
    if plan.num_nodes > slots.num_nodes:
        raise FailedPrecondition(
            f"{plan.num_nodes} machines are asked for and there are {slots.num_nodes}; lower"
            " resources.num_nodes, or use the ray executor on a larger cluster",
            reason="TOO_MANY_DEVICES",
            metadata={"num_nodes": str(slots.num_nodes)},
        )
    if plan.num_devices > slots.of(device):
        what = "GPUs" if device is Device.CUDA else "CPU slots"
        raise FailedPrecondition(
            f"{plan.num_devices} {what} are asked for and the trainer has {slots.of(device)}; lower"
            " resources.num_devices_per_node",
            reason="TOO_MANY_DEVICES",
            metadata={"num_devices": str(slots.of(device))},
        )
    if plan.batch_size < plan.num_devices:
        problem = f"must be at least {plan.num_devices}: every device takes a part of each batch"
        raise bad_field("training.batch_size", "OUT_OF_RANGE", problem)


def check_ready(version: _Version) -> None:
    """Checks that a version can be trained, as far as preprocessing goes.

    Raises:
        FailedPrecondition: VERSION_NOT_READY.
    """
    # A training state may lag behind: a live one has been ruled out in our own tables.
    if version.HasField("manifest") and version.state != _Version.COMPLETED:
        return
    state = _Version.State.Name(version.state)
    remedy = (
        "wait until it is READY"
        if version.state == _Version.PREPROCESSING
        else "create another version"
    )
    raise FailedPrecondition(
        f"{version.name} is {state} and cannot be trained; {remedy}",
        reason="VERSION_NOT_READY",
        metadata={"version": version.name, "state": state},
    )


def _plain(values: Struct) -> Mapping[str, object]:
    """Returns a Struct as Python values; NaN and infinities stay what they are."""
    return {name: _plain_value(value) for name, value in values.fields.items()}


def _plain_value(value: Value) -> object:
    kind = value.WhichOneof("kind")
    if kind in ("number_value", "bool_value", "string_value"):
        return getattr(value, kind)
    return None if kind in (None, "null_value") else json_format.MessageToDict(value)
