from pathlib import Path

import pytest

from detflow.errors import FailedPrecondition, InvalidArgument
from detflow.settings import Settings
from detflow.v1 import training_pb2
from services.trainer.domain import Plan
from services.trainer.executors import Device, Slots
from services.trainer.executors.gpus import list_gpus
from services.trainer.executors.local import LocalExecutor
from services.trainer.queue import devices_on
from services.trainer.start import make_plan

ONE_CPU = Slots(num_cpu=1)
TWO_GPUS = Slots(num_cpu=1, num_gpu=2)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("", ()), ("-1", ()), ("0,2", ("0", "2")), ("1,-1,2", ("1",)), ("GPU-a, MIG-b", None)],
)
def test_gpus_are_those_the_environment_allows(visible: str, gpus: tuple[str, ...] | None) -> None:
    expected = ("GPU-a", "MIG-b") if gpus is None else gpus
    assert list_gpus({"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_gpus_are_counted_by_the_driver_where_no_program_tells(tmp_path: Path) -> None:
    assert list_gpus({"PATH": str(tmp_path)}, driver=tmp_path / "none") == ()
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert list_gpus({"PATH": str(tmp_path)}, driver=tmp_path / "gpus") == ("0", "1")


@pytest.mark.parametrize(("answer", "gpus"), [("exit 9", ("0", "1")), ("echo 'GPU 0: A'", ("0",))])
def test_gpus_are_those_nvidia_smi_tells_of_if_it_works(
    tmp_path: Path, answer: str, gpus: tuple[str, ...]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert list_gpus({"PATH": str(tmp_path)}, driver=tmp_path / "gpus") == gpus


@pytest.mark.parametrize(("setting", "num_gpus"), [(-1, 3), (0, 0), (2, 2), (5, 5)])
def test_slots_are_as_many_gpus_as_are_set(setting: int, num_gpus: int, tmp_path: Path) -> None:
    settings = Settings(num_cpu_slots=2, num_gpu_slots=setting, data_dir=tmp_path)
    executor = LocalExecutor(settings, environ={"CUDA_VISIBLE_DEVICES": "3,4,5"})
    assert executor.slots == Slots(num_cpu=2, num_gpu=num_gpus, num_nodes=1)


def test_auto_means_a_gpu_where_there_is_one() -> None:
    assert devices_on(Device.CPU, ONE_CPU) == ("cpu", "auto")
    assert devices_on(Device.CPU, TWO_GPUS) == ("cpu",)
    assert devices_on(Device.CUDA, TWO_GPUS) == ("cuda", "auto")


def plan(slots: Slots, device: str = "auto", **fields: int) -> Plan:
    asked = training_pb2.Training(batch_size=fields.pop("batch_size", 16))
    asked.resources.CopyFrom(training_pb2.Resources(**fields))
    asked.hyperparameters.update({"device": device})
    return make_plan(asked, project="p", version="v", slots=slots)


@pytest.mark.parametrize(
    ("slots", "device", "fields", "reason"),
    [
        (ONE_CPU, "cuda", {}, "NO_SUCH_DEVICE"),
        (Slots(num_cpu=0, num_gpu=1), "cpu", {}, "NO_SUCH_DEVICE"),
        (ONE_CPU, "auto", {"num_nodes": 2}, "TOO_MANY_DEVICES"),
        (ONE_CPU, "cpu", {"num_devices_per_node": 2}, "TOO_MANY_DEVICES"),
        (TWO_GPUS, "auto", {"num_devices_per_node": 3}, "TOO_MANY_DEVICES"),
    ],
)
def test_more_than_there_is_is_refused_at_the_start(
    slots: Slots, device: str, fields: dict[str, int], reason: str
) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        plan(slots, device, **fields)
    assert caught.value.reason == reason


def test_as_much_as_there_is_can_be_had() -> None:
    assert plan(ONE_CPU, "cpu").num_devices == 1
    assert plan(TWO_GPUS, num_devices_per_node=2).num_devices == 2
    cluster = Slots(num_cpu=0, num_gpu=8, num_nodes=4)
    assert plan(cluster, "cuda", num_nodes=4, num_devices_per_node=2).num_devices == 8


def test_every_device_needs_an_image_of_each_batch() -> None:
    with pytest.raises(InvalidArgument) as caught:
        plan(TWO_GPUS, num_devices_per_node=2, batch_size=1)
    assert caught.value.violations[0].field == "training.batch_size"
