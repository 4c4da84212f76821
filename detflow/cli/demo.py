"""`detflow demo`: from nothing to a measured model, on images made on the spot."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from detflow.cli import output
from detflow.cli.datasets import rate
from detflow.cli.follow import finish, follow
from detflow.cli.session import Session
from detflow.client import Client
from detflow.client.trainings import LIVE_STATES
from detflow.errors import NotFound
from detflow.local.running import Running, StackError, owner_token, running
from detflow.processes import dying_with_parent
from detflow.v1 import common_pb2, dataset_pb2, version_pb2

PROJECT = "default"
DATASET = "demo-shapes"
NUM_IMAGES = 240
MODEL = "yolov8n"
BATCH_SIZE = 16
EPOCHS = 11
# Learns from scratch within a minute of CPU: small images, an update of the weights per batch.
HYPERPARAMETERS: dict[str, float | bool | str] = {
    "image_size": 128,
    "optimizer": "AdamW",
    "lr0": 0.003,
    "warmup_epochs": 1,
    "cos_lr": True,
    "close_mosaic": 2,
}

_START_SECONDS = 90.0
_STOP_SECONDS = 60.0
_TRAINABLE = (
    version_pb2.Version.PREPROCESSING,
    version_pb2.Version.READY,
    version_pb2.Version.FAILED,
    version_pb2.Version.STOPPED,
    version_pb2.Version.PAUSED,
)


def run(s: Session, data_dir: Path, *, port: int, keep: bool) -> None:
    """Starts the stack unless it runs, does the job, and stops what it started unless `keep`.

    Raises:
        StackError: The stack does not start.
        DetflowError: A step failed.
    """
    begin = time.monotonic()
    found = running(data_dir)
    stays = keep or found is not None
    with contextlib.ExitStack() as cleanup:
        if found is None:
            _tell(s, "starting Postgres, NATS, the services and the gateway")
            found = cleanup.enter_context(_started(data_dir, port, keep))
        else:
            found = _until_ready(data_dir, None)
        _tell(s, f"detflow runs at http://{found.address} ({time.monotonic() - begin:.1f} s)")
        client = cleanup.enter_context(Client(found.address, token=owner_token(data_dir)))
        s.use(client)
        dataset = _dataset(s, client, data_dir)
        version = _version(s, client, dataset)
        finish(s, follow(s, _training(s, client, version), ask=False))
        _tell(s)
        _tell(s, f"Done in {time.monotonic() - begin:.0f} s. Where to look next:")
        if not stays:
            _tell(s, "  detflow up                             what was made, in the console")
        else:
            _tell(s, "  detflow open                           the console; it keeps running")
        _tell(s, f"  detflow metrics {version.display_name:<22} the figures and losses again")
        _tell(s, "  detflow datasets import PATH           your own images: YOLO, COCO or VOC")
        _tell(s, "  detflow versions create --dataset NAME, detflow train VERSION")


@contextlib.contextmanager
def _started(data_dir: Path, port: int, keep: bool) -> Iterator[Running]:
    """Runs `detflow up` as a process of its own, stopped at the end unless `keep`."""
    (data_dir / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
    log = data_dir / "logs" / "up.log"
    with log.open("wb") as file:
        command = [
            *(sys.executable, "-m", "detflow.cli", "up"),
            *("--data-dir", str(data_dir), "--port", str(port)),
        ]
        process = subprocess.Popen(
            command if keep else dying_with_parent(command, signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield _until_ready(data_dir, process)
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until_ready(data_dir: Path, process: "subprocess.Popen[bytes] | None") -> Running:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        found = running(data_dir)
        if found is not None and found.ready:
            return found
        if found is None and (process is None or process.poll() is not None):
            break
        time.sleep(0.05)
    lines = (data_dir / "logs" / "up.log").read_text().splitlines() or ["it says nothing"]
    raise StackError(lines[-1].removeprefix("detflow: "))


def _dataset(s: Session, client: Client, data_dir: Path) -> dataset_pb2.Dataset:
    try:
        dataset = client.datasets.find(DATASET, PROJECT)
    except NotFound:
        return _import(s, client, data_dir)
    if dataset.state == dataset_pb2.Dataset.IMPORTING:
        for message in client.datasets.watch(dataset.name):
            if message.HasField("dataset"):
                dataset = message.dataset
    if dataset.state == dataset_pb2.Dataset.FAILED:
        client.datasets.delete(dataset.name)
        return _import(s, client, data_dir)
    _tell(s, f"dataset {DATASET} is there: {dataset.num_images} images")
    return dataset


def _import(s: Session, client: Client, data_dir: Path) -> dataset_pb2.Dataset:
    folder = data_dir / "demo" / DATASET
    if not folder.exists():
        from detflow.local.demo_data import write_dataset

        _tell(s, f"drawing {NUM_IMAGES} labelled images into {folder}")
        partial = folder.with_name(f"{DATASET}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_dataset(partial, NUM_IMAGES)
        partial.rename(folder)
    with s.bar() as bar:
        dataset = client.datasets.import_(
            folder, project=PROJECT, name=DATASET, progress=_shown(bar, "import")
        )
    _tell(s, f"imported {dataset.num_images} images with {dataset.num_boxes} boxes")
    return dataset


def _version(s: Session, client: Client, dataset: dataset_pb2.Dataset) -> version_pb2.Version:
    """Returns a version to train: one that is left from before, or a new one."""
    made = [v for v in client.versions.list(PROJECT) if v.dataset == dataset.name]
    for version in made:
        is_live = any(
            training.state in LIVE_STATES
            for training in client.trainings.list(version=version.name)[:1]
        )
        broken = version.state == version_pb2.Version.FAILED and not version.HasField("manifest")
        if is_live or (version.state in _TRAINABLE and not broken):
            break
    else:
        version = client.versions.create(dataset.name, augment=["hflip"])
    with s.bar() as bar:
        if version.state == version_pb2.Version.PREPROCESSING:
            version = client.versions.wait(version.name, progress=_shown(bar, "preprocess"))
    counts = version.num_images
    _tell(
        s,
        f"version {version.display_name}: {counts.train} training images (flipped copies"
        f" included), {counts.val} validation, {counts.test} test",
    )
    return version


def _training(s: Session, client: Client, version: version_pb2.Version) -> str:
    """Returns the name of the version's training: the one that runs, or a new one."""
    for training in client.trainings.list(version=version.name)[:1]:
        if training.state in LIVE_STATES:
            return training.name
    _tell(s, f"training {MODEL}: {EPOCHS} epochs, batches of {BATCH_SIZE}")
    return client.trainings.start(
        version.name,
        model=MODEL,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        hyperparameters=HYPERPARAMETERS,
    ).name


def _shown(bar: output.Bar, verb: str) -> Callable[[common_pb2.Progress], None]:
    return lambda progress: bar.update(
        f"{verb}: {progress.stage}", progress.percent, rate(progress)
    )


def _tell(s: Session, text: str = "") -> None:
    if not s.json:
        output.say(text)
