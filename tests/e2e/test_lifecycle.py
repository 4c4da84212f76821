import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from detflow.errors import DetflowError
from detflow.local.demo_data import write_dataset
from detflow.local.running import running
from detflow.v1 import training_pb2
from tests.stack_rig import command, end, environment, free_base_port, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_killed_stack_leaves_nothing_and_starts_again_with_its_data(tmp_path: Path) -> None:
    port = free_base_port()
    first = start(tmp_path, port)
    with first.client() as client:
        client.projects.create("kept")
    end(first, signal.SIGKILL)
    assert running(tmp_path) is None
    second = start(tmp_path, port)
    try:
        with second.client() as client:
            assert client.projects.get("kept").display_name == "kept"
            assert len(client.models()) >= 10
    finally:
        end(second, signal.SIGINT)
    assert second.process.returncode == 0


def test_training_goes_on_after_the_whole_stack_was_killed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shapes", 24)
    port = free_base_port()
    first = start(tmp_path / "data", port)
    with first.client() as client:
        dataset = client.datasets.import_(tmp_path / "shapes")
        version = client.versions.wait(client.versions.create(dataset.name).name)
        training = client.trainings.start(
            version.name,
            model="yolov8n",
            batch_size=8,
            epochs=300,
            hyperparameters={"image_size": 32},
        )
        for message in client.trainings.watch(training.name):
            if message.HasField("epoch") and message.epoch.epoch >= 2:
                break
    end(first, signal.SIGKILL)  # checks that the worker is gone too
    second = start(tmp_path / "data", port)
    try:
        with second.client() as client:
            for message in client.trainings.watch(training.name):
                if message.HasField("epoch") and message.epoch.attempt == 2:
                    assert message.epoch.epoch >= 2  # not all epochs are saved, but the first is
                    break
            client.trainings.stop(training.name, mode="discard")
            *_, last = client.trainings.watch(training.name)
            assert last.training.state == training_pb2.Training.STOPPED
            box = next(
                s for s in client.metrics.series(training.name) if s.name == "train/box_loss"
            )
            assert list(box.epochs) == [*range(1, len(box.epochs) + 1)]
    finally:
        end(second, signal.SIGTERM)


def test_killed_service_is_started_again_and_watches_go_on(tmp_path: Path) -> None:
    port = free_base_port()
    stack = start(tmp_path, port)
    try:
        victims = [p for p in stack.processes() if "services.version" in p.cmdline()]
        with stack.client() as client:
            watch = client.versions.watch()
            assert next(watch).HasField("snapshot")
            os.kill(victims[0].pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.projects.create("after-the-kill")
                    break
                except DetflowError:
                    assert time.monotonic() < deadline
            watch.close()  # type: ignore[attr-defined]
            assert client.projects.get("after-the-kill")
    finally:
        end(stack, signal.SIGTERM)


def test_stop_while_starting_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("up", "--port", str(free_base_port()), "--data-dir", str(tmp_path)),
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("starting")
    while not (children := psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
