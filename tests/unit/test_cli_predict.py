"""`detflow predict` and the client's predictions, against a service that answers at once."""

import csv
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from detflow import errors
from detflow.client import Client, predictions
from detflow.v1 import common_pb2, inference_pb2, prediction_pb2, prediction_pb2_grpc, training_pb2
from tests.cli_rig import Rig, rig
from tests.surface_rig import TRAINING, fail

__all__ = ["rig"]

BOX = inference_pb2.PixelBox(x1=1.5, y1=2, x2=30, y2=40)
FOUND = inference_pb2.Detection(class_name="고양이", class_id=1, confidence=0.875, box=BOX)
PICTURE = b"\xff\xd8picture"


@dataclass
class Service(prediction_pb2_grpc.PredictionServiceServicer):
    """Finds one thing in every image that does not begin with "bad"."""

    headers: list[Any] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    refusal: errors.DetflowError | None = None

    def PredictImages(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        if self.refusal is not None:
            fail(context, self.refusal)
        answer = prediction_pb2.PredictImagesResponse
        data = b""
        for message in request_iterator:
            if message.HasField("header"):
                self.headers.append(message.header)
                if len(self.headers) == 1:
                    yield answer(progress=common_pb2.Progress(stage="convert", percent=40))
                data = b""
            elif message.HasField("chunk"):
                data += message.chunk
            else:
                assert message.size_bytes == len(data)
                self.images.append(data)
                yield answer(prediction=self._predict(data))

    def _predict(self, data: bytes) -> prediction_pb2.Prediction:
        header = self.headers[-1]
        found = prediction_pb2.Prediction(file_name=header.file_name, width_px=64, height_px=48)
        if data.startswith(b"bad"):
            problem = errors.InvalidArgument(
                f"{header.file_name}: the image is damaged; export it again", reason="CORRUPT_IMAGE"
            )
            found.failure.CopyFrom(errors.failure(problem))
            return found
        found.detections.append(FOUND)
        found.latency.total_seconds = 0.0125
        if header.drawn_side_px:
            found.drawn_image = PICTURE
        return found


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, rig: Rig) -> Iterator[Service]:
    server = grpc.server(ThreadPoolExecutor(2))
    service = Service()  # type: ignore[abstract]
    rig.fakes.trainer.trainings = [training_pb2.Training(name=TRAINING)]
    prediction_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    monkeypatch.setenv("DETFLOW_METRICS_ADDRESS", address)
    yield service
    server.stop(None).wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden/x.jpg", "inside/a.webp", "inside/a.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "images"


def test_images_of_folders_are_predicted_and_drawn(
    rig: Rig, service: Service, folder: Path
) -> None:
    options = ("--threshold", "0.1", "--iou", "0.5", "--limit", "7", "--side", "640")
    done = rig.run("predict", TRAINING, "images", "images/a.jpg", "--out", "drawn/here", *options)
    assert done.code == 0, done.err
    assert service.images == [b"a.jpg", b"b.PNG", b"inside/a.jpg", b"inside/a.webp", b"a.jpg"]
    header = service.headers[0]
    assert (header.training, header.file_name) == (TRAINING, "images/a.jpg")
    assert (header.confidence_threshold, header.nms_iou) == (0.1, 0.5)
    assert (header.max_detections, header.drawn_side_px) == (7, 640)
    lines = done.out.splitlines()
    assert lines[0] == "preparing the model 40% convert"
    assert lines[1] == "images/a.jpg  64x48  1 found  12 ms"
    assert lines[2].split() == ["고양이", "0.88", "1.5", "2.0", "30.0", "40.0"]
    assert lines[-1] == "5 boxes in 5 images; pictures in drawn/here"
    written = {str(path.relative_to("drawn/here")) for path in Path("drawn").rglob("*.jpg")}
    assert written == {
        *("a.jpg", "a-2.jpg", "b.PNG.jpg", "inside/a.jpg", "inside/a.webp.jpg"),
    }
    assert Path("drawn/here/a-2.jpg").read_bytes() == PICTURE


