"""Weights to begin with: what is read, what is refused, and what a network takes over."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from detflow.errors import InvalidArgument
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")


def network(model: str = "yolov8n", num_classes: int = 3, seed: int = 0) -> Any:
    import torch

    from services.trainer.worker import networks

    torch.manual_seed(seed)
    return networks.build(model, num_classes=num_classes, image_size=128, hyperparameters={})


def read_weights(state_dict: dict[str, Any], model: str = "") -> Any:
    from services.trainer.worker.weights import ReadWeights

    return ReadWeights(format="test", model=model, class_names=(), state_dict=state_dict)


def spec(folder: Path, stored: StoredObject | None = None) -> Spec:
    return Spec(
        training="projects/p/versions/v/trainings/t1",
        attempt=1,
        model="yolov8n",
        batch_size=4,
        step_batch_size=4,
        epochs=3,
        hyperparameters={},
        manifest=StoredObject(),
        checkpoint=None,
        warm_start_weights=stored,
        folder=folder,
    )


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self._path,)


def test_every_safe_way_to_write_tensors_is_read_with_what_it_says_of_itself(
    tmp_path: Path,
) -> None:
    import safetensors.torch
    import torch

    from services.trainer.worker.weights import read

    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(7)}
    about = {"model": "yolov8n", "class_names": ["개", "cat"]}
    path = tmp_path / "weights"  # an upload has no suffix
    names = json.dumps(about["class_names"])
    safetensors.torch.save_file(tensors, path, {"model": "yolov8n", "class_names": names})
    found = [read(path)]
    path = tmp_path / "more weights"  # the tensors of the other are still in its file
    for content in (
        {"format": "detflow-weights/1", **about, "state_dict": tensors},
        {**about, "model_names": 1, "state_dict": tensors},
        tensors,
        {"model": tensors},
    ):
        torch.save(content, path)
        found.append(read(path))
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    found.append(read(path))
    for one in found:
        assert one.state_dict.keys() == tensors.keys()
        assert all(torch.equal(tensors[name], value) for name, value in one.state_dict.items())
    assert [one.format for one in found] == [
        *("safetensors", "detflow-weights/1", "", "state dict", "", "state dict")
    ]
    named = [(one.model, one.class_names) for one in found]
    assert named == [("yolov8n", ("개", "cat"))] * 3 + [("", ())] * 3


def test_exported_files_say_what_they_are_and_begin_a_training_as_a_whole(tmp_path: Path) -> None:
    import torch

    from detflow.v1.worker_pb2 import InspectJob, JobMessage
    from services.trainer.worker import inspect
    from services.trainer.worker.export import pytorch
    from services.trainer.worker.export.weights import Weights
    from services.trainer.worker.weights import read, take_over

    trained = network()
    weights = Weights(
        model="yolov8n",
        class_names=("개", 'a "cat"', "dog"),
        image_size=128,
        hyperparameters={},
        state_dict=trained.state_dict(),
    )
    about = weights.describe(training="projects/p/t", image_size=128, precision="FP32")
    folder = tmp_path / "export"
    folder.mkdir()
    made = [pytorch.write(weights, about, half=False, folder=folder).read_bytes() for _ in "12"]
    assert made[0] == made[1]  # the library writes what a file says of itself in any order
    with zipfile.ZipFile(folder / "model.zip") as archive:
        archive.extractall(tmp_path)
    header = (tmp_path / "model.safetensors").read_bytes()
    told = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert told == {"format": pytorch.FORMAT, **about}
    for name in ("model.safetensors", "model.pt"):
        said: list[JobMessage] = []
        inspect.run(InspectJob(path=str(tmp_path / name)), said.append)
        found = said[0].weights
        assert (found.model, tuple(found.class_names)) == ("yolov8n", weights.class_names)
        other = network(seed=1)
        taken, total = take_over(other, read(tmp_path / name), "yolov8n")
        assert taken == total == found.num_tensors
        for key, value in other.state_dict().items():
            assert torch.equal(value, trained.state_dict()[key]), key


def test_file_that_runs_code_is_refused_before_it_does(tmp_path: Path) -> None:
    import torch

    from services.trainer.worker.weights import read

    path, made = tmp_path / "weights.pt", tmp_path / "made"
    for is_zip in (True, False):
        content = {"state_dict": {"a": torch.zeros(1)}, "evil": Payload(made)}
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(InvalidArgument, match="state_dict") as caught:
            read(path)
        assert caught.value.reason == "UNSAFE_WEIGHTS"
        assert not made.exists()


def test_file_with_a_pickled_network_is_refused_with_the_remedy(tmp_path: Path) -> None:
    import torch

    from services.trainer.worker.weights import read

    torch.save({"model": network()}, tmp_path / "weights.pt")
    with pytest.raises(InvalidArgument, match=r"torch.save\(model.state_dict\(\)") as caught:
        read(tmp_path / "weights.pt")
    assert caught.value.reason == "UNSAFE_WEIGHTS"


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"PK\x03\x04" + b"\0" * 90, b"#!/bin/sh", (5).to_bytes(8, "little") + b"{zzzz"],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    from services.trainer.worker.weights import read

    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument) as caught:
        read(path)
    assert caught.value.reason == "UNSAFE_WEIGHTS"


def test_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    from services.trainer.worker.weights import read

    with zipfile.ZipFile(tmp_path / "weights", "w") as archive:
        archive.writestr("image.jpg", b"x")
    with pytest.raises(InvalidArgument) as caught:
        read(tmp_path / "weights")
    assert caught.value.reason == "UNSAFE_WEIGHTS"


@pytest.mark.parametrize("kind", ["text", "sparse", "giant", "nan", "meta", "nested", "no name"])
def test_what_cannot_be_copied_into_a_network_is_refused(tmp_path: Path, kind: str) -> None:
    import torch

    from services.trainer.worker.weights import read

    bad: Any = {
        "text": "tensor",
        "sparse": torch.eye(3).to_sparse(),
        "giant": torch.zeros(1).expand(1 << 50),
        "nan": torch.tensor([1.0, float("nan")]),
        "meta": torch.zeros(3, device="meta"),
        "nested": {"a": torch.zeros(1)},
        "no name": torch.zeros(1),
    }[kind]
    torch.save({5 if kind == "no name" else "bad": bad, "a": torch.zeros(2)}, tmp_path / "w")
    with pytest.raises(InvalidArgument) as caught:
        read(tmp_path / "w")
    assert caught.value.reason == "UNSAFE_WEIGHTS"


@pytest.mark.parametrize(("model", "num_classes"), [("yolov8n", 3), ("efficientdet-d0", 3)])
def test_weights_of_the_same_model_are_taken_over_as_a_whole(model: str, num_classes: int) -> None:
    import torch

    from services.trainer.worker.weights import take_over

    source, target = network(model, seed=1), network(model, seed=2)
    taken, total = take_over(target, read_weights(source.state_dict()), model)
    assert taken == total == len(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize("model", ["yolov8n", "efficientdet-d0"])
def test_head_for_other_classes_stays_new_and_the_rest_is_taken_over(model: str) -> None:
    import torch

    from services.trainer.worker.weights import take_over

    source, target = network(model, 80, seed=1), network(model, 3, seed=2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    taken, total = take_over(target, read_weights(source.state_dict()), model)
    assert 0.5 * total < taken < total
    kept = 0
    for name, value in source.state_dict().items():
        fits = value.shape == before[name].shape
        kept += not fits
        assert torch.equal(target.state_dict()[name], value if fits else before[name]), name
    assert kept == total - taken


def test_names_of_other_programs_are_recognised() -> None:
    from services.trainer.worker.weights import take_over

    yolo, efficientdet = network(seed=1).state_dict(), network("efficientdet-d0").state_dict()
    wrapped = {f"module.{name}": value for name, value in yolo.items()}
    bare = {name.removeprefix("net."): value for name, value in efficientdet.items()}
    assert take_over(network(), read_weights(wrapped), "yolov8n")[0] == len(yolo)
    assert take_over(network("efficientdet-d0"), read_weights(bare), "efficientdet-d0")[0] == len(
        efficientdet
    )


@pytest.mark.parametrize("other", ["yolov8s", "yolov5s", "efficientdet-d0"])
def test_weights_of_another_model_are_refused_naming_both(other: str) -> None:
    from services.trainer.worker.weights import take_over

    state_dict = network(other).state_dict()
    with pytest.raises(InvalidArgument, match=rf"{other} do not fit yolov8n") as caught:
        take_over(network(), read_weights(state_dict, other), "yolov8n")
    assert caught.value.reason == "WEIGHTS_DO_NOT_FIT"


def test_given_weights_come_before_those_of_the_machine(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    from services.trainer.worker.weights import find

    store = ObjectStore(f"file://{tmp_path / 'store'}")
    folder = tmp_path / "pretrained"
    folder.mkdir()
    with_folder = Settings(pretrained_dir=str(folder))
    assert find(spec(tmp_path), store, Settings()) == (None, "")
    assert find(spec(tmp_path), store, with_folder) == (None, "")
    torch.save({"a": torch.tensor([1.0])}, folder / "yolov8n.pt")
    safetensors.torch.save_file({"a": torch.tensor([9.0])}, folder / "yolov8s.safetensors")
    found, origin = find(spec(tmp_path), store, with_folder)
    assert found is not None and found.state_dict["a"] == 1 and "yolov8n.pt" in origin
    safetensors.torch.save_file({"a": torch.tensor([2.0])}, folder / "yolov8n.safetensors")
    found, _ = find(spec(tmp_path), store, with_folder)
    assert found is not None and found.state_dict["a"] == 2
    torch.save({"a": torch.tensor([3.0])}, tmp_path / "given")
    stored = store.put("weights/given", (tmp_path / "given").read_bytes())
    found, origin = find(spec(tmp_path, stored), store, with_folder)
    assert found is not None and found.state_dict["a"] == 3 and "given" in origin
    assert not (tmp_path / "warm-start").exists()
