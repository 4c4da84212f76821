import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from detflow.local.demo_data import write_dataset
from tests.quiet_library import quiet_library
from tests.stack_rig import Stack

__all__ = ["quiet_library"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TINY = ("--model", "yolov8n", "--batch", "8", "--epochs", "2", "--set", "image_size=64")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "shapes"
    write_dataset(folder, 40)
    return folder


def test_the_whole_job_by_command_line(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    imported = stack.detflow("datasets", "import", str(shapes), "--json")
    assert imported.code == 0, imported.err
    assert imported.json["displayName"] == "shapes"
    assert imported.json["state"] == "READY"
    assert imported.json["numImages"] == "40"
    listed = stack.detflow("--json", "datasets", "list")
    assert [d["name"] for d in listed.json["datasets"]] == [imported.json["name"]]

    created = stack.detflow("versions", "create", "--dataset", "shapes", "--augment", "hflip")
    assert created.code == 0, created.err
    assert created.out.startswith("preprocess") or "created V_0" in created.out
    version = stack.detflow("versions", "show", "V_0", "--json").json
    assert version["state"] == "READY"
    assert version["numImages"] == {"train": "56", "val": "8", "test": "4"}

    trained = stack.detflow("train", "V_0", *TINY, seconds=400)
    assert trained.code == 0, trained.err
    assert "epoch 1/2" in trained.out and "elapsed" in trained.out and "box " in trained.out
    assert "mAP50-95" in trained.out and "AT CONFIDENCE" in trained.out

    measured = stack.detflow("metrics", "V_0", "--json").json
    assert [e["split"] for e in measured["evaluations"]] == ["SPLIT_VAL", "SPLIT_TEST"]
    assert {e["numImages"] for e in measured["evaluations"]} == {"8", "4"}
    losses = {s["name"]: s["epochs"] for s in measured["series"]}
    assert losses["train/box_loss"] == [1, 2] and losses["val/map50"] == [1, 2]
    assert stack.detflow("metrics", "V_0").code == 0
    assert stack.detflow("versions", "show", "V_0", "--json").json["state"] == "COMPLETED"

    model = tmp_path / "model.onnx"
    exported = stack.detflow("export", "V_0", "--format", "onnx", "-o", str(model), "--json")
    assert exported.code == 0, exported.err
    stored = exported.json["object"]
    assert hashlib.sha256(model.read_bytes()).hexdigest() == stored["sha256"]
    downloaded = httpx.get(
        f"{stack.url}/v1/{exported.json['name']}:download", headers=stack.headers
    )
    assert downloaded.content == model.read_bytes()
    assert f'filename="{exported.json["fileName"]}"' in downloaded.headers["content-disposition"]

    again = stack.detflow("train", "V_0", *TINY)
    assert again.code == 1
    assert again.err.startswith("detflow: ") and len(again.err.splitlines()) == 1

    assert stack.detflow("versions", "rename", "V_0", "최종 🎯").code == 0
    assert "최종 🎯" in stack.detflow("versions", "list").out
    assert stack.detflow("versions", "delete", "최종 🎯").code == 0
    assert stack.detflow("versions", "list", "--json").json == {"versions": []}
    assert stack.detflow("versions", "restore", "최종 🎯").code == 0
    [back] = stack.detflow("versions", "list", "--json").json["versions"]
    assert back["name"] == version["name"] and back["state"] == "COMPLETED"

    used = stack.detflow("datasets", "delete", "shapes")
    assert used.code == 1 and used.err.startswith("detflow: ")


def write_weights(path: Path) -> None:
    """Writes a yolov8n of three classes that has learnt nothing."""
    import safetensors.torch

    from services.trainer.worker import networks

    network = networks.build("yolov8n", num_classes=3, image_size=64, hyperparameters={})
    safetensors.torch.save_file(network.state_dict(), path)


@pytest.mark.usefixtures("quiet_library")
def test_waiting_trainings_are_checked_prioritised_and_begin_with_weights(
    stack: Stack, shapes: Path, tmp_path: Path
) -> None:
    assert stack.detflow("datasets", "import", str(shapes), "--name", "queue").code == 0
    for name in ("first", "second", "third"):
        made = stack.detflow("versions", "create", "--dataset", "queue", "--name", name)
        assert made.code == 0, made.err
    checked = stack.detflow("train", "first", *TINY, "--check")
    assert checked.code == 0, checked.err
    for word in ("labels", "train_step", "validation", "checkpoint", "memory", "disk"):
        assert word in checked.out
    assert stack.detflow("trainings", "list", "--version", "first", "--json").json == {
        "trainings": []
    }
    long = (*TINY[:4], "--epochs", "500", "--set", "image_size=32")
    assert stack.detflow("train", "first", *long, "--detach").code == 0

    weights = tmp_path / "best.safetensors"
    write_weights(weights)
    second = stack.detflow("train", "second", *TINY, "--warm-start", str(weights), "--detach")
    assert second.code == 0, second.err
    short = (*TINY[:4], "--epochs", "1", "--set", "image_size=64")
    third = stack.detflow("train", "third", *short, "--warm-start", weights.name, "--detach")
    assert third.code == 0, third.err
    assert len(stack.detflow("weights", "list", "--json").json["weights"]) == 1
    raised = stack.detflow("trainings", "priority", "third", "9", "--json")
    assert (raised.json["priority"], raised.json["queuePosition"]) == (9, 1), raised.err
    assert "place 2 in the queue" in stack.detflow("trainings", "show", "second").out

    assert stack.detflow("trainings", "stop", "first", "--mode", "discard").code == 0
    watched = stack.detflow("trainings", "watch", "third")
    assert watched.code == 0, watched.err
    ended = stack.detflow("trainings", "show", "third", "--json").json["endTime"]
    second = stack.detflow("trainings", "stop", "second", "--mode", "discard", "--json")
    assert second.json.get("startTime", ended) >= ended


def test_the_whole_job_by_http(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "shapes"), "zip", shapes)
    with httpx.Client(
        base_url=f"{stack.url}/v1/projects/default", headers=stack.headers, timeout=30
    ) as http:
        upload = http.post(
            "uploads",
            content=Path(archive).read_bytes(),
            headers={"Content-Type": "application/zip"},
        )
        assert upload.status_code == 200, upload.text
        dataset = http.post(
            "datasets",
            json={"dataset": {"displayName": "by HTTP"}, "upload": upload.json()["name"]},
        ).json()
        last = _last(http, f"{stack.url}/v1/{dataset['name']}:watch", "dataset")
        assert last["state"] == "READY"
        version = http.post(
            "versions",
            json={"dataset": dataset["name"], "recipe": {"maxSidePx": 64, "grayscale": True}},
        ).json()
        assert version["state"] == "PREPROCESSING"
        last = _last(http, f"{stack.url}/v1/{version['name']}/preprocessing:watch", "preprocessing")
        assert last["state"] == "SUCCEEDED"
        # The version follows by an event: its own stream says when.
        for message in _messages(http, f"{stack.url}/v1/projects/default/versions:watch"):
            seen = [*message.get("snapshot", {}).get("versions", []), message.get("version", {})]
            if any(v.get("name") == version["name"] and v["state"] == "READY" for v in seen):
                break
        started = http.post(
            f"{stack.url}/v1/{version['name']}/trainings",
            json={
                "model": "yolov8n",
                "batchSize": 4,
                "epochs": 500,
                "hyperparameters": {"image_size": 32},
            },
        )
        assert started.status_code == 200, started.text
        training = started.json()
        second = http.post(f"{stack.url}/v1/{version['name']}/trainings", json={"model": "yolov8n"})
        assert second.status_code == 409
        assert training["name"] in second.text
        for message in _messages(http, f"{stack.url}/v1/{training['name']}:watch"):
            if message.get("epoch", {}).get("epoch") == 1:
                break
        stopped = stack.detflow("trainings", "stop", training["name"], "--mode", "finish", "--json")
        assert stopped.code == 0, stopped.err
        assert stopped.json["state"] == "STOPPED"
        evaluations = http.get(f"{stack.url}/v1/{training['name']}/evaluations").json()
        assert len(evaluations["evaluations"]) == 2


def test_a_paused_training_is_resumed_and_a_deleted_version_ends_it(
    stack: Stack, shapes: Path
) -> None:
    assert stack.detflow("datasets", "import", str(shapes), "--name", "again").code == 0
    created = stack.detflow(
        "versions", "create", "--dataset", "again", "--name", "paused", "--json"
    )
    assert created.code == 0, created.err
    tiny = ("--model", "yolov8n", "--batch", "8", "--epochs", "500", "--set", "image_size=32")
    started = stack.detflow("train", "paused", *tiny, "--detach", "--json").json
    assert started["state"] == "QUEUED"
    early = stack.detflow("train", "paused", *tiny)
    assert early.code == 1 and started["name"] in early.err
    with httpx.Client(headers=stack.headers, timeout=60) as http:
        for message in _messages(http, f"{stack.url}/v1/{started['name']}:watch"):
            if message.get("epoch", {}).get("epoch") == 1:
                break
    paused = stack.detflow("trainings", "stop", "paused", "--json")
    assert paused.json["state"] == "PAUSED" and paused.json["numEpochsDone"] >= 1
    resumed = stack.detflow("trainings", "resume", "paused", "--detach", "--json")
    assert resumed.json["state"] == "QUEUED"
    assert stack.detflow("versions", "delete", "paused").code == 0
    watched = stack.detflow("trainings", "watch", started["name"], "--json")
    states = [
        json.loads(line)["training"]["state"]
        for line in watched.out.splitlines()
        if "training" in json.loads(line)
    ]
    assert states[-1] == "STOPPED"


def _messages(http: httpx.Client, url: str) -> Iterator[dict[str, Any]]:
    """Yields the messages of a watch as they come."""
    with http.stream("GET", url) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line == "event: end":
                return
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def _last(http: httpx.Client, url: str, noun: str) -> dict[str, Any]:
    """Returns the last state a watch shows of what it watches."""
    [*_, last] = (message[noun] for message in _messages(http, url) if noun in message)
    assert isinstance(last, dict)
    return last
