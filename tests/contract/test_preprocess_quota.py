"""How much a project may store: refused where it is too much, counted where it is there."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from detflow import channels
from detflow.errors import NotFound, ResourceExhausted, Unavailable, from_status, not_found
from detflow.events import Bus
from detflow.projects import Projects
from detflow.v1 import dataset_pb2, preprocess_pb2, project_pb2, version_pb2
from services.preprocess.quota import StorageQuota
from tests import preprocess_rig
from tests.preprocess_rig import PROJECT, DatasetState, PreprocessingState, Rig, running
from tests.preprocess_samples import pack, yolo_files

Set = Callable[[int], None]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Set:
    """`limit(bytes)`: what the version service says from now on."""
    quota = project_pb2.Quota()

    async def get(self: Any, request: project_pb2.GetProjectRequest, context: Any) -> Any:
        if request.name != PROJECT:
            raise not_found(request.name)
        return project_pb2.Project(name=request.name, quota=quota)

    monkeypatch.setattr(preprocess_rig.KnownProjects, "GetProject", get)
    monkeypatch.setattr(Projects.__init__, "__kwdefaults__", {"quota_seconds": 0.0})

    def set_limit(size_bytes: int) -> None:
        quota.max_storage_bytes = size_bytes

    return set_limit


@pytest.fixture
async def rig(
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    bus: Bus,
    tmp_path: Path,
    limit: Set,
) -> AsyncIterator[Rig]:
    """A preprocess service that asks for quotas every time."""
    async with running(await make_database_url("preprocess"), nats_url, bus, tmp_path) as rig:
        yield rig


async def usage(rig: Rig) -> preprocess_pb2.StorageUsage:
    with channels.translate():
        return await rig.preprocessings.GetStorageUsage(
            preprocess_pb2.GetStorageUsageRequest(name=f"{PROJECT}/storageUsage")
        )


async def begin(rig: Rig, size_bytes: int) -> dataset_pb2.Upload:
    with channels.translate():
        return await rig.datasets.CreateUpload(
            dataset_pb2.CreateUploadRequest(parent=PROJECT, size_bytes=size_bytes)
        )


async def test_of_uploads_that_begin_at_once_only_those_that_fit_are_let_in(
    rig: Rig, limit: Set
) -> None:
    limit(1000)
    outcomes = await asyncio.gather(*(begin(rig, 300) for _ in range(8)), return_exceptions=True)
    refused = [one for one in outcomes if isinstance(one, ResourceExhausted)]
    assert len(outcomes) - len(refused) == 3 and len(refused) == 5
    assert {one.reason for one in refused} == {"QUOTA_EXCEEDED"}
    assert refused[0].metadata["max_storage_bytes"] == "1000"
    assert refused[0].metadata["used_bytes"] == "1200"
    assert "raised" in refused[0].message
    found = await usage(rig)
    assert (found.upload_bytes, found.max_storage_bytes) == (900, 1000)

    limit(0)
    await begin(rig, 1 << 30)


async def test_a_stream_that_does_not_say_its_size_ends_where_the_quota_does(
    rig: Rig, limit: Set
) -> None:
    limit(1 << 20)
    with pytest.raises(ResourceExhausted) as caught:
        await rig.upload(b"x" * ((1 << 20) + 1))
    assert caught.value.reason == "QUOTA_EXCEEDED"
    assert (await usage(rig)).upload_bytes == 0
    await preprocess_rig.until(lambda: not [*rig.service.store.list("uploads")])
    await rig.upload(b"x" * (1 << 20))


async def test_an_import_is_counted_without_the_archive_that_goes_with_it(
    rig: Rig, limit: Set
) -> None:
    archive = pack(yolo_files())
    dataset = await rig.import_archive(archive)
    assert dataset.state == DatasetState.READY
    found = await usage(rig)
    assert found.upload_bytes == 0
    with channels.translate():
        await rig.datasets.DeleteDataset(dataset_pb2.DeleteDatasetRequest(name=dataset.name))
    assert found.dataset_bytes > 0 and (await usage(rig)).dataset_bytes == 0

    # Archive and images together are too much, the images alone are not.
    limit(2 * len(archive))  # the first archive counts again
    again = await rig.import_archive(archive, "again")
    assert again.state == DatasetState.READY, again.failure
    limit(0)
    upload = await rig.upload(archive)
    limit(1)  # lowered in the meantime
    more = await rig.create(upload.name, "more")
    refused = (await rig.watch_dataset(more.name))[-1].dataset
    assert refused.state == DatasetState.FAILED
    assert from_status(refused.failure.status).reason == "QUOTA_EXCEEDED"


async def test_a_bundle_beyond_the_quota_fails_its_version(rig: Rig, limit: Set) -> None:
    dataset = await rig.import_archive(pack(yolo_files()))
    used = await usage(rig)
    limit(used.upload_bytes + used.dataset_bytes + 1)
    failed = await rig.preprocess(dataset.name, version_pb2.Recipe(), "v1")
    assert failed.state == PreprocessingState.Value("FAILED")
    assert from_status(failed.failure.status).reason == "QUOTA_EXCEEDED"
    limit(0)
    made = await rig.preprocess(dataset.name, version_pb2.Recipe(), "v2")
    assert made.state == PreprocessingState.Value("SUCCEEDED")
    once = (await usage(rig)).bundle_bytes
    assert once > 0
    await rig.preprocess(dataset.name, version_pb2.Recipe(), "v3")
    assert (await usage(rig)).bundle_bytes == once  # the same shards


class Versions:
    """The version service, as its stub: says a quota, or is away."""

    def __init__(self) -> None:
        self.size_bytes, self.away, self.num_calls = 10, False, 0

    async def GetProject(self, request: project_pb2.GetProjectRequest) -> project_pb2.Project:
        self.num_calls += 1
        if self.away:
            raise Unavailable("away")
        quota = project_pb2.Quota(max_storage_bytes=self.size_bytes)
        return project_pb2.Project(name=request.name, quota=quota)


async def test_a_quota_is_asked_for_again_and_outlives_who_says_it() -> None:
    versions = Versions()
    anything: Any = None
    stub: Any = versions
    remembered = StorageQuota(anything, Projects(stub, quota_seconds=3600))
    asked = StorageQuota(anything, Projects(stub, quota_seconds=0))
    assert [await remembered.limit("p"), await asked.limit("p")] == [10, 10]
    versions.size_bytes = 20
    assert [await remembered.limit("p"), await asked.limit("p")] == [10, 20]
    assert versions.num_calls == 3
    versions.away = True
    assert await asked.limit("p") == 20
    with pytest.raises(Unavailable):
        await asked.limit("unheard-of")  # nobody is let in for want of an answer


async def test_the_usage_of_a_project_that_is_not_there_is_not_found(rig: Rig) -> None:
    with pytest.raises(NotFound), channels.translate():
        await rig.preprocessings.GetStorageUsage(
            preprocess_pb2.GetStorageUsageRequest(name="projects/nothing/storageUsage")
        )
