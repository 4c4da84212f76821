"""What is in a running stack before it is fuzzed: at least one resource of most kinds."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from detflow.client import Client
from detflow.local.demo_data import write_dataset
from detflow.local.running import owner_token
from tests.fuzz.messages import Names
from tests.stack_rig import Stack

PROJECT = "shapes"
# As little as a model learns anything from.
_LITTLE = {"image_size": 64, "mosaic": 0.0}


@dataclass(frozen=True)
class World:
    """A stack with something in it.

    Attributes:
        addresses: gRPC address by service.
        names: Resources that there are, in the same order in every run.
        token: Of the owner of the installation.
    """

    stack: Stack
    addresses: Mapping[str, str]
    names: Names
    token: str

    @property
    def http_port(self) -> int:
        return self.stack.port


def make(stack: Stack, *, train: bool = False) -> World:
    """Fills a stack.

    Args:
        stack: A running stack with nothing in it.
        train: Also train and export a model, which takes half a minute.
    """
    token = owner_token(stack.data_dir)
    names = [f"projects/{PROJECT}"]
    with (
        Client(f"127.0.0.1:{stack.port}", token=token) as client,
        tempfile.TemporaryDirectory() as folder,
    ):
        client.projects.create(PROJECT)
        write_dataset(Path(folder) / "images", 24)
        dataset = client.datasets.import_(Path(folder) / "images", project=PROJECT, name="shapes")
        version = client.versions.wait(client.versions.create(dataset.name, name="one").name)
        other = client.versions.wait(
            client.versions.create(dataset.name, name="two", grayscale=True).name
        )
        webhook = client.webhooks.create("https://hooks.example.com/x", project=PROJECT)
        save_file({"head": np.zeros((2, 3), np.float32)}, Path(folder) / "w.safetensors")
        weights = client.weights.upload(Path(folder) / "w.safetensors", project=PROJECT)
        names += [dataset.name, version.name, other.name, webhook.name, weights.name]
        if train:
            training = client.trainings.start(
                version.name, model="yolov8n", batch_size=4, epochs=1, hyperparameters=_LITTLE
            )
            client.trainings.wait(training.name)
            export = client.exports.create(training.name, format="onnx")
            client.exports.wait(export.name)
            evaluations = [f"{training.name}/evaluations/{split}" for split in ("val", "test")]
            results = [f"{training.name}/inferenceResults/{split}-1" for split in ("val", "test")]
            names += [training.name, export.name, *evaluations, *results]
    services = ("version", "preprocess", "trainer", "metrics")
    addresses = {
        name: f"127.0.0.1:{stack.port + number}" for number, name in enumerate(services, 1)
    }
    return World(stack, addresses, Names(names), token)
