"""The SDK against a gRPC server whose answers the test writes down."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from detflow import channels, errors
from detflow.client import Client, upload
from detflow.v1 import (
    common_pb2,
    dataset_pb2,
    dataset_pb2_grpc,
    project_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    training_pb2,
    version_pb2,
    version_pb2_grpc,
)
from gateway.routes import SERVICES

Context = Any


def fail(context: Context, error: errors.DetflowError) -> None:
    context.abort_with_status(rpc_status.to_status(errors.to_status(error)))


@dataclass
class Versions(version_pb2_grpc.VersionServiceServicer):
    """Answers WatchVersions from a list of streams; an error in a stream ends it."""

    streams: list[list[Any]] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)

    def WatchVersions(self, request: Any, context: Context) -> Iterator[Any]:
        self.cursors.append(request.cursor)
        for item in self.streams.pop(0):
            if isinstance(item, errors.DetflowError):
                fail(context, item)
            yield item

    def GetVersion(self, request: Any, context: Context) -> Any:
        self.deadlines.append(context.time_remaining())
        if len(self.deadlines) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return version_pb2.Version(name=request.name)


class Projects(project_pb2_grpc.ProjectServiceServicer):
    def GetProject(self, request: Any, context: Context) -> Any:
        fail(context, errors.NotFound("no such project"))

    def CreateProject(self, request: Any, context: Context) -> Any:
        fail(context, errors.AlreadyExists("someone was as quick"))


@dataclass
class Datasets(dataset_pb2_grpc.DatasetServiceServicer):
    """Keeps datasets, and one upload, whose writing breaks off as `breaks` says."""

    kept: dict[str, dataset_pb2.Dataset] = field(default_factory=dict)
    upload: dataset_pb2.Upload = field(default_factory=dataset_pb2.Upload)
    received: bytearray = field(default_factory=bytearray)
    offsets: list[int] = field(default_factory=list)
    breaks: list[tuple[int, errors.DetflowError]] = field(default_factory=list)
    """How many chunks are taken in each stream before it ends in an error; later ones are whole."""

    def CreateUpload(self, request: Any, context: Context) -> Any:
        assert request.parent == "projects/default"
        assert request.request_id == request.sha256
        if self.upload.sha256 != request.sha256:
            self.received.clear()
            self.upload = dataset_pb2.Upload(
                name="projects/default/uploads/u",
                size_bytes=request.size_bytes,
                sha256=request.sha256,
                state=dataset_pb2.Upload.RECEIVING,
            )
        return self.upload

    def WriteUpload(self, parts: Any, context: Context) -> Any:
        start = next(parts).start
        self.offsets.append(start.offset)
        assert (start.name, start.offset) == (self.upload.name, len(self.received))
        num_chunks, error = self.breaks.pop(0) if self.breaks else (1 << 30, None)
        while num_chunks > 0 and (part := next(parts, None)) is not None:
            self.received += part.chunk
            num_chunks -= 1
        self.upload.committed_bytes = len(self.received)
        if len(self.received) == self.upload.size_bytes:
            assert hashlib.sha256(self.received).hexdigest() == self.upload.sha256
            self.upload.state = dataset_pb2.Upload.RECEIVED
        if isinstance(error, errors.NotFound):
            self.upload = dataset_pb2.Upload()
        if error is not None:
            fail(context, error)
        return self.upload

    def CreateDataset(self, request: Any, context: Context) -> Any:
        assert request.request_id
        name = request.dataset.display_name
        if any(
            kept.display_name == name and kept.state != dataset_pb2.Dataset.FAILED
            for kept in self.kept.values()
        ):
            fail(context, errors.AlreadyExists(f"the project has a dataset named {name!r}"))
        dataset = dataset_pb2.Dataset(
            name=f"projects/default/datasets/d{len(self.kept)}",
            display_name=name,
            state=dataset_pb2.Dataset.IMPORTING,
            source_url=request.source_url,
        )
        self.kept[dataset.name] = dataset
        if not request.skip_invalid:
            bad = errors.InvalidArgument(
                "1 label is wrong",
                reason="INVALID_LABELS",
                violations=[errors.Violation("labels/a.txt:3", "BAD_BOX", "has no area")],
            )
            dataset.failure.CopyFrom(errors.failure(bad))
        return dataset

    def WatchDataset(self, request: Any, context: Context) -> Iterator[Any]:
        dataset = self.kept[request.name]
        yield dataset_pb2.WatchDatasetResponse(cursor="1", dataset=dataset)
        progress = common_pb2.Progress(stage="check", percent=50)
        yield dataset_pb2.WatchDatasetResponse(cursor="2", progress=progress)
        failed = dataset.HasField("failure")
        dataset.state = dataset_pb2.Dataset.FAILED if failed else dataset_pb2.Dataset.READY
        yield dataset_pb2.WatchDatasetResponse(cursor="3", dataset=dataset)

    def ListDatasets(self, request: Any, context: Context) -> Any:
        # A page holds one, so that the client has to turn pages.
        names = sorted(self.kept, reverse=True)
        at = int(request.page_token or 0)
        return dataset_pb2.ListDatasetsResponse(
            datasets=[self.kept[name] for name in names[at : at + 1]],
            next_page_token=str(at + 1) if at + 1 < len(names) else "",
        )

    def DeleteDataset(self, request: Any, context: Context) -> Any:
        del self.kept[request.name]
        return dataset_pb2.DeleteDatasetResponse()


class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    def StartTraining(self, request: Any, context: Context) -> Any:
        training = training_pb2.Training()
        training.CopyFrom(request.training)
        training.name = f"{request.parent}/trainings/t"
        return training

    def ListModels(self, request: Any, context: Context) -> Any:
        return trainer_pb2.ListModelsResponse(models=[trainer_pb2.Model(name="models/yolov8n")])


@dataclass
class Rig:
    client: Client
    versions: Versions
    datasets: Datasets


@pytest.fixture
def rig() -> Iterator[Rig]:
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool)
    versions = Versions()  # type: ignore[abstract]
    datasets = Datasets()  # type: ignore[abstract]
    version_pb2_grpc.add_VersionServiceServicer_to_server(versions, server)
    project_pb2_grpc.add_ProjectServiceServicer_to_server(Projects(), server)  # type: ignore[abstract]
    dataset_pb2_grpc.add_DatasetServiceServicer_to_server(datasets, server)
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(Trainer(), server)  # type: ignore[abstract]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    names = ("VERSION", "PREPROCESS", "TRAINER", "METRICS")
    with Client("127.0.0.1:1", environ={f"DETFLOW_{n}_ADDRESS": address for n in names}) as client:
        yield Rig(client, versions, datasets)
    server.stop(None).wait()
    pool.shutdown()


def at(cursor: str, name: str = "v") -> version_pb2.WatchVersionsResponse:
    return version_pb2.WatchVersionsResponse(cursor=cursor, version=version_pb2.Version(name=name))


def test_watch_goes_on_at_its_cursor_when_the_stream_breaks(rig: Rig) -> None:
    beat = version_pb2.WatchVersionsResponse(cursor="3", heartbeat=common_pb2.Heartbeat())
    rig.versions.streams = [
        [at("1"), at("2"), errors.Unavailable("draining")],
        [beat, errors.ResourceExhausted("too slow", reason="SLOW_WATCHER")],
        [at("4")],
    ]
    assert [message.cursor for message in rig.client.versions.watch()] == ["1", "2", "4"]
    assert rig.versions.cursors == ["", "2", "3"]


def test_watch_begins_again_when_its_cursor_has_expired(rig: Rig) -> None:
    rig.versions.streams = [
        [at("1"), errors.Unavailable("draining")],
        [errors.OutOfRange("too old", reason="CURSOR_EXPIRED")],
        [at("9")],
    ]
    assert [message.cursor for message in rig.client.versions.watch()] == ["1", "9"]
    assert rig.versions.cursors == ["", "1", ""]


def test_waiting_goes_on_over_all_parts_of_a_snapshot(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.client.versions, "_follow_preprocessing", lambda *_: None)
    name = "projects/p/versions/mine"
    state = version_pb2.Version.State

    def part(*versions: version_pb2.Version, more: bool) -> version_pb2.WatchVersionsResponse:
        snapshot = version_pb2.VersionsSnapshot(versions=versions, more=more)
        return version_pb2.WatchVersionsResponse(cursor="" if more else "1", snapshot=snapshot)

    mine = version_pb2.Version(name=name, state=state.PREPROCESSING)
    ready = version_pb2.Version(name=name, state=state.READY)
    other = version_pb2.Version(name="projects/p/versions/other", state=state.READY)
    changed = version_pb2.WatchVersionsResponse(cursor="2", version=ready)
    rig.versions.streams = [[part(mine, more=True), part(other, more=False), changed]]
    assert rig.client.versions.wait(name).state == state.READY

    rig.versions.streams = [[part(other, more=True), part(other, more=False)]]
    with pytest.raises(errors.NotFound, match="was deleted"):
        rig.client.versions.wait(name)


def test_watch_raises_what_waiting_does_not_mend(rig: Rig) -> None:
    rig.versions.streams = [[errors.NotFound("no such project")]]
    with pytest.raises(errors.NotFound, match="no such project"):
        next(rig.client.versions.watch())


def test_call_is_repeated_while_the_service_is_away_and_has_a_deadline(rig: Rig) -> None:
    assert rig.client.versions.get("projects/p/versions/v").name == "projects/p/versions/v"
    assert len(rig.versions.deadlines) == 3
    assert all(0 < seconds < 16 for seconds in rig.versions.deadlines)


def test_nobody_there_is_said_with_the_remedy() -> None:
    with Client("127.0.0.1:1", environ={}) as client:
        with pytest.raises(errors.Unavailable, match="start it with `detflow up`") as caught:
            client.models()
    assert caught.value.reason == "UNREACHABLE"


@pytest.mark.parametrize(
    "address",
    [
        *("localhost", "localhost:", "localhost:x", ":7100", "h:65535", "h:\u00b2"),
        *("ftp://localhost:7100", "[::1", "a b:7100"),
    ],
)
def test_address_must_be_host_and_port(address: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="host:port"):
        Client(address)


def test_import_reports_progress_and_refusal_names_the_label(rig: Rig, tmp_path: Path) -> None:
    archive = tmp_path / "cells.zip"
    archive.write_bytes(b"x" * (2 * (1 << 20) + 5))
    stages: list[str] = []
    with pytest.raises(errors.InvalidArgument) as caught:
        rig.client.datasets.import_(archive, progress=lambda p: stages.append(p.stage))
    assert caught.value.violations == (
        errors.Violation("labels/a.txt:3", "BAD_BOX", "has no area"),
    )
    assert rig.datasets.received == archive.read_bytes()
    assert stages == ["hash"] * 3 + ["upload"] * 3 + ["check"]

    dataset = rig.client.datasets.import_(archive, skip_invalid=True)
    assert dataset.state == dataset_pb2.Dataset.READY
    assert rig.datasets.offsets == [0]  # the same archive is not sent again

    with pytest.raises(errors.AlreadyExists, match="cells"):
        rig.client.datasets.import_(archive, skip_invalid=True)


def test_upload_goes_on_where_it_broke_off_whatever_the_reason(rig: Rig, tmp_path: Path) -> None:
    archive = tmp_path / "cells.zip"
    archive.write_bytes(os.urandom(20 << 20))
    rig.datasets.breaks = [
        (3, errors.Unavailable("draining")),
        (0, errors.Unavailable("draining")),
        (5, errors.Aborted("another writer", reason="UPLOAD_MOVED")),
        (1, errors.FailedPrecondition("go on elsewhere", reason="WRONG_OFFSET")),
        (2, errors.DeadlineExceeded("nothing came")),
        (4, errors.NotFound("expired")),
        (6, errors.Cancelled("the server stops")),
        (14, errors.Unavailable("the answer was lost")),
    ]
    rig.client.datasets.import_(archive, skip_invalid=True)
    assert [offset >> 20 for offset in rig.datasets.offsets] == [0, 3, 3, 8, 9, 11, 0, 6]
    assert rig.datasets.received == archive.read_bytes()


def test_streams_from_the_client_are_never_repeated_by_grpc() -> None:
    config = json.loads(str(dict(channels.OPTIONS)["grpc.service_config"]))
    left_alone = {
        (name["service"], name["method"])
        for one in config["methodConfig"]
        if "retryPolicy" not in one
        for name in one["name"]
    }
    assert left_alone == {
        (service.full_name, rpc.name)
        for services in SERVICES.values()
        for service in services
        for rpc in service.methods
        if rpc.client_streaming
    }


def test_upload_raises_what_going_on_does_not_mend(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "cells.zip"
    archive.write_bytes(b"x")
    rig.datasets.breaks = [(0, errors.InvalidArgument("changed", reason="HASH_MISMATCH"))]
    with pytest.raises(errors.InvalidArgument, match="changed"):
        rig.client.datasets.import_(archive)
    monkeypatch.setattr(upload, "_PATIENCE_SECONDS", 0.0)
    rig.datasets.breaks = [(0, errors.DeadlineExceeded("nothing came"))]
    with pytest.raises(errors.DeadlineExceeded, match="nothing came"):
        rig.client.datasets.import_(archive)
    assert rig.datasets.offsets == [0, 0]


def test_archive_in_an_object_store_is_left_to_detflow(rig: Rig) -> None:
    dataset = rig.client.datasets.import_("s3://bucket/cells.tar.gz", skip_invalid=True)
    assert (dataset.display_name, rig.datasets.offsets) == ("cells", [])
    assert rig.datasets.kept[dataset.name].source_url == "s3://bucket/cells.tar.gz"


def test_archive_that_cannot_be_read_is_said_to_be(rig: Rig) -> None:
    with pytest.raises(errors.InvalidArgument, match="cannot be read to its end"):
        rig.client.datasets.import_("/proc/self/mem")  # readable, but not where it begins


def test_name_is_checked_before_the_upload(rig: Rig, tmp_path: Path) -> None:
    archive = tmp_path / "cells.zip"
    archive.write_bytes(b"x")
    with pytest.raises(errors.InvalidArgument, match="at most 63"):
        rig.client.datasets.import_(archive, name="x" * 64)
    assert rig.datasets.offsets == []


def test_dataset_is_found_by_name_id_or_resource_over_all_pages(rig: Rig) -> None:
    for number in range(3):
        name = f"projects/default/datasets/d{number}"
        rig.datasets.kept[name] = dataset_pb2.Dataset(name=name, display_name=f"set {number % 2}")
    find = rig.client.datasets.find
    assert find("set 1").name == "projects/default/datasets/d1"
    assert find("set 0").name == "projects/default/datasets/d2"  # the newest of two
    assert find("d0").display_name == "set 0"
    with pytest.raises(errors.NotFound, match="detflow datasets list"):
        find("set 7")


def test_training_carries_what_was_set_and_nothing_else(rig: Rig) -> None:
    training = rig.client.trainings.start(
        "projects/p/versions/v", model="yolov8n", epochs=3, hyperparameters={"lr0": 0.01}
    )
    assert (training.model, training.epochs) == ("yolov8n", 3)
    assert not training.HasField("batch_size")
    assert dict(training.hyperparameters) == {"lr0": 0.01}


def test_unknown_augmentation_is_refused_before_the_call(rig: Rig) -> None:
    with pytest.raises(errors.InvalidArgument, match="hflip, vflip"):
        rig.client.versions.create("projects/p/datasets/d", augment=["spin"])


def test_project_made_by_someone_else_meanwhile_is_fine(rig: Rig) -> None:
    rig.client.projects.ensure("shared")
