"""The SDK's exports, weights, trainings and schema against fakes."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from detflow import errors
from detflow.client import Client, connection
from detflow.v1 import export_pb2, training_pb2
from tests.surface_rig import FILE, MIB, TRAINING, VERSION, Surface, serving


@dataclass
class Rig:
    client: Client
    fakes: Surface


@pytest.fixture
def rig() -> Iterator[Rig]:
    with serving() as fakes, Client("127.0.0.1:1", environ=fakes.environ) as client:
        yield Rig(client, fakes)


def test_export_carries_its_options_and_is_waited_for(rig: Rig) -> None:
    made = rig.client.exports.create(
        TRAINING,
        format="onnx",
        precision="fp16",
        image_size_px=320,
        batch_size=4,
        dynamic=True,
        simplify=True,
        opset=18,
        end_to_end=True,
    )
    request = rig.fakes.exports.created[0]
    assert request.request_id and request.parent == TRAINING
    assert request.export == export_pb2.Export(
        format=export_pb2.Export.ONNX,
        precision=export_pb2.Export.FP16,
        image_size_px=320,
        batch_size=4,
        dynamic=True,
        simplify=True,
        opset=18,
        end_to_end=True,
    )
    seen: list[tuple[str, float]] = []
    done = rig.client.exports.wait(made.name, progress=lambda p: seen.append((p.stage, p.percent)))
    assert done.state == export_pb2.Export.SUCCEEDED
    assert seen == [("convert", 40)]


@pytest.mark.parametrize(
    ("outcome", "kind", "words"),
    [
        (export_pb2.Export.FAILED, errors.FailedPrecondition, "differs by 3 px"),
        (export_pb2.Export.CANCELLED, errors.Cancelled, "was cancelled"),
    ],
)
def test_waiting_for_an_export_raises_what_became_of_it(
    rig: Rig, outcome: int, kind: type[errors.DetflowError], words: str
) -> None:
    rig.fakes.exports.outcome = outcome
    name = rig.client.exports.create(TRAINING, format="onnx").name
    with pytest.raises(kind, match=words):
        rig.client.exports.wait(name)


def test_unknown_format_and_precision_are_refused_before_the_call(rig: Rig) -> None:
    with pytest.raises(errors.InvalidArgument, match="onnx, openvino, pytorch, not 'tflite'"):
        rig.client.exports.create(TRAINING, format="tflite")
    with pytest.raises(errors.InvalidArgument, match="fp32, fp16, int8"):
        rig.client.exports.create(TRAINING, format="onnx", precision="fp8")
    assert rig.fakes.exports.created == []


def test_exports_are_listed_over_all_pages_cancelled_and_deleted(rig: Rig) -> None:
    exports = rig.client.exports
    names = [exports.create(TRAINING, format="onnx").name for _ in range(3)]
    assert [one.name for one in exports.list(TRAINING)] == names[::-1]
    assert exports.cancel(names[0]).state == export_pb2.Export.CANCELLED
    exports.delete(names[0])
    assert len(exports.list(TRAINING)) == 2
    with pytest.raises(errors.NotFound):
        exports.delete(names[0])


def exported(rig: Rig) -> str:
    made = rig.client.exports.create(TRAINING, format="onnx")
    return rig.client.exports.wait(made.name).name


def test_download_replaces_a_file_with_a_checked_one(rig: Rig, tmp_path: Path) -> None:
    name = exported(rig)
    old = tmp_path / "model.onnx"
    old.write_bytes(b"old")
    percents: list[float] = []
    path = rig.client.exports.download(name, old, progress=lambda p: percents.append(p.percent))
    assert path == old and old.read_bytes() == FILE
    assert percents[-1] == 100 and percents == sorted(percents)
    assert old.stat().st_mode & 0o444 == 0o444
    in_folder = rig.client.exports.download(name, tmp_path)
    assert in_folder == tmp_path / "yolov8n-t.onnx"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.onnx", "yolov8n-t.onnx"]


@pytest.mark.parametrize("sent", [FILE[:-1], FILE[:-1] + b"x", FILE + b"x"])
def test_download_that_differs_leaves_what_was_there(rig: Rig, tmp_path: Path, sent: bytes) -> None:
    name = exported(rig)
    rig.fakes.exports.sent = sent
    old = tmp_path / "model.onnx"
    old.write_bytes(b"old")
    with pytest.raises(errors.DataLoss, match="download it again"):
        rig.client.exports.download(name, old)
    assert old.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [old]


def test_file_name_of_a_server_cannot_leave_the_folder(rig: Rig, tmp_path: Path) -> None:
    name = exported(rig)
    rig.fakes.exports.kept[name].file_name = "../../evil.onnx"
    assert rig.client.exports.download(name, tmp_path) == tmp_path / "evil.onnx"


def test_download_says_where_it_cannot_write_and_what_has_no_file(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"cannot write .*nowhere"):
        rig.client.exports.download(exported(rig), tmp_path / "nowhere" / "a.onnx")
    waiting = rig.client.exports.create(TRAINING, format="onnx")
    with pytest.raises(errors.FailedPrecondition, match="is QUEUED and has no file"):
        rig.client.exports.download(waiting.name, tmp_path)


def test_weights_larger_than_the_limit_are_refused_before_anything_is_sent(
    rig: Rig, tmp_path: Path
) -> None:
    file = tmp_path / "best.pt"
    with file.open("wb") as opened:
        opened.truncate((2 << 30) + 1)  # of nothing but a hole
    for send in (rig.client.weights.upload, rig.client.weights.ensure):
        with pytest.raises(errors.ResourceExhausted) as caught:
            send(file)
        assert caught.value.reason == "WEIGHTS_LIMIT"
    assert not rig.client.weights.list()


def test_weights_are_uploaded_with_progress_under_the_files_name(rig: Rig, tmp_path: Path) -> None:
    file = tmp_path / "best.pt"
    file.write_bytes(b"x" * (2 * MIB + 1))
    done: list[int] = []
    weights = rig.client.weights.upload(file, progress=lambda p: done.append(p.num_done))
    assert (weights.display_name, weights.size_bytes) == ("best.pt", 2 * MIB + 1)
    assert weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert done == [MIB, 2 * MIB, 2 * MIB + 1]
    named = rig.client.weights.upload(file, name="첫 가중치")
    assert rig.client.weights.find("첫 가중치").name == named.name
    assert rig.client.weights.get(named.name) == named
    rig.client.weights.delete(named.name)
    assert [one.name for one in rig.client.weights.list()] == [weights.name]
    with pytest.raises(errors.NotFound, match="detflow weights list"):
        rig.client.weights.find("첫 가중치")


def test_the_same_bytes_are_not_uploaded_twice(rig: Rig, tmp_path: Path) -> None:
    file, other = tmp_path / "best.pt", tmp_path / "other.pt"
    file.write_bytes(b"x")
    other.write_bytes(b"x")
    first = rig.client.weights.ensure(file)
    assert rig.client.weights.ensure(other).name == first.name
    other.write_bytes(b"y")
    assert rig.client.weights.ensure(other).name != first.name


def test_refused_weights_and_missing_file_are_said(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"cannot read .*none\.pt"):
        rig.client.weights.upload(tmp_path / "none.pt")
    rig.fakes.weights.refusal = errors.InvalidArgument("runs code", reason="UNSAFE_WEIGHTS")
    (tmp_path / "evil.pt").write_bytes(b"x")
    with pytest.raises(errors.InvalidArgument, match="runs code"):
        rig.client.weights.upload(tmp_path / "evil.pt")


def test_training_carries_queue_warm_start_and_devices(rig: Rig) -> None:
    start = rig.client.trainings.start
    start(VERSION, priority=-5, warm_start="projects/default/weights/w", num_devices=2)
    asked = rig.fakes.trainer.started[0]
    assert asked.request_id and not asked.validate_only
    assert asked.training.priority == -5
    assert asked.training.warm_start.weights == "projects/default/weights/w"
    assert asked.training.resources == training_pb2.Resources(num_devices_per_node=2)
    start(VERSION, warm_start=TRAINING, num_nodes=3)
    asked = rig.fakes.trainer.started[1]
    assert asked.training.warm_start.training == TRAINING
    assert asked.training.resources.num_nodes == 3
    start(VERSION)
    asked = rig.fakes.trainer.started[2].training
    assert not asked.HasField("warm_start") and not asked.HasField("resources")
    with pytest.raises(errors.InvalidArgument, match="resource name of a training"):
        start(VERSION, warm_start="best.pt")


def test_check_is_given_minutes_and_queues_nothing(rig: Rig) -> None:
    rig.fakes.trainer.preflight.device = "cpu"
    checked = rig.client.trainings.start(VERSION, validate_only=True)
    assert checked.preflight.device == "cpu" and not checked.name
    assert rig.fakes.trainer.started[0].validate_only
    assert rig.fakes.trainer.deadlines[0] > 500


def test_priority_of_a_training_is_changed_by_a_masked_update(rig: Rig) -> None:
    rig.client.trainings.update(TRAINING, priority=7)
    [request] = rig.fakes.trainer.updated
    assert (request.training.name, request.training.priority) == (TRAINING, 7)
    assert list(request.update_mask.paths) == ["priority"]


def test_schema_of_a_family_has_its_entries_ranges_and_defaults(rig: Rig) -> None:
    whole = rig.client.hyperparameters()
    assert [entry.name for entry in whole] == ["image_size", "dfl", "optimizer", "cos_lr"]
    size, *others = rig.client.hyperparameters("efficientdet")
    assert [entry.name for entry in others] == ["optimizer", "cos_lr"]
    assert (size.minimum, size.maximum, size.multiple_of) == (128, 1536, 128)
    assert [*size.defaults] == ["efficientdet"] and not size.family_ranges
    assert rig.client.hyperparameters("yolov8")[0].multiple_of == 32
    with pytest.raises(errors.InvalidArgument, match="one of efficientdet, yolov8"):
        rig.client.hyperparameters("yolov9")


def test_closing_leaves_a_channel_alone_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    class Stuck:
        def close(self) -> None:
            ended.wait(20)

    monkeypatch.setattr(connection, "_CLOSE_SECONDS", 0.05)
    client = Client("127.0.0.1:1", environ={})
    monkeypatch.setitem(client._connection._channels, "trainer", cast(Any, Stuck()))
    client.close()
    assert not ended.is_set()
    ended.set()
