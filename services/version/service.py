"""The gRPC servicer of versions: validate, call, convert.

The methods are documented in the protos. They raise; the interceptor makes a status of that.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any, TypeAlias

from detflow import channels, outbox
from detflow.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    bad_field,
    not_found,
)
from detflow.masks import check_mask
from detflow.names import check_display_name, last_segment, new_id, project_of
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Connection, Database
from detflow.recipes import resolve_recipe
from detflow.sharing import SharedRead
from detflow.times import timestamp
from detflow.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    events_pb2,
    version_pb2,
    version_pb2_grpc,
)
from detflow.watch import Change, Snapshot, Watcher
from services.version import domain, project_store, store
from services.version.filter import parse_filter
from services.version.labels import change_labels, check_labels
from services.version.listing import FIELDS, parse_order

Context: TypeAlias = Any  # grpc.aio.ServicerContext, which no handler here needs

_PART = 500  # versions in one message of a snapshot: well below gRPC's 4 MiB
_RECENT = timedelta(hours=1)  # longer than an event may wait in the outbox or the stream


class VersionService(version_pb2_grpc.VersionServiceServicer):
    """Serves versions.

    Args:
        db: Database of this service.
        watcher: Event stream of this process.
        datasets: Stub of the preprocess service, which owns the datasets.
        trash_time: How long a deleted version can be taken back.
    """

    def __init__(
        self,
        db: Database,
        watcher: Watcher,
        datasets: dataset_pb2_grpc.DatasetServiceAsyncStub,
        trash_time: timedelta = domain.TRASH_TIME,
    ) -> None:
        self._db = db
        self._trash_time = trash_time
        self._watcher = watcher
        self._datasets = datasets
        self._snapshots = SharedRead(self._snapshot)

    async def CreateVersion(  # noqa: D102
        self, request: version_pb2.CreateVersionRequest, context: Context
    ) -> version_pb2.Version:
        project_id, wanted = project_of(request.parent), request.version
        display_name = wanted.display_name and check_display_name(
            wanted.display_name, "version.display_name"
        )
        labels = check_labels(wanted.labels)
        request_id = request.request_id or None
        request_sha256 = _fingerprint(wanted, display_name)
        async with self._db.connection() as conn:
            await project_store.get_project(conn, project_id)
            made = await store.get_version_by_request(conn, project_id, request_id)
        if made is None:
            wanted = await self._filled_from_parent(project_id, wanted)
            dataset = await self._get_ready_dataset(project_id, wanted.dataset)
            recipe = resolve_recipe(wanted.recipe)
            async with self._db.transaction() as conn:
                await project_store.get_project(conn, project_id, lock=True)
                # The same request may have come in meanwhile, by another connection.
                made = await store.get_version_by_request(conn, project_id, request_id)
                if made is None:
                    made = await store.insert_version(
                        conn,
                        version_id=new_id(),
                        project_id=project_id,
                        display_name=display_name
                        or await project_store.take_display_name(conn, project_id),
                        dataset=dataset.name,
                        dataset_sha256=dataset.content_sha256,
                        class_names=dataset.class_names,
                        recipe=recipe.SerializeToString(deterministic=True),
                        labels=labels,
                        parent_version=wanted.parent_version or None,
                        request_id=request_id,
                        request_sha256=request_sha256,
                    )
                    await announce(conn, made, "created")
        if made.request_sha256 != request_sha256:
            raise bad_field(
                "request_id",
                "REQUEST_ID_REUSED",
                f"{request.request_id!r} was used to create {made.name} with other content;"
                " take a new id for each new version",
            )
        return version_to_proto(made)

    async def GetVersion(  # noqa: D102
        self, request: version_pb2.GetVersionRequest, context: Context
    ) -> version_pb2.Version:
        async with self._db.connection() as conn:
            return version_to_proto(
                await store.get_version(conn, project_of(request.name), last_segment(request.name))
            )

    async def ListVersions(  # noqa: D102
        self, request: version_pb2.ListVersionsRequest, context: Context
    ) -> version_pb2.ListVersionsResponse:
        query = (request.parent, request.show_deleted, request.filter, request.order_by)
        key = decode_token(request.page_token, repr(query))
        size = page_size(request.page_size)
        project_id = project_of(request.parent)
        condition = parse_filter(request.filter, FIELDS, first=2)
        order = parse_order(request.order_by)
        async with self._db.transaction(isolation="repeatable_read") as conn:
            await project_store.get_project(conn, project_id)
            versions = await store.list_versions(
                conn,
                project_id,
                order=order,
                after=order.parse_key(key) if key else None,
                condition=condition,
                limit=size + 1,
                show_deleted=request.show_deleted,
            )
        response = version_pb2.ListVersionsResponse(
            versions=[version_to_proto(version) for version in versions[:size]]
        )
        if len(versions) > size:
            response.next_page_token = encode_token(repr(query), *order.key(versions[size - 1]))
        return response

    async def UpdateVersion(  # noqa: D102
        self, request: version_pb2.UpdateVersionRequest, context: Context
    ) -> version_pb2.Version:
        ids = domain.parse_version_name(request.version.name)
        if ids is None:
            raise bad_field(
                "version.name",
                "BAD_RESOURCE_NAME",
                f"must be projects/{{project}}/versions/{{version}}, not {request.version.name!r}",
            )
        check_mask(request.update_mask, "display_name", "labels", "labels.KEY")
        paths = set(request.update_mask.paths) or _fields_set(request.version)
        renames = bool(paths & {"display_name", "*"})
        if renames:
            check_display_name(request.version.display_name, "version.display_name")
        given = check_labels(request.version.labels)
        project_id, version_id = ids
        async with self._db.transaction() as conn:
            await project_store.get_project(conn, project_id, lock=True)
            version = await store.get_version(conn, project_id, version_id, lock=True)
            _check_not_deleted(version)
            _check_etag(version, request.version.etag)
            display_name = request.version.display_name if renames else version.display_name
            labels = change_labels(version.labels, given, paths)
            if (display_name, labels) != (version.display_name, version.labels):
                version = await store.update_version(
                    conn, version, display_name=display_name, labels=labels
                )
                await announce(conn, version, "updated")
        return version_to_proto(version)

    async def DeleteVersion(  # noqa: D102
        self, request: version_pb2.DeleteVersionRequest, context: Context
    ) -> version_pb2.Version:
        async with self._db.transaction() as conn:
            version = await store.get_version(
                conn, project_of(request.name), last_segment(request.name), lock=True
            )
            if version.delete_time:
                raise NotFound(f"{version.name} is in the trash already", reason="VERSION_DELETED")
            _check_etag(version, request.etag)
            version = await store.update_deleted(
                conn, version, deleted=True, trash_time=self._trash_time
            )
            await announce(conn, version, "deleted")
        return version_to_proto(version)

    async def UndeleteVersion(  # noqa: D102
        self, request: version_pb2.UndeleteVersionRequest, context: Context
    ) -> version_pb2.Version:
        project_id = project_of(request.name)
        async with self._db.transaction() as conn:
            await project_store.get_project(conn, project_id, lock=True)
            version = await store.get_version(
                conn, project_id, last_segment(request.name), lock=True
            )
            if not version.delete_time:
                raise AlreadyExists(f"{version.name} is not in the trash", reason="NOT_DELETED")
            version = await store.update_deleted(conn, version, deleted=False)
            await announce(conn, version, "undeleted")
        return version_to_proto(version)

    async def WatchVersions(  # noqa: D102
        self, request: version_pb2.WatchVersionsRequest, context: Context
    ) -> AsyncIterator[version_pb2.WatchVersionsResponse]:
        project_id = project_of(request.parent)
        async with self._db.connection() as conn:
            await project_store.get_project(conn, project_id)

        def of_this_project(change: Change) -> bool:
            return project_of(change.event.version.name) == project_id

        items = self._watcher.follow(
            subjects=["detflow.v1.version.>"],
            cursor=request.cursor,
            snapshot=lambda: self._snapshots.get((project_id, request.snapshot_size)),
            matches=of_this_project,
        )
        async with contextlib.aclosing(items):
            async for item in items:
                if isinstance(item, Snapshot):
                    for part in _parts(item.value, request.snapshot_size, item.cursor):
                        yield part
                    continue
                response = version_pb2.WatchVersionsResponse(cursor=item.cursor)
                if isinstance(item, Change):
                    response.version.CopyFrom(item.event.version)
                else:
                    response.heartbeat.SetInParent()
                yield response

    async def _snapshot(self, which: tuple[str, int]) -> Snapshot[list[version_pb2.Version]]:
        """Reads the newest versions of a project, and which of their events that includes.

        Args:
            which: Id of the project, and how many are asked for: one more is read, which shows that
                there are more; 0 reads all.
        """
        project_id, size = which
        async with self._db.transaction(isolation="repeatable_read") as conn:
            versions = await store.list_versions(conn, project_id, limit=size + 1 if size else None)
            # Of older changes no event is still under way; deleted ones are not in the list.
            recent = await store.list_recent_version_ids(conn, project_id, _RECENT)
            seqs = await outbox.last_seqs(conn, [f"version.{id_}" for id_ in recent])
        return Snapshot([version_to_proto(version) for version in versions], seqs)

    async def _filled_from_parent(
        self, project_id: str, wanted: version_pb2.Version
    ) -> version_pb2.Version:
        """Takes over from the parent, if one is named, the dataset or recipe that is not given.

        Raises:
            NotFound: The parent does not exist, or not in this project.
            FailedPrecondition: VERSION_DELETED: it is in the trash.
        """
        if not wanted.parent_version:
            return wanted
        if project_of(wanted.parent_version) != project_id:
            raise not_found(wanted.parent_version)
        async with self._db.connection() as conn:
            parent = await store.get_version(conn, project_id, last_segment(wanted.parent_version))
        _check_not_deleted(parent)
        filled = version_pb2.Version()
        filled.CopyFrom(wanted)
        filled.dataset = wanted.dataset or parent.dataset
        if not wanted.HasField("recipe"):
            filled.recipe.MergeFromString(parent.recipe)
        return filled

    async def _get_ready_dataset(self, project_id: str, name: str) -> dataset_pb2.Dataset:
        """Reads the dataset a version is to be made of.

        Raises:
            InvalidArgument: No dataset is named.
            NotFound: It does not exist, or not in this project.
            FailedPrecondition: DATASET_NOT_READY.
        """
        if not name:
            raise bad_field("version.dataset", "REQUIRED", "name the dataset to make a version of")
        missing = not_found(name)
        if project_of(name) != project_id:
            raise missing
        try:
            with channels.translate():
                dataset = await self._datasets.GetDataset(dataset_pb2.GetDatasetRequest(name=name))
        except NotFound as error:
            raise missing from error
        if dataset.state != dataset_pb2.Dataset.READY:
            state = dataset_pb2.Dataset.State.Name(dataset.state)
            raise FailedPrecondition(
                f"{name} is {state}; wait until its import is READY, or import it again",
                reason="DATASET_NOT_READY",
                metadata={"resource": name, "state": state},
            )
        return dataset


def _parts(
    found: list[version_pb2.Version], size: int, cursor: str
) -> Iterator[version_pb2.WatchVersionsResponse]:
    """Cuts a snapshot into messages that fit; only after the last can the watch be resumed."""
    versions = found[:size] if size else found
    for start in range(0, max(len(versions), 1), _PART):
        more = start + _PART < len(versions)
        yield version_pb2.WatchVersionsResponse(
            cursor="" if more else cursor,
            snapshot=version_pb2.VersionsSnapshot(
                versions=versions[start : start + _PART],
                more=more,
                truncated=len(versions) < len(found),
            ),
        )


async def announce(conn: Connection, version: domain.Version, what: str) -> None:
    """Appends a change of a version to the outbox, in the transaction that made it."""
    await outbox.append(
        conn,
        kind="version",
        resource_id=version.id,
        what=what,
        name=version.name,
        event=events_pb2.Event(version=version_to_proto(version)),
    )


def version_to_proto(version: domain.Version) -> version_pb2.Version:
    """Converts a version to its message."""
    message = version_pb2.Version(
        name=version.name,
        display_name=version.display_name,
        state=version_pb2.Version.State.Value(version.state),
        dataset=version.dataset,
        recipe=version_pb2.Recipe.FromString(version.recipe),
        class_names=version.class_names,
        revision=version.revision,
        etag=version.etag,
        create_time=timestamp(version.create_time),
        update_time=timestamp(version.update_time),
        delete_time=timestamp(version.delete_time),
        purge_time=timestamp(version.purge_time),
        labels=version.labels,
        dataset_sha256=version.dataset_sha256,
        parent_version=version.parent_version or "",
    )
    if version.bundle:
        counts, manifest = version.bundle.num_images, version.bundle.manifest
        message.num_images.train, message.num_images.val, message.num_images.test = counts
        message.manifest.key = manifest.key
        message.manifest.size_bytes = manifest.size_bytes
        message.manifest.sha256 = manifest.sha256
    if version.training_id:
        message.training = f"{version.name}/trainings/{version.training_id}"
    if version.failure is not None:
        message.failure.MergeFromString(version.failure)
    if version.metrics:
        figures = {name: getattr(version.metrics, name) for name in domain.METRICS}
        training = f"{version.name}/trainings/{version.metrics.training_id}"
        message.metrics.CopyFrom(version_pb2.VersionMetrics(training=training, **figures))
    return message


def _fingerprint(wanted: version_pb2.Version, display_name: str) -> bytes:
    """Hashes what a request asks for, with defaults resolved."""
    is_parents = bool(wanted.parent_version) and not wanted.HasField("recipe")
    recipe = resolve_recipe(wanted.recipe).SerializeToString(deterministic=True)
    asked = (
        wanted.dataset,
        display_name,
        None if is_parents else recipe,
        wanted.parent_version,
        sorted(wanted.labels.items()),
    )
    return hashlib.sha256(repr(asked).encode()).digest()


def _fields_set(version: version_pb2.Version) -> set[str]:
    """Returns what an empty mask stands for: the fields that are set, or else the name."""
    fields = {name for name in ("display_name", "labels") if getattr(version, name)}
    return fields or {"display_name"}


def _check_not_deleted(version: domain.Version) -> None:
    if version.delete_time:
        raise FailedPrecondition(
            f"{version.name} is in the trash; undelete it first", reason="VERSION_DELETED"
        )


def _check_etag(version: domain.Version, etag: str) -> None:
    if etag and etag != version.etag:
        raise Aborted(
            f"{version.name} changed since etag {etag} was read; read it again and retry",
            reason="ETAG_MISMATCH",
            metadata={"resource": version.name, "etag": version.etag},
        )
