"""Weights that users upload, and trainings that begin with them; some looked into for real."""

import asyncio
import io
import os
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from detflow import channels
from detflow.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from detflow.events import Bus
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1 import weights_pb2
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import STOP_MODE_DISCARD, STOP_MODE_PAUSE, WarmStart
from detflow.v1.worker_pb2 import JobMessage, JobSpec
from services.trainer import weights_service
from services.trainer.jobs import run_job
from services.trainer.trials import RunJob
from tests import trainer_rig
from tests.trainer_players import PROJECT
from tests.trainer_rig import Rig, State, eventually

CONTENT = b"taken for weights by the job that is played"


async def look(spec: JobSpec, *, settings: Settings, sandbox: bool = False) -> JobMessage:
    """Plays the job that looks into a file."""
    assert sandbox and Path(spec.inspect.path).read_bytes() == CONTENT  # noqa: ASYNC240
    return JobMessage(weights=weights_pb2.Weights(num_tensors=1))


@pytest.fixture
def job() -> RunJob:
    return look


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
    job: RunJob,
) -> AsyncIterator[Rig]:
    async with trainer_rig.running(
        bus=bus,
        nats_url=nats_url,
        database_url=await make_database_url("trainer"),
        folder=tmp_path,
        run=job,
    ) as one:
        yield one


for_real = pytest.mark.parametrize("job", [run_job])


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def state_dict(**about: Any) -> bytes:
    """A file of PyTorch's."""
    import torch

    buffer = io.BytesIO()
    torch.save({**about, "state_dict": {"a": torch.zeros(2, 3), "b": torch.ones(4)}}, buffer)
    return buffer.getvalue()


def safetensors() -> bytes:
    import safetensors.torch
    import torch

    return bytes(safetensors.torch.save({"w": torch.zeros(5)}, {"model": "yolov8n"}))


def stored_files(rig: Rig) -> list[str]:
    folder = Path(rig.settings.store_url.removeprefix("file://"))
    return [path.name for path in folder.rglob("*") if path.is_file()]


async def get(rig: Rig, name: str) -> weights_pb2.Weights:
    with channels.translate():
        return await rig.weights.GetWeights(weights_pb2.GetWeightsRequest(name=name))


async def delete(rig: Rig, name: str) -> None:
    with channels.translate():
        await rig.weights.DeleteWeights(weights_pb2.DeleteWeightsRequest(name=name))


async def names(rig: Rig, **fields: Any) -> tuple[list[str], str]:
    with channels.translate():
        page = await rig.weights.ListWeights(
            weights_pb2.ListWeightsRequest(**{"parent": PROJECT, **fields})
        )
    return [one.name for one in page.weights], page.next_page_token


@for_real
async def test_upload_is_looked_into_stored_and_found_again(rig: Rig) -> None:
    content = state_dict(model="yolov8n", class_names=["cell", "세포"])
    weights = await rig.upload(content, display_name="내 모델")
    assert weights.name.startswith(f"{PROJECT}/weights/")
    assert (weights.display_name, weights.model) == ("내 모델", "yolov8n")
    assert list(weights.class_names) == ["cell", "세포"]
    assert (weights.num_tensors, weights.num_parameters) == (2, 10)
    assert weights.size_bytes == len(content) and len(weights.sha256) == 64
    assert await get(rig, weights.name) == weights
    other = await rig.upload(safetensors())
    assert (other.display_name, other.model, other.num_parameters) == ("weights", "yolov8n", 5)
    first, token = await names(rig, page_size=1)
    rest, end = await names(rig, page_size=1, page_token=token)
    assert ([*first, *rest], end) == ([other.name, weights.name], "")
    assert not list((rig.settings.data_dir / "uploads").glob("*/weights-*"))


