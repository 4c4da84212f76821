"""Bad input by gRPC, by HTTP and on the command line, at one running stack that must not mind.

Each row of tests/bad_input_table.py has cases here for every surface that can express it.
"""

import html
import http.client
import io
import json
import math
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from detflow.v1 import trainer_pb2, training_pb2
from tests import bad_archives
from tests import bad_input_table as table
from tests.bad_input_rig import (
    GRPC,
    HTTP,
    MAX_UPLOAD_BYTES,
    PROJECT,
    SURFACES,
    Answer,
    World,
    world,
)
from tests.bad_input_table import ROWS, Archive, Call
from tests.preprocess_samples import encode, jpeg, pack, picture, with_orientation, yolo_files
from tests.stack_rig import end, free_base_port, start

ARCHIVES = list(table.archives())
CALLS = list(table.calls())
_COVERED = {(case.row, surface) for case in ARCHIVES for surface in SURFACES}
_COVERED |= {(case.row, surface) for case in CALLS for surface in case.surfaces}
Test = Callable[..., None]


def covers(row: str, *surfaces: str) -> Callable[[Test], Test]:
    """Says of which row a test is, and what it sends by."""
    _COVERED.update((row, surface) for surface in surfaces or SURFACES)
    return lambda test: test


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A stack that asks who calls, with something good in it that outlives all tests."""
    settings = {"DETFLOW_MAX_UPLOAD_BYTES": str(MAX_UPLOAD_BYTES)}
    stack = start(tmp_path_factory.mktemp("data"), free_base_port(), settings)
    try:
        with world(stack, tmp_path_factory.mktemp("files")) as made:
            yield made
            assert made.state() == made.kept
            assert made.client.datasets.statistics(made.good).num_images == 12
            again = made.import_("good again", pack(yolo_files(12)))
            assert again.content_sha256 == made.kept[made.good]
    finally:
        end(stack, signal.SIGTERM)


def test_every_row_is_sent_by_every_surface() -> None:
    assert {row for row, _ in _COVERED} == set(ROWS)
    assert [(row, one) for row in ROWS for one in SURFACES if (row, one) not in _COVERED] == []
    assert [case.name for case in CALLS if bool(case.command) == bool(case.without)] == []


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def named(case: Archive | Call) -> str:
    return case.name.encode("unicode_escape").decode()[:100]


@pytest.mark.parametrize("case", ARCHIVES, ids=named)
def test_bad_archive_is_refused_for_what_is_wrong_with_it(filled: World, case: Archive) -> None:
    path = filled.file(case.data, ".zip")
    answers = filled.at_once(
        lambda: filled.archive_by_grpc(case.data, f"g {path.stem}"),
        lambda: filled.archive_by_http(case.data, f"h {path.stem}"),
        lambda: filled.archive_by_cli(path, f"c {path.stem}"),
    )
    for answer in answers:
        assert case.problem in answer.found, answer
    assert (answers[0].code, answers[1].code) == (case.code, case.code), answers


@pytest.mark.parametrize("case", CALLS, ids=named)
def test_bad_call_is_refused_for_what_is_wrong_with_it(filled: World, case: Call) -> None:
    answers = [filled.by_grpc(case.rpc, case.request), filled.by_http(case.rpc, case.request)]
    for answer in answers:
        assert answer.code == case.code, answer
        if case.field:
            assert any(found.startswith(case.field) for found, _ in answer.found), answer
        assert case.reason in {answer.reason, *(reason for _, reason in answer.found)}, answer
    if case.command:
        done = filled.by_cli(*case.command)
        assert done.status == 1 and case.says in done.text, done


@covers(table.NUMBERS, GRPC)
def test_number_that_is_none_is_refused_where_it_can_be_sent(filled: World) -> None:
    training = training_pb2.Training(model="yolov8n", batch_size=4, epochs=1)
    training.hyperparameters.update({"lr0": math.nan})
    request = trainer_pb2.StartTrainingRequest(parent=filled.names["version"], training=training)
    answer = filled.by_grpc("StartTraining", request)
    assert answer.code == "INVALID_ARGUMENT"
    assert [field for field, _ in answer.found] == ["training.hyperparameters.lr0"]


@covers(table.COLOURS)
def test_images_of_every_kind_are_taken_upright(filled: World) -> None:
    pixels = picture(64, 48)
    palette = io.BytesIO()
    Image.fromarray(pixels).quantize(16).save(palette, "PNG")
    images = {
        "cmyk.jpg": simplejpeg.encode_jpeg(np.dstack([pixels, pixels[:, :, :1]]), 95, "CMYK"),
        "deep.png": cv2.imencode(".png", pixels.astype(np.uint16) * 257)[1].tobytes(),
        "palette.png": palette.getvalue(),
        "alpha.png": encode(".png", np.dstack([pixels, pixels[:, :, :1]])),
        "turned.jpg": with_orientation(jpeg(64, 48), 6),
    }
    files = {f"images/{name}": bytes(data) for name, data in images.items()}
    files |= {f"labels/{name[:-4]}.txt": bad_archives.ROW for name in images}
    for dataset in filled.imported(pack(files), "colours"):
        assert (dataset["state"], int(dataset["numImages"])) == ("READY", 5), dataset
        found = filled.client.datasets.statistics(dataset["name"]).image_sizes
        sizes = {(size.width_px, size.height_px): size.num_images for size in found}
        assert sizes == {(64, 48): 4, (48, 64): 1}


@covers(table.IMAGES)
@covers(table.BOXES)
@covers(table.CLASSES)
def test_what_is_invalid_can_be_left_out_and_is_listed(filled: World) -> None:
    files = {
        **yolo_files(3),
        "images/empty.jpg": b"",
        "images/cut.jpg": jpeg()[:200],
        "images/background.jpg": jpeg(64, 48, seed=9),
        "labels/001.txt": b"0 0.98 0.5 0.06 0.2\n",  # 0.64 px over the edge
        "labels/002.txt": b"7 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n",
    }
    for dataset in filled.imported(pack(files), "left out", skip_invalid=True):
        assert (int(dataset["numImages"]), int(dataset["numBackgroundImages"])) == (4, 1), dataset
        assert {(one["field"], one["reason"]) for one in dataset["skipped"]} == {
            ("images/cut.jpg", "CORRUPT_IMAGE"),
            ("images/empty.jpg", "CORRUPT_IMAGE"),
            ("labels/001.txt:1", "BOX_CLIPPED"),
            ("labels/002.txt:1", "UNKNOWN_CLASS"),
        }


@covers(table.COCO)
def test_crowds_are_kept_and_masks_are_not_read(filled: World) -> None:
    annotation = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20]}
    masks: list[Any] = [{"counts": "no run lengths", "size": [1, 1]}, {"counts": [-1]}, "text"]
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [
            {**annotation, "id": number, "iscrowd": int(number == 0), "segmentation": mask}
            for number, mask in enumerate(masks)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    files = {"images/a.jpg": jpeg(), "all.json": json.dumps(document).encode()}
    for dataset in filled.imported(pack(files), "crowds"):
        assert (int(dataset["numBoxes"]), int(dataset["numCrowdBoxes"])) == (3, 1), dataset


@covers(table.YAML)
def test_what_a_data_yaml_names_beside_classes_is_not_followed(filled: World) -> None:
    text = b"names: [disc, square]\npath: ../../etc\ntrain: /etc\nval: ..\ndownload: touch /ran\n"
    for dataset in filled.imported(pack({**yolo_files(3), "data.yaml": text}), "yaml"):
        assert (dataset["state"], int(dataset["numImages"])) == ("READY", 3), dataset


@covers(table.NAMES)
@covers(table.NAMES_INSIDE)
def test_every_script_comes_back_exactly(filled: World) -> None:
    name = "세포 🦊 e\u0301 العربية"
    files = {
        "data.yaml": f"names: ['{name}', square]\n".encode(),
        f"images/{name}.jpg": jpeg(),
        f"labels/{name}.txt": b"0 0.5 0.5 0.2 0.2\n",
    }
    for number, dataset in enumerate(filled.imported(pack(files), name), 1):
        assert dataset["displayName"] == f"{name} {number}"
        assert dataset["classNames"] == [name, "square"]


@covers(table.ORDER)
def test_second_training_of_a_version_is_refused_with_the_name_of_the_first(filled: World) -> None:
    version = filled.names["version"]
    running = filled.client.trainings.start(version, model="yolov8n", batch_size=4, epochs=1000)
    try:
        training = {"model": "yolov8n", "batchSize": 4, "epochs": 1}
        request = {"parent": version, "training": training}
        for answer in (
            filled.by_grpc("StartTraining", request),
            filled.by_http("StartTraining", request),
        ):
            assert (answer.code, answer.reason) == ("ALREADY_EXISTS", "TRAINING_RUNS")
            assert running.name in answer.text
        done = filled.by_cli("train", "one", "--detach")
        assert done.status == 1 and running.name in done.text
    finally:
        filled.client.trainings.stop(running.name, mode="discard")


@covers(table.TOKENS)
def test_nobody_who_is_not_known_is_told_anything(filled: World) -> None:
    request = {"name": filled.good}
    for token, reason in (("", "NO_TOKEN"), ("dfk_" + "x" * 43, "BAD_TOKEN")):
        for answer in (
            filled.by_grpc("GetDataset", request, token),
            filled.by_http("GetDataset", request, token),
        ):
            assert (answer.code, answer.reason) == ("UNAUTHENTICATED", reason)
        elsewhere = {"DETFLOW_DATA_DIR": str(filled.folder / "none"), "DETFLOW_TOKEN": token}
        address = ("--address", f"127.0.0.1:{filled.stack.port}")
        done = filled.by_cli("datasets", "show", filled.good, *address, environ=elsewhere)
        assert done.status == 1 and "DETFLOW_TOKEN" in done.text


@covers(table.TOKENS)
def test_what_is_of_another_project_is_as_if_it_were_not_there(filled: World) -> None:
    stranger = filled.names["stranger"]
    nowhere = filled.good.replace(PROJECT, "no-such-project")

    def answers(name: str) -> list[Answer]:
        request = {"name": name}
        return [
            filled.by_grpc("GetDataset", request, stranger),
            filled.by_http("GetDataset", request, stranger),
            filled.by_cli("datasets", "show", name, environ={"DETFLOW_TOKEN": stranger}),
        ]

    for there, gone in zip(answers(filled.good), answers(nowhere), strict=True):
        assert there.code in ("NOT_FOUND", "") and there.status in (0, 404, 1)
        assert there.text.replace(PROJECT, "no-such-project") == gone.text
        assert (there.code, there.reason, there.status) == (gone.code, gone.reason, gone.status)


@covers(table.SIZES)
def test_archive_that_is_too_large_is_refused_with_the_limit(filled: World) -> None:
    data = bytes(MAX_UPLOAD_BYTES + 1)
    path = filled.file(data, ".zip")
    by_grpc = filled.archive_by_grpc(data, "large")
    by_http = filled.archive_by_http(data, "large")
    for answer in (by_grpc, by_http):
        assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "ARCHIVE_LIMIT")
    assert by_http.status == 413
    for answer in (by_grpc, by_http, filled.archive_by_cli(path, "large")):
        assert str(MAX_UPLOAD_BYTES) in answer.text, answer


@covers(table.SIZES, GRPC, HTTP)
def test_message_that_is_too_large_is_refused(filled: World) -> None:
    request = {"projectId": "large", "project": {"displayName": "x" * (5 << 20)}}
    assert filled.by_grpc("CreateProject", request).code == "RESOURCE_EXHAUSTED"
    answer = filled.by_http("CreateProject", request)
    assert (answer.status, answer.reason) == (413, "BODY_TOO_LARGE")


@covers(table.WEIGHTS)
def test_weights_that_run_code_are_refused_and_run_nothing(filled: World) -> None:
    ran = filled.folder / "ran"
    path = filled.file(pickle.dumps({"state_dict": Payload(ran)}), ".pt")
    answers = filled.at_once(
        lambda: filled.weights_by_grpc(path),
        lambda: filled.weights_by_http(path.read_bytes()),
        lambda: filled.weights_by_cli(path),
    )
    for answer in answers[:2]:
        assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "UNSAFE_WEIGHTS")
    assert answers[2].status == 1 and "safetensors" in answers[2].text
    assert not ran.exists()
    assert filled.client.weights.list(PROJECT) == []


@covers(table.SCRIPTS)
def test_markup_is_kept_and_shown_as_text(filled: World) -> None:
    evil = "<script>alert(1)</script>"
    image = "<img src=x onerror=alert(2)>"
    files = {**yolo_files(12), "data.yaml": f"names: ['{evil}', '{image}']\n".encode()}
    for dataset in filled.imported(pack(files), evil):
        assert dataset["displayName"].startswith(evil)
        assert dataset["classNames"] == [evil, image]
    answered = filled.http.get(f"/v1/{dataset['name']}")
    assert answered.headers["content-type"].startswith("application/json")
    assert answered.headers["x-content-type-options"] == "nosniff"
    page = filled.folder / "page.html"
    made = filled.command(
        "versions", "create", "--dataset", dataset["name"], "--preview", str(page)
    )
    assert made[0] == 0, made
    shown = page.read_text(encoding="utf-8")
    assert html.escape(evil) in shown and html.escape(image) in shown
    assert evil not in shown and image not in shown


@covers(table.TRICKS)
def test_paths_that_lead_elsewhere_lead_nowhere(filled: World) -> None:
    for part in ("..", "../../other", "a/../b", "%2e%2e", "%252e%252e", "a\\b", "a%2fb", "a%5cb"):
        name = f"projects/{PROJECT}/datasets/{part}"
        answer = filled.by_grpc("GetDataset", {"name": name})
        assert (answer.code, [field for field, _ in answer.found]) == ("INVALID_ARGUMENT", ["name"])
        for path in (f"/v1/{name}", f"/v1/{name}:download"):
            # What tidies paths up would send another one.
            connection = http.client.HTTPConnection("127.0.0.1", filled.stack.port, timeout=60)
            connection.request("GET", path, headers=filled.stack.headers)
            assert connection.getresponse().status == 404, path
            connection.close()
        assert filled.by_cli("datasets", "show", name).status == 1
