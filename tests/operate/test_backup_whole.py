"""A whole installation, backed up while it runs and restored elsewhere, as its operator sees it."""

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from detflow.local.demo_data import write_dataset
from detflow.local.running import owner_token
from tests.stack_rig import Stack, detflow, end, free_base_port, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TINY = ("--model", "yolov8n", "--batch", "8", "--epochs", "1", "--set", "image_size=64")
_LISTS = (
    "projects",
    "projects/default/datasets",
    "projects/default/versions?showDeleted=true",
    "projects/default/versions/-/trainings",
    "projects/default/webhooks",
    "projects/default/apiKeys",
    "projects/default/members",
)


@pytest.fixture
def stacks() -> Iterator[list[Stack]]:
    """Stacks that end with the test."""
    running: list[Stack] = []
    yield running
    for stack in running:
        if stack.process.poll() is None:
            end(stack, signal.SIGTERM)


def test_a_restored_installation_has_everything_and_trains_on(
    stacks: list[Stack], tmp_path: Path
) -> None:
    write_dataset(tmp_path / "shapes", 24)
    stacks.append(start(tmp_path / "old", free_base_port()))
    old = stacks[0]
    _fill(old, tmp_path)
    before = _everything(old)

    folder = str(tmp_path / "backups")
    made = detflow(old.data_dir, "backup", "create", folder, "--json")
    assert made.code == 0, made.err
    assert made.json["numLost"] == 0 and made.json["numObjects"] > 10
    refused = detflow(old.data_dir, "backup", "restore", folder)
    assert refused.code == 1 and "runs already" in refused.err
    end(old, signal.SIGTERM)
    # It does not have to run.
    again = detflow(old.data_dir, "backup", "create", folder)
    assert again.code == 0, again.err
    assert detflow(old.data_dir, "backup", "verify", folder).code == 0

    new = tmp_path / "new"
    restored = detflow(new, "backup", "restore", folder, "--id", made.json["id"])
    assert restored.code == 0, restored.err
    stacks.append(start(new, free_base_port()))
    assert _everything(stacks[1]) == before

    assert stacks[1].detflow("versions", "restore", "V_1").code == 0
    trained = stacks[1].detflow("train", "V_1", *TINY, seconds=400)
    assert trained.code == 0, trained.err


def _fill(stack: Stack, tmp_path: Path) -> None:
    for arguments in (
        ("datasets", "import", str(tmp_path / "shapes")),
        ("versions", "create", "--dataset", "shapes"),
        ("versions", "create", "--dataset", "shapes", "--grayscale"),
        ("train", "V_0", *TINY),
        ("export", "V_0", "--format", "onnx", "-o", str(tmp_path / "model.onnx")),
        ("webhooks", "create", "https://hooks.example.com/x", "--name", "hook"),
        ("keys", "create", "robot", "--role", "viewer"),
        ("versions", "delete", "V_1"),
    ):
        done = stack.detflow(*arguments, seconds=400)
        assert done.code == 0, (arguments, done.err)


def _everything(stack: Stack) -> dict[str, Any]:
    """Reads every list, what hangs on the training, and the files as their hashes."""
    headers = {"authorization": f"Bearer {owner_token(stack.data_dir)}"}
    with httpx.Client(base_url=f"{stack.url}/v1/", headers=headers, timeout=60) as http:

        def get(path: str) -> httpx.Response:
            return http.get(path).raise_for_status()

        found = {path: get(path).json() for path in _LISTS}
        [dataset] = found["projects/default/datasets"]["datasets"]
        [training] = found["projects/default/versions/-/trainings"]["trainings"]
        name = training["name"]
        for path in (
            f"{dataset['name']}/statistics",
            f"{name}/evaluations",
            f"{name}/metrics",
            f"{name}/exports",
            f"{name}/inferenceResults?split=SPLIT_TEST",
        ):
            found[path] = get(path).json()
        [export] = found[f"{name}/exports"]["exports"]
        for path in (f"{export['name']}:download", f"{dataset['name']}:download"):
            found[path] = hashlib.sha256(get(path).content).hexdigest()
        assert found[f"{export['name']}:download"] == export["object"]["sha256"]
    return found