@for_real
async def test_file_that_runs_code_or_holds_no_tensors_is_refused(rig: Rig, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    evil = pickle.dumps({"state_dict": Payload(ran)})
    pickle.loads(pickle.dumps(Payload(tmp_path / "would run")))
    assert (tmp_path / "would run").exists()  # the payload works where nothing stops it
    for content in (evil, state_dict(model=Payload(ran))):
        with pytest.raises(InvalidArgument) as caught:
            await rig.upload(content)
        assert caught.value.reason == "UNSAFE_WEIGHTS"
        assert "safetensors" in caught.value.message
    assert not ran.exists()
    assert await names(rig) == ([], "")
    assert not stored_files(rig)
    assert not list((rig.settings.data_dir / "uploads").glob("*/weights-*"))


async def test_upload_is_refused_where_it_is_cut_off_too_large_or_of_nowhere(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound):
        await rig.upload(b"x", parent="projects/none")
    with pytest.raises(InvalidArgument):
        await rig.upload(b"x", display_name="a\nb")
    header = weights_pb2.UploadWeightsHeader(parent=PROJECT)
    first = weights_pb2.UploadWeightsRequest(header=header)
    chunk = weights_pb2.UploadWeightsRequest(chunk=b"x")
    for parts in ([first, chunk], [chunk], [first, first], []):
        with pytest.raises(InvalidArgument), channels.translate():
            await rig.weights.UploadWeights(iter(parts))
    monkeypatch.setattr(weights_service, "MAX_WEIGHTS_BYTES", 10)
    async with rig.replica_weights() as limited:
        with pytest.raises(ResourceExhausted) as caught, channels.translate():
            await limited.UploadWeights(
                iter([first, weights_pb2.UploadWeightsRequest(chunk=b"12345678901")])
            )
    assert caught.value.reason == "WEIGHTS_LIMIT"


async def test_deleted_weights_are_gone_with_their_file(rig: Rig) -> None:
    weights = await rig.upload(CONTENT)
    assert len(stored_files(rig)) == 1
    await delete(rig, weights.name)
    for call in (get(rig, weights.name), delete(rig, weights.name)):
        with pytest.raises(NotFound):
            await call
    assert await names(rig) == ([], "")

    async def file_is_gone() -> bool:
        return not stored_files(rig)

    await eventually(file_is_gone)


async def test_weights_of_another_project_are_not_found(rig: Rig) -> None:
    weights = await rig.upload(CONTENT)
    stranger = weights.name.replace(PROJECT, "projects/q")
    rig.versions.put("projects/q/versions/v1")
    for call in (
        get(rig, stranger),
        delete(rig, stranger),
        rig.start(parent="projects/q/versions/v1", warm_start=WarmStart(weights=weights.name)),
        rig.start(parent="projects/q/versions/v1", warm_start=WarmStart(weights=stranger)),
    ):
        with pytest.raises(NotFound):
            await call


# --- trainings that begin with weights


async def test_training_begins_with_uploaded_weights_until_it_has_a_checkpoint(rig: Rig) -> None:
    weights = await rig.upload(CONTENT)
    training, first = await rig.running(warm_start=WarmStart(weights=weights.name))
    assert training.warm_start.weights == weights.name
    told = first.hello["spec"]["warmStartWeights"]
    assert told["sha256"] == weights.sha256
    objects = ObjectStore(rig.settings.store_url)
    stored = json_format.ParseDict(told, StoredObject())
    assert await asyncio.to_thread(objects.get, stored) == CONTENT
    with pytest.raises(FailedPrecondition) as caught:
        await delete(rig, weights.name)
    assert caught.value.reason == "WEIGHTS_IN_USE"
    assert caught.value.metadata["training"] == training.name
    await first.epoch(1)
    await rig.until_epochs(training.name, 1)
    await delete(rig, weights.name)
    first.kill()
    second = await rig.puppet()
    assert "warmStartWeights" not in second.hello["spec"]
    assert second.hello["checkpoint"] == 1


async def test_training_begins_with_the_best_weights_of_another(rig: Rig) -> None:
    source, puppet = await rig.running()
    rig.versions.put(f"{PROJECT}/versions/w")
    warm_start = WarmStart(training=source.name)
    with pytest.raises(FailedPrecondition) as caught:
        await rig.start(parent=f"{PROJECT}/versions/w", warm_start=warm_start)
    assert caught.value.reason == "NO_WEIGHTS"
    await puppet.finish()
    await rig.evaluate_both(source.name)
    await rig.until_state(source.name, State.SUCCEEDED)
    training = await rig.start(parent=f"{PROJECT}/versions/w", model="", warm_start=warm_start)
    assert training.warm_start == warm_start and training.model == source.model == "yolov8n"
    assert (await rig.puppet()).hello["spec"]["warmStartWeights"]["key"] == "best.pt"


async def find_model(spec: JobSpec, *, settings: Settings, sandbox: bool = False) -> JobMessage:
    """Plays the job that looks into a file: that says nothing but its model."""
    content = await asyncio.to_thread(Path(spec.inspect.path).read_text)
    return JobMessage(weights=weights_pb2.Weights(num_tensors=1, model=content))


@pytest.mark.parametrize("job", [find_model])
async def test_training_without_a_model_takes_that_of_the_weights_it_begins_with(rig: Rig) -> None:
    for number, (said, asked, model) in enumerate(
        (
            ("yolov8n", "", "yolov8n"),
            ("yolov8n", "yolov8s", "yolov8s"),
            ("", "", "yolov5s"),
        )
    ):
        weights = await rig.upload(said.encode())
        parent = f"{PROJECT}/versions/w{number}"
        rig.versions.put(parent)
        warm_start = WarmStart(weights=weights.name)
        assert (await rig.start(parent, model=asked, warm_start=warm_start)).model == model


async def test_warm_start_from_nothing_is_refused(rig: Rig) -> None:
    for wrong in (
        WarmStart(training=f"{PROJECT}/versions/v1/trainings/none"),
        WarmStart(training="projects/q/versions/v1/trainings/none"),
        WarmStart(weights=f"{PROJECT}/weights/none"),
    ):
        with pytest.raises(NotFound):
            await rig.start(warm_start=wrong)
    for malformed in (WarmStart(), WarmStart(weights="best.pt"), WarmStart(training="x")):
        with pytest.raises(InvalidArgument):
            await rig.start(warm_start=malformed)


async def test_training_whose_weights_were_deleted_before_it_began_cannot_be_resumed(
    rig: Rig,
) -> None:
    weights = await rig.upload(CONTENT)
    training = await rig.start(warm_start=WarmStart(weights=weights.name))
    await rig.puppet()
    await rig.stop(training.name, STOP_MODE_PAUSE)
    await rig.until_state(training.name, State.PAUSED)
    await delete(rig, weights.name)
    with pytest.raises(FailedPrecondition) as caught:
        await rig.resume(training.name)
    assert caught.value.reason == "WARM_START_GONE"
    other = await rig.start()
    await rig.stop(other.name, STOP_MODE_DISCARD)
