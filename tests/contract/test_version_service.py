"""Every RPC of the version service through the real process wiring: gRPC, Postgres, NATS.

Only the preprocess service is played, by a gRPC server that knows a few datasets.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import code_pb2, status_pb2

from detflow import channels
from detflow.errors import (
    Aborted,
    AlreadyExists,
    DetflowError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from detflow.events import Bus, Header
from detflow.interceptors import Boundary
from detflow.server import Service
from detflow.settings import Settings
from detflow.v1 import (
    common_pb2,
    dataset_pb2,
    dataset_pb2_grpc,
    events_pb2,
    preprocess_pb2,
    project_pb2,
    project_pb2_grpc,
    training_pb2,
    version_pb2,
    version_pb2_grpc,
)
from services.version.__main__ import MIGRATIONS, serve

PARENT = "projects/default"
DATASET = f"{PARENT}/datasets/d1"
KOREAN = "한글 이름 🦊"


class Datasets(dataset_pb2_grpc.DatasetServiceServicer):
    """Plays the preprocess service."""

    def __init__(self) -> None:
        self.by_name: dict[str, dataset_pb2.Dataset] = {}
        self.error: DetflowError | None = None
        self.put(DATASET, dataset_pb2.Dataset.READY)

    def put(self, name: str, state: "dataset_pb2.Dataset.State.ValueType") -> None:
        self.by_name[name] = dataset_pb2.Dataset(
            name=name, state=state, class_names=["circle", "네모"]
        )

    async def GetDataset(
        self, request: dataset_pb2.GetDatasetRequest, context: Any
    ) -> dataset_pb2.Dataset:
        if self.error:
            raise self.error
        if request.name not in self.by_name:
            raise NotFound("no such dataset")
        return self.by_name[request.name]


@dataclass
class Sender:
    """Publishes events as the preprocess and the trainer service do."""

    bus: Bus
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    async def preprocessing(
        self, version: str, revision: int, state: "preprocess_pb2.Preprocessing.State.ValueType"
    ) -> None:
        message = preprocess_pb2.Preprocessing(version=version, revision=revision, state=state)
        if state == preprocess_pb2.Preprocessing.SUCCEEDED:
            message.manifest.CopyFrom(
                common_pb2.StoredObject(
                    key="bundles/manifests/ab.json", size_bytes=7, sha256="ab" * 32
                )
            )
            message.num_images.CopyFrom(version_pb2.SplitCounts(train=1400, val=400, test=200))
        elif state == preprocess_pb2.Preprocessing.FAILED:
            message.failure.CopyFrom(
                common_pb2.Failure(
                    status=status_pb2.Status(code=code_pb2.DATA_LOSS, message="image is gone")
                )
            )
        await self._send(
            f"detflow.v1.preprocessing.{version.rsplit('/', 1)[1]}.state_changed",
            revision,
            events_pb2.Event(preprocessing=message),
        )

    async def training(
        self,
        version: str,
        training_id: str,
        revision: int,
        state: "training_pb2.Training.State.ValueType",
    ) -> None:
        message = training_pb2.Training(
            name=f"{version}/trainings/{training_id}", revision=revision, state=state
        )
        await self._send(
            f"detflow.v1.training.{training_id}.state_changed",
            revision,
            events_pb2.Event(training=message),
        )

    async def _send(self, subject: str, seq: int, event: events_pb2.Event) -> None:
        await self.bus.publish_durable(
            subject,
            event.SerializeToString(),
            {
                Header.EVENT_ID: f"event-{next(self.numbers)}",
                Header.SEQ: str(seq),
                "ce-time": datetime.now(UTC).isoformat(),
            },
        )


@dataclass
class Stack:
    """A running version service and what the tests need around it."""

    projects: "project_pb2_grpc.ProjectServiceAsyncStub"
    versions: "version_pb2_grpc.VersionServiceAsyncStub"
    datasets: Datasets
    send: Sender

    async def create(self, display_name: str = "", **changes: Any) -> version_pb2.Version:
        """Creates a version of the dataset that is ready."""
        request = version_pb2.CreateVersionRequest(
            parent=PARENT,
            version=version_pb2.Version(dataset=DATASET, display_name=display_name),
        )
        request.MergeFrom(version_pb2.CreateVersionRequest(**changes))
        with channels.translate():
            return await self.versions.CreateVersion(request)

    async def rename(self, name: str, display_name: str, etag: str = "") -> version_pb2.Version:
        with channels.translate():
            return await self.versions.UpdateVersion(
                version_pb2.UpdateVersionRequest(
                    version=version_pb2.Version(name=name, display_name=display_name, etag=etag),
                    update_mask=FieldMask(paths=["display_name"]),
                )
            )

    async def get(self, name: str) -> version_pb2.Version:
        with channels.translate():
            return await self.versions.GetVersion(version_pb2.GetVersionRequest(name=name))

    async def delete(self, name: str, etag: str = "") -> version_pb2.Version:
        with channels.translate():
            return await self.versions.DeleteVersion(
                version_pb2.DeleteVersionRequest(name=name, etag=etag)
            )

    async def undelete(self, name: str) -> version_pb2.Version:
        with channels.translate():
            return await self.versions.UndeleteVersion(
                version_pb2.UndeleteVersionRequest(name=name)
            )

    async def list(self, **fields: Any) -> version_pb2.ListVersionsResponse:
        with channels.translate():
            return await self.versions.ListVersions(
                version_pb2.ListVersionsRequest(**{"parent": PARENT, **fields})
            )

    async def watch(
        self, cursor: str = "", parent: str = PARENT, snapshot_size: int = 0
    ) -> AsyncIterator[version_pb2.WatchVersionsResponse]:
        with channels.translate():
            async for item in self.versions.WatchVersions(
                version_pb2.WatchVersionsRequest(
                    parent=parent, cursor=cursor, snapshot_size=snapshot_size
                )
            ):
                yield item


@pytest.fixture
async def stack(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Stack]:
    datasets = Datasets()  # type: ignore[abstract]  # only GetDataset is called
    preprocess = grpc.aio.server(interceptors=[Boundary()])
    dataset_pb2_grpc.add_DatasetServiceServicer_to_server(datasets, preprocess)
    preprocess_port = preprocess.add_insecure_port("127.0.0.1:0")
    await preprocess.start()
    service = Service(
        "version",
        migrations=MIGRATIONS,
        settings=Settings(
            database_url=await make_database_url("version"),
            nats_url=nats_url,
            store_url=f"file://{tmp_path}/store",
            preprocess_address=f"127.0.0.1:{preprocess_port}",
            data_dir=tmp_path / "data",
            drain_seconds=2,
            access="open",
        ),
    )
    process = asyncio.create_task(serve(service))
    ready = asyncio.create_task(service.serving.wait())
    await asyncio.wait({process, ready}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    if process.done():
        await process
    async with channels.channel(service.address) as channel:
        yield Stack(
            projects=project_pb2_grpc.ProjectServiceStub(channel),
            versions=version_pb2_grpc.VersionServiceStub(channel),
            datasets=datasets,
            send=Sender(bus),
        )
    service.stop()
    await process
    await preprocess.stop(None)


async def refused(
    call: Awaitable[object], error: type[DetflowError], reason: str, field: str = ""
) -> DetflowError:
    """Awaits a call that must be refused."""
    with pytest.raises(error) as caught:
        await call
    assert caught.value.reason == reason
    if field:
        assert field in [violation.field for violation in caught.value.violations]
    return caught.value


async def upto(
    stream: AsyncIterator[version_pb2.WatchVersionsResponse],
    last: Callable[[version_pb2.Version], bool],
) -> list[version_pb2.WatchVersionsResponse]:
    """Reads a watch up to the change that `last` describes."""
    items = []
    async with asyncio.timeout(15):
        async for item in stream:
            items.append(item)
            if item.HasField("version") and last(item.version):
                return items
    raise AssertionError("the watch ended")


async def until_state(
    stack: Stack, name: str, state: "version_pb2.Version.State.ValueType"
) -> "asyncio.Task[version_pb2.Version]":
    """Begins to wait, by a watch, for a version to come to a state."""
    watch = stack.watch()
    await anext(watch)  # what comes after the snapshot is seen, also in the trash

    async def wait() -> version_pb2.Version:
        return (await upto(watch, lambda v: v.name == name and v.state == state))[-1].version

    return asyncio.create_task(wait())


# --- projects


async def test_default_project_is_there_and_projects_list_oldest_first(stack: Stack) -> None:
    with channels.translate():
        for id_ in ("zebra", "apple"):
            made = await stack.projects.CreateProject(
                project_pb2.CreateProjectRequest(
                    project_id=id_, project=project_pb2.Project(display_name=KOREAN)
                )
            )
            assert (made.name, made.display_name) == (f"projects/{id_}", KOREAN)
        assert made == await stack.projects.GetProject(
            project_pb2.GetProjectRequest(name="projects/apple")
        )
        first = await stack.projects.ListProjects(project_pb2.ListProjectsRequest(page_size=2))
        second = await stack.projects.ListProjects(
            project_pb2.ListProjectsRequest(page_size=2, page_token=first.next_page_token)
        )
    assert [p.name for p in first.projects] == ["projects/default", "projects/zebra"]
    assert [p.name for p in second.projects] == ["projects/apple"]
    assert second.next_page_token == ""


async def test_bad_project_requests_are_refused(stack: Stack) -> None:
    async def create(id_: str, display_name: str) -> None:
        with channels.translate():
            await stack.projects.CreateProject(
                project_pb2.CreateProjectRequest(
                    project_id=id_, project=project_pb2.Project(display_name=display_name)
                )
            )

    await refused(create("default", "x"), AlreadyExists, "DUPLICATE_PROJECT")
    await refused(create("No", "x"), InvalidArgument, "INVALID_FIELD", "project_id")
    await refused(
        create("fine", "a\u202eb"), InvalidArgument, "INVALID_FIELD", "project.display_name"
    )
    await refused(create("fine", "  "), InvalidArgument, "BAD_NAME", "project.display_name")
    with pytest.raises(NotFound), channels.translate():
        await stack.projects.GetProject(project_pb2.GetProjectRequest(name="projects/none"))
    with pytest.raises(InvalidArgument), channels.translate():
        await stack.projects.ListProjects(project_pb2.ListProjectsRequest(page_token="x"))


# --- create


async def test_new_version_is_preprocessing_with_defaults_resolved(stack: Stack) -> None:
    version = await stack.create()
    assert version.display_name == "V_0"
    assert version.state == version_pb2.Version.PREPROCESSING
    assert version.recipe == version_pb2.Recipe(
        split=version_pb2.SplitRatio(train=70, val=20, test=10),
        group_by=version_pb2.GROUP_BY_NEAR_DUPLICATES,
    )
    assert list(version.class_names) == ["circle", "네모"]
    assert (version.revision, version.dataset) == (1, DATASET)
    assert version.etag and not version.HasField("delete_time")
    assert await stack.get(version.name) == version


async def test_recipe_is_kept_and_output_only_fields_are_ignored(stack: Stack) -> None:
    recipe = version_pb2.Recipe(
        split=version_pb2.SplitRatio(train=50, val=25, test=25),
        grayscale=True,
        augmentations=[version_pb2.AUGMENTATION_ROTATE_90, version_pb2.AUGMENTATION_FLIP_UP_DOWN],
        seed=-7,
        keep_existing_split=True,
        group_by=version_pb2.GROUP_BY_NAME_PREFIX,
        group_separator="_",
        exact_size=version_pb2.ExactSize(
            width_px=640, height_px=384, fit=version_pb2.ExactSize.FIT_STRETCH
        ),
        brightness=[-90, 25],
        contrast=[0.1, 2.5],
    )
    version = await stack.create(
        version=version_pb2.Version(
            recipe=recipe,
            name=f"{PARENT}/versions/mine",
            state=version_pb2.Version.COMPLETED,
            revision=77,
            etag="mine",
            class_names=["mine"],
        )
    )
    assert version.recipe == recipe
    assert not version.name.endswith("mine")
    assert version.state == version_pb2.Version.PREPROCESSING
    assert version.revision == 1 and "mine" not in version.class_names


async def test_concurrent_creates_get_consecutive_names(stack: Stack) -> None:
    versions = await asyncio.gather(*(stack.create() for _ in range(20)))
    assert {v.display_name for v in versions} == {f"V_{n}" for n in range(20)}
    listed = (await stack.list()).versions
    assert [v.display_name for v in listed] == [f"V_{n}" for n in reversed(range(20))]


async def test_name_of_a_deleted_version_is_not_given_out_again(stack: Stack) -> None:
    first = await stack.create()
    await stack.delete(first.name)
    assert (await stack.create()).display_name == "V_1"
    await stack.create("V_2")
    assert (await stack.create()).display_name == "V_3"


async def test_projects_count_on_their_own(stack: Stack) -> None:
    with channels.translate():
        await stack.projects.CreateProject(
            project_pb2.CreateProjectRequest(
                project_id="other", project=project_pb2.Project(display_name="Other")
            )
        )
    stack.datasets.put("projects/other/datasets/d2", dataset_pb2.Dataset.READY)
    await stack.create()
    other = await stack.create(
        parent="projects/other", version=version_pb2.Version(dataset="projects/other/datasets/d2")
    )
    assert other.display_name == "V_0"
    foreign = other.name.replace("projects/other", PARENT)
    missing = f"{PARENT}/versions/nothing"
    texts = {
        (await refused(stack.get(name), NotFound, "NOT_FOUND")).message.replace(name, "")
        for name in (foreign, missing)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("name", [KOREAN, "한글", "a" * 63, "👩‍👩‍👧"])
async def test_names_come_back_exactly(stack: Stack, name: str) -> None:
    version = await stack.create(name)
    assert version.display_name == name
    assert (await stack.get(version.name)).display_name == name


async def test_duplicate_name_is_refused(stack: Stack) -> None:
    await stack.create("한글")
    for same in ("한글", "한글", " 한글 "):  # composed, decomposed, with spaces around
        await refused(stack.create(same), AlreadyExists, "DUPLICATE_NAME")
    assert (await stack.create()).display_name == "V_0"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("   ", "BAD_NAME"),
        ("a" * 64, "INVALID_FIELD"),
        ("a\x00b", "INVALID_FIELD"),
        ("a\nb", "INVALID_FIELD"),
        ("a\u202eb", "INVALID_FIELD"),
    ],
    ids=["blank", "too long", "NUL", "line end", "bidi override"],
)
async def test_bad_name_is_refused(stack: Stack, name: str, reason: str) -> None:
    await refused(stack.create(name), InvalidArgument, reason, "version.display_name")


async def test_version_needs_a_ready_dataset_of_its_project(stack: Stack) -> None:
    def create(dataset: str) -> Coroutine[Any, Any, version_pb2.Version]:
        return stack.create(version=version_pb2.Version(dataset=dataset))

    elsewhere, missing = "projects/other/datasets/d9", f"{PARENT}/datasets/none"
    stack.datasets.put(elsewhere, dataset_pb2.Dataset.READY)
    texts = {
        (await refused(create(name), NotFound, "NOT_FOUND")).message.replace(name, "")
        for name in (elsewhere, missing)
    }
    assert len(texts) == 1
    for state in (dataset_pb2.Dataset.IMPORTING, dataset_pb2.Dataset.FAILED):
        stack.datasets.put(f"{PARENT}/datasets/d3", state)
        error = await refused(
            create(f"{PARENT}/datasets/d3"), FailedPrecondition, "DATASET_NOT_READY"
        )
        assert error.metadata["state"] == dataset_pb2.Dataset.State.Name(state)
    empty = version_pb2.CreateVersionRequest(parent=PARENT, version=version_pb2.Version())
    with pytest.raises(InvalidArgument) as caught, channels.translate():
        await stack.versions.CreateVersion(empty)
    assert caught.value.violations[0].field == "version.dataset"


async def test_bad_create_requests_are_refused(stack: Stack) -> None:
    await refused(stack.create(parent="projects/none"), NotFound, "NOT_FOUND")
    await refused(stack.create(parent="nothing"), InvalidArgument, "INVALID_FIELD", "parent")
    for recipe, field_ in (
        (
            version_pb2.Recipe(split=version_pb2.SplitRatio(train=70, val=20, test=20)),
            "version.recipe.split",
        ),
        (version_pb2.Recipe(max_side_px=5), "version.recipe.max_side_px"),
        (
            version_pb2.Recipe(augmentations=[version_pb2.AUGMENTATION_ROTATE_90] * 2),
            "version.recipe.augmentations",
        ),
    ):
        await refused(
            stack.create(version=version_pb2.Version(recipe=recipe)),
            InvalidArgument,
            "INVALID_FIELD",
            field_,
        )


async def test_repeated_request_gives_the_same_version(stack: Stack) -> None:
    first = await stack.create("mine", request_id="r1")
    again = await asyncio.gather(*(stack.create("mine", request_id="r1") for _ in range(5)))
    assert {v.name for v in again} == {first.name}
    concurrent = await asyncio.gather(*(stack.create(request_id="r2") for _ in range(10)))
    assert len({v.name for v in concurrent}) == 1
    await refused(
        stack.create("other", request_id="r1"), InvalidArgument, "REQUEST_ID_REUSED", "request_id"
    )
    stack.datasets.by_name.clear()  # a late retry does not need the dataset any more
    assert (await stack.create("mine", request_id="r1")).name == first.name
    assert len((await stack.list()).versions) == 2


# --- list


async def test_list_pages_through_all_versions_newest_first(stack: Stack) -> None:
    made = [(await stack.create()).name for _ in range(5)]
    await stack.delete(made[2])
    kept = [name for name in reversed(made) if name != made[2]]

    async def pages(**fields: Any) -> list[str]:
        found, token = [], ""
        while True:
            page = await stack.list(page_size=2, page_token=token, **fields)
            assert len(page.versions) <= 2
            found += [v.name for v in page.versions]
            token = page.next_page_token
            if not token:
                return found

    assert await pages() == kept
    assert await pages(show_deleted=True) == made[::-1]


async def test_tampered_page_token_is_refused(stack: Stack) -> None:
    for _ in range(3):
        await stack.create()
    token = (await stack.list(page_size=1)).next_page_token
    for bad, more in (
        ("!" + token, {}),
        (token[:-2], {}),
        ("x" * 40, {}),
        (token, {"show_deleted": True}),
    ):
        await refused(
            stack.list(page_size=1, page_token=bad, **more),
            InvalidArgument,
            "BAD_PAGE_TOKEN",
            "page_token",
        )
    await refused(stack.list(parent="projects/none"), NotFound, "NOT_FOUND")
    await refused(stack.list(page_size=-1), InvalidArgument, "INVALID_FIELD", "page_size")


# --- update, delete, undelete


async def test_rename_changes_name_revision_and_etag(stack: Stack) -> None:
    version = await stack.create()
    renamed = await stack.rename(version.name, KOREAN, version.etag)
    assert (renamed.display_name, renamed.revision) == (KOREAN, 2)
    assert renamed.etag != version.etag
    assert await stack.rename(version.name, KOREAN) == renamed  # nothing to change
    await refused(stack.rename(version.name, "x", version.etag), Aborted, "ETAG_MISMATCH")
    await stack.create("taken")
    await refused(stack.rename(version.name, "taken"), AlreadyExists, "DUPLICATE_NAME")
    assert await stack.get(version.name) == renamed


async def test_one_of_two_renames_with_the_same_etag_wins(stack: Stack) -> None:
    version = await stack.create()
    outcomes = await asyncio.gather(
        *(stack.rename(version.name, f"n{n}", version.etag) for n in range(4)),
        return_exceptions=True,
    )
    assert sum(isinstance(o, version_pb2.Version) for o in outcomes) == 1
    assert sum(isinstance(o, Aborted) for o in outcomes) == 3


async def test_only_the_display_name_can_be_updated(stack: Stack) -> None:
    version = await stack.create()

    async def update(message: version_pb2.Version, *paths: str) -> version_pb2.Version:
        with channels.translate():
            return await stack.versions.UpdateVersion(
                version_pb2.UpdateVersionRequest(
                    version=message, update_mask=FieldMask(paths=paths)
                )
            )

    named = version_pb2.Version(name=version.name, display_name="new")
    for path in ("dataset", "recipe.seed", "nonsense"):
        error = await refused(
            update(named, "display_name", path),
            InvalidArgument,
            "BAD_FIELD_MASK",
            f"update_mask.{path}",
        )
        assert path in error.message
    await refused(
        update(version_pb2.Version(name=version.name), "display_name"),
        InvalidArgument,
        "BAD_NAME",
        "version.display_name",
    )
    for name in ("", f"{PARENT}/datasets/d1"):
        await refused(
            update(version_pb2.Version(name=name, display_name="new")),
            InvalidArgument,
            "BAD_RESOURCE_NAME",
            "version.name",
        )
    await refused(
        update(version_pb2.Version(name=f"{PARENT}/versions/none", display_name="new")),
        NotFound,
        "NOT_FOUND",
    )
    assert (await stack.get(version.name)).revision == 1
    assert (await update(named)).display_name == "new"  # an empty mask means what is set
    named.display_name = "newer"
    assert (await update(named, "*")).display_name == "newer"


async def test_deleted_version_is_readable_hidden_and_restorable(stack: Stack) -> None:
    version = await stack.create("mine")
    await refused(stack.delete(version.name, '"stale"'), Aborted, "ETAG_MISMATCH")
    deleted = await stack.delete(version.name, version.etag)
    assert deleted.HasField("delete_time") and deleted.revision == 2
    assert await stack.get(version.name) == deleted
    assert not (await stack.list()).versions
    assert list((await stack.list(show_deleted=True)).versions) == [deleted]
    await refused(stack.delete(version.name), NotFound, "VERSION_DELETED")
    await refused(stack.rename(version.name, "x"), FailedPrecondition, "VERSION_DELETED")

    restored = await stack.undelete(version.name)
    assert not restored.HasField("delete_time") and restored.revision == 3
    await refused(stack.undelete(version.name), AlreadyExists, "NOT_DELETED")
    await refused(stack.undelete(f"{PARENT}/versions/none"), NotFound, "NOT_FOUND")
    await refused(stack.delete(f"{PARENT}/versions/none"), NotFound, "NOT_FOUND")


async def test_undelete_does_not_take_a_name_back(stack: Stack) -> None:
    version = await stack.create("mine")
    await stack.delete(version.name)
    await stack.create("mine")
    await refused(stack.undelete(version.name), AlreadyExists, "DUPLICATE_NAME")


# --- states


async def test_version_follows_preprocessing_and_training(stack: Stack) -> None:
    version = await stack.create()
    name = version.name
    done = await until_state(stack, name, version_pb2.Version.COMPLETED)
    await stack.send.preprocessing(name, 1, preprocess_pb2.Preprocessing.RUNNING)
    # Out of order and doubled: the first event of the training comes last.
    for revision, state in (
        (3, training_pb2.Training.RUNNING),
        (2, training_pb2.Training.PROVISIONING),
        (5, training_pb2.Training.SUCCEEDED),
        (4, training_pb2.Training.EVALUATING),
        (1, training_pb2.Training.QUEUED),
        (1, training_pb2.Training.QUEUED),
    ):
        await stack.send.training(name, "dt1", revision, state)
    await stack.send.preprocessing(name, 2, preprocess_pb2.Preprocessing.SUCCEEDED)
    final = await done
    assert final.num_images == version_pb2.SplitCounts(train=1400, val=400, test=200)
    assert final.manifest.key == "bundles/manifests/ab.json"
    assert final.training == f"{name}/trainings/dt1"
    assert final.revision == 7
    assert await stack.get(name) == final


async def test_failed_preprocessing_keeps_its_cause(stack: Stack) -> None:
    version = await stack.create()
    failed = await until_state(stack, version.name, version_pb2.Version.FAILED)
    await stack.send.preprocessing(version.name, 1, preprocess_pb2.Preprocessing.FAILED)
    assert (await failed).failure.status.message == "image is gone"


async def test_deleted_version_follows_its_training(stack: Stack) -> None:
    version = await stack.create()
    name = version.name
    queued = await until_state(stack, name, version_pb2.Version.QUEUED)
    await stack.send.preprocessing(name, 1, preprocess_pb2.Preprocessing.SUCCEEDED)
    await stack.send.training(name, "dt1", 1, training_pb2.Training.QUEUED)
    await queued
    await stack.delete(name)
    stopped = await until_state(stack, name, version_pb2.Version.STOPPED)
    await stack.send.training(f"{PARENT}/versions/gone", "dt9", 1, training_pb2.Training.QUEUED)
    await stack.send.training(name, "dt1", 2, training_pb2.Training.STOPPED)
    final = await stopped
    assert final.HasField("delete_time")
    assert (await stack.undelete(name)).state == version_pb2.Version.STOPPED


# --- watch


async def test_watch_gives_a_snapshot_and_then_every_change(stack: Stack) -> None:
    first = await stack.create()
    gone = await stack.create()
    await stack.delete(gone.name)
    watch = stack.watch()
    snapshot = await anext(watch)
    assert [v.name for v in snapshot.snapshot.versions] == [first.name]
    await stack.rename(first.name, "a")
    await stack.delete(first.name)
    await stack.undelete(first.name)
    items = await upto(watch, lambda v: v.revision == 4)
    assert [(i.version.name, i.version.revision) for i in items] == [
        (first.name, 2),
        (first.name, 3),
        (first.name, 4),
    ]
    assert items[1].version.HasField("delete_time")
    second = await stack.create()
    assert [i.version for i in await upto(watch, lambda v: True)] == [second]


async def test_snapshot_of_a_watch_holds_the_newest_where_asked_for_few(stack: Stack) -> None:
    names = [(await stack.create()).name for _ in range(3)]
    for size, shown, truncated in ((2, names[:0:-1], True), (3, names[::-1], False)):
        watch = stack.watch(snapshot_size=size)
        snapshot = (await anext(watch)).snapshot
        assert [version.name for version in snapshot.versions] == shown
        assert (snapshot.truncated, snapshot.more) == (truncated, False)
        renamed = await stack.rename(names[0], f"n{size}")  # one that was left out
        assert [item.version for item in await upto(watch, lambda v: True)] == [renamed]


async def test_watch_resumed_at_any_cursor_gives_the_exact_suffix(stack: Stack) -> None:
    early = stack.watch()
    await anext(early)
    version = await stack.create()
    # The first cursor is a position in the stream, so let the creation arrive there.
    await upto(early, lambda v: v.name == version.name)
    watch = stack.watch()
    start = await anext(watch)
    for n in range(5):
        await stack.rename(version.name, f"n{n}")
    items = await upto(watch, lambda v: v.display_name == "n4")
    for position, cursor in enumerate([start.cursor, *(i.cursor for i in items[:-1])]):
        again = await upto(stack.watch(cursor), lambda v: v.display_name == "n4")
        assert again == items[position:]


async def test_watch_shows_only_its_own_project(stack: Stack) -> None:
    with channels.translate():
        await stack.projects.CreateProject(
            project_pb2.CreateProjectRequest(
                project_id="other", project=project_pb2.Project(display_name="Other")
            )
        )
    stack.datasets.put("projects/other/datasets/d2", dataset_pb2.Dataset.READY)
    watch = stack.watch()
    assert not (await anext(watch)).snapshot.versions
    await stack.create(
        parent="projects/other", version=version_pb2.Version(dataset="projects/other/datasets/d2")
    )
    mine = await stack.create()
    items = await upto(watch, lambda v: True)
    assert [i.version.name for i in items] == [mine.name]


async def test_bad_watch_requests_are_refused(stack: Stack) -> None:
    await refused(anext(stack.watch(parent="projects/none")), NotFound, "NOT_FOUND")
    await refused(anext(stack.watch("nonsense")), InvalidArgument, "BAD_CURSOR", "cursor")


async def test_create_while_the_preprocess_service_is_away_is_unavailable(stack: Stack) -> None:
    stack.datasets.error = Unavailable("restarting")
    await refused(stack.create(request_id="r1"), Unavailable, "UNAVAILABLE")
    stack.datasets.error = None
    assert (await stack.create(request_id="r1")).display_name == "V_0"
