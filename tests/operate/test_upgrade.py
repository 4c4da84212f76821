"""An upgrade without a pause: processes of an earlier revision beside those of this one."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from detflow import channels
from detflow.errors import Unavailable
from detflow.events import Bus, Header
from detflow.local.process import free_port
from detflow.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    events_pb2,
    project_pb2,
    project_pb2_grpc,
    training_pb2,
    version_pb2,
    version_pb2_grpc,
)
from tests.installation_rig import Installation, MakeInstallation, make_installation

__all__ = ["make_installation"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_ROOT = Path(__file__).parents[2]
# The last revision without access: what it lacks, and has to pass over, is most of what can differ.
_EARLIER = "68a90fb5df75daf980e7a4525b592f00dace5c13"
_SHA = "0" * 64


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the code of the earlier revision."""
    wanted = ("archive", _EARLIER, "detflow", "services", "buf")
    done = subprocess.run(("git", *wanted), cwd=_ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this clone does not have revision {_EARLIER}: fetch all of it")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@contextlib.contextmanager
def process(
    code: Path, service: str, installation: Installation, nats_url: str, folder: Path
) -> Iterator[str]:
    """Runs a service of a revision; yields its address."""
    address = f"127.0.0.1:{free_port()}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DETFLOW_")}
    environment = {
        **kept,
        "PYTHONPATH": str(code),
        "DETFLOW_DATABASE_URL": installation.urls[service],
        "DETFLOW_NATS_URL": nats_url,
        "DETFLOW_STORE_URL": installation.system.store_url,
        "DETFLOW_LISTEN": address,
        "DETFLOW_DATA_DIR": str(folder / address.replace(":", "-")),
        "DETFLOW_ACCESS": "open",
    }
    running = subprocess.Popen(
        (sys.executable, "-m", f"services.{service}"), cwd=code, env=environment
    )
    try:
        yield address
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=60)


@contextlib.asynccontextmanager
async def stub(kind: Any, address: str) -> AsyncIterator[Any]:
    """Opens a client of a process that may be starting."""
    async with channels.channel(address) as channel:
        async with asyncio.timeout(60):
            await channel.channel_ready()
        yield kind(channel)


async def test_an_earlier_release_serves_what_a_later_one_has_made(
    earlier: Path,
    make_installation: MakeInstallation,
    bus: Bus,
    nats_url: str,
    tmp_path: Path,
) -> None:
    installation = await make_installation(migrated=True)
    project = project_pb2.Project(
        name="projects/both", display_name="both", quota=project_pb2.Quota(max_storage_bytes=7)
    )
    with (
        process(_ROOT, "version", installation, nats_url, tmp_path) as new,
        process(earlier, "version", installation, nats_url, tmp_path) as old,
    ):
        async with (
            stub(project_pb2_grpc.ProjectServiceStub, new) as of_new,
            stub(project_pb2_grpc.ProjectServiceStub, old) as of_old,
        ):
            with channels.translate():
                await of_new.CreateProject(
                    project_pb2.CreateProjectRequest(project_id="both", project=project)
                )
                get = project_pb2.GetProjectRequest(name=project.name)
                assert (await of_old.GetProject(get)).display_name == "both"
                # And what the earlier one makes, the later one completes.
                await of_old.CreateProject(
                    project_pb2.CreateProjectRequest(
                        project_id="old", project=project_pb2.Project(display_name="old")
                    )
                )
                get.name = "projects/old"
                assert (await of_new.GetProject(get)).quota == project_pb2.Quota()
                listing = project_pb2.ListProjectsRequest()
                names = [
                    [p.name for p in (await s.ListProjects(listing)).projects]
                    for s in (of_new, of_old)
                ]
    assert names[0] == names[1] == ["projects/default", "projects/both", "projects/old"]


async def test_an_earlier_release_applies_events_and_passes_over_what_it_does_not_know(
    earlier: Path,
    make_installation: MakeInstallation,
    bus: Bus,
    nats_url: str,
    tmp_path: Path,
) -> None:
    installation = await make_installation(migrated=True)
    name = "projects/default/versions/v1"
    await installation.execute(
        "version",
        "insert into version (id, project_id, display_name, name_key, state, dataset, class_names,"
        " recipe, request_sha256, manifest_key, manifest_size_bytes, manifest_sha256, num_images)"
        " values ('v1', 'default', 'V', 'v', 'READY', 'projects/default/datasets/d', '{a}', '',"
        " '', 'k', 1, $1, '{1,1,1}')",
        _SHA,
    )
    training = training_pb2.Training(
        name=f"{name}/trainings/t1",
        state=training_pb2.Training.QUEUED,
        revision=1,
        attempt=1,
        wait_reason=training_pb2.Training.QUOTA,
    )
    unknown = b"\xfa\x3f\x03new"  # field 1023, of a release yet to come
    of_training = events_pb2.Event(training=training).SerializeToString() + unknown
    for number, (subject, payload) in enumerate(
        (
            ("detflow.v1.audit.a1.begun", unknown),
            ("detflow.v1.something.s1.happened", unknown),
            ("detflow.v1.training.t1.considered", unknown),
            ("detflow.v1.training.t1.state_changed", of_training),
        )
    ):
        await bus.publish_durable(
            subject,
            payload,
            {
                Header.EVENT_ID: f"e{number}",
                Header.SEQ: "1",
                Header.NAME: training.name,
                "ce-time": "2030-01-01T00:00:00+00:00",
            },
        )
    with process(earlier, "version", installation, nats_url, tmp_path) as old:
        async with stub(version_pb2_grpc.VersionServiceStub, old) as versions:
            assert await _until_queued(versions, name) == version_pb2.Version.QUEUED
    dead = (await installation.rows())["version.inbox_failure"]
    assert dead == []


async def test_an_earlier_preprocess_service_goes_on_with_datasets_of_a_later_one(
    earlier: Path,
    make_installation: MakeInstallation,
    bus: Bus,
    nats_url: str,
    tmp_path: Path,
) -> None:
    installation = await make_installation(migrated=True)
    await installation.add_upload("u1", b"archive", project="default")
    await installation.execute(
        "preprocess",
        "insert into dataset (id, project_id, display_name, state, skip_invalid, num_bytes)"
        " values ('d1', 'default', 'd', 'READY', false, 5)",
    )
    with process(earlier, "preprocess", installation, nats_url, tmp_path) as old:
        async with stub(dataset_pb2_grpc.DatasetServiceStub, old) as datasets:
            with channels.translate():
                dataset = await datasets.GetDataset(
                    dataset_pb2.GetDatasetRequest(name="projects/default/datasets/d1")
                )
                upload = await datasets.GetUpload(
                    dataset_pb2.GetUploadRequest(name="projects/default/uploads/u1")
                )
                await datasets.DeleteDataset(
                    dataset_pb2.DeleteDatasetRequest(name="projects/default/datasets/d1")
                )
    assert dataset.display_name == "d"
    assert upload.size_bytes == 7


async def _until_queued(versions: Any, name: str) -> int:
    """Watches a version until the training's event was applied."""
    async with asyncio.timeout(60):
        watch = versions.WatchVersions(version_pb2.WatchVersionsRequest(parent="projects/default"))
        with channels.translate():
            async for message in watch:
                seen = [*message.snapshot.versions, message.version]
                if any(v.state == version_pb2.Version.QUEUED for v in seen if v.name == name):
                    watch.cancel()
                    return version_pb2.Version.QUEUED
    raise Unavailable("the watch ended")