def test_one_bad_image_fails_the_command_and_no_other(
    rig: Rig, service: Service, folder: Path
) -> None:
    (folder / "b.PNG").write_bytes(b"bad")
    (folder / "inside" / "a.jpg").unlink()
    (folder / "inside" / "a.jpg").symlink_to("nowhere")
    done = rig.run("predict", TRAINING, "images", "--csv")
    assert done.code == 1
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["file"] for row in rows] == ["images/a.jpg", "images/inside/a.webp"]
    assert (rows[0]["class"], rows[0]["confidence"], rows[0]["x1"]) == ("고양이", "0.8750", "1.50")
    assert done.err.splitlines() == [
        "detflow: images/b.PNG: the image is damaged; export it again",
        "detflow: images/inside/a.jpg: cannot read images/inside/a.jpg (No such file or"
        " directory): give an image file",
        "detflow: 2 of 4 images failed",
    ]
    as_json = rig.run("predict", TRAINING, "images/a.jpg", "images/b.PNG", "--json", "-o", "out")
    first, second = as_json.json["predictions"]
    assert as_json.code == 1 and first["picture"] == "out/a.jpg" and first["drawnImage"] == ""
    assert first["detections"][0]["className"] == "고양이"
    assert second["failure"]["status"]["message"].startswith("images/b.PNG: the image is damaged")


def test_what_cannot_be_meant_is_refused_before_anything_is_sent(
    rig: Rig, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for path, text in (("nowhere", "there is no nowhere"), ("empty", "has no images (.jpg")):
        done = rig.run("predict", TRAINING, path)
        assert done.code == 1 and text in done.err
    assert rig.run("predict", TRAINING, "empty", "--json", "--csv").code == 2
    assert rig.run("predict", TRAINING, "empty", "--threshold", "2").code == 2
    assert not service.headers


def test_refusal_of_the_service_is_told_with_its_remedy(
    rig: Rig, service: Service, folder: Path
) -> None:
    service.refusal = errors.FailedPrecondition("no weights yet; wait", reason="X")
    done = rig.run("predict", TRAINING, "images")
    assert (done.code, done.err) == (1, "detflow: no weights yet; wait\n")


def test_client_answers_in_order_whatever_could_not_be_read(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "MAX_IMAGE_BYTES", 10)
    (tmp_path / "large.jpg").write_bytes(b"x" * 11)
    given: list[predictions.Image] = [
        tmp_path / "no.jpg",
        b"abc",
        str(tmp_path / "large.jpg"),
        b"bad",
        tmp_path / "no.png",
    ]
    heard: list[common_pb2.Progress] = []
    with Client("127.0.0.1:1") as client:
        found = [*client.predictions.predict(TRAINING, given, progress=heard.append)]
        assert [*client.predictions.predict(TRAINING, [])] == []
        (folder,) = client.predictions.predict(TRAINING, [tmp_path])
        assert folder.HasField("failure")
    reasons = [
        errors.from_status(one.failure.status).reason if one.HasField("failure") else ""
        for one in found
    ]
    assert reasons == ["NO_SUCH_FILE", "", "IMAGE_LIMIT", "CORRUPT_IMAGE", "NO_SUCH_FILE"]
    assert found[0].file_name.endswith("no.jpg") and found[1].file_name == ""
    assert [one.percent for one in heard] == [40]
    assert not service.headers[0].HasField("confidence_threshold")


def test_error_of_the_callers_own_images_comes_through(service: Service) -> None:
    def images() -> Iterator[bytes]:
        yield b"abc"
        raise KeyError("mine")

    with Client("127.0.0.1:1") as client, pytest.raises(KeyError, match="mine"):
        for _ in client.predictions.predict(TRAINING, images()):
            pass


def test_caller_may_leave_before_the_end(service: Service) -> None:
    with Client("127.0.0.1:1") as client:
        found = client.predictions.predict(TRAINING, (b"abc" for _ in range(10**9)))
        assert next(found).detections[0].class_name == "고양이"
        found.close()  # type: ignore[attr-defined]
