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
from services.version import domain, store

Context: TypeAlias = Any  # grpc.aio.ServicerContext, which no handler here needs

_PART = 500  # versions in one message of a snapshot: well below gRPC's 4 MiB
_RECENT = timedelta(hours=1)  # longer than an event may wait in the outbox or the stream


class VersionService(version_pb2_grpc.VersionServiceServicer):
    """Serves versions.

    Args:
        db: Database of this service.
        watcher: Event stream of this process.
        datasets: Stub of the preprocess service, which owns the datasets.
    """

    def __init__(
        self, db: Database, watcher: Watcher, datasets: dataset_pb2_grpc.DatasetServiceAsyncStub
    ) -> None:
        self._db = db
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
        recipe = resolve_recipe(wanted.recipe).SerializeToString(deterministic=True)
        request_id = request.request_id or None
        request_sha256 = _fingerprint(wanted.dataset, display_name, recipe)
        async with self._db.connection() as conn:
            await store.get_project(conn, project_id)
            made = await store.get_version_by_request(conn, project_id, request_id)
        if made is None:
            dataset = await self._get_ready_dataset(project_id, wanted.dataset)
            async with self._db.transaction() as conn:
                await store.get_project(conn, project_id, lock=True)
                # The same request may have come in meanwhile, by another connection.
                made = await store.get_version_by_request(conn, project_id, request_id)
                if made is None:
                    made = await store.insert_version(
                        conn,
                        version_id=new_id(),
                        project_id=project_id,
                        display_name=display_name
                        or await store.take_display_name(conn, project_id),
                        dataset=dataset.name,
                        class_names=dataset.class_names,
                        recipe=recipe,
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
        query = f"{request.parent}/versions?show_deleted={request.show_deleted}"
        key = decode_token(request.page_token, query)
        size = page_size(request.page_size)
        project_id = project_of(request.parent)
        async with self._db.connection() as conn:
            await store.get_project(conn, project_id)
            versions = await store.list_versions(
                conn,
                project_id,
                before=str(key[0]) if key else None,
                limit=size + 1,
                show_deleted=request.show_deleted,
            )
        more = len(versions) > size
        return version_pb2.ListVersionsResponse(
            versions=[version_to_proto(version) for version in versions[:size]],
            next_page_token=encode_token(query, versions[size - 1].id) if more else "",
        )

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
        check_mask(request.update_mask, "display_name")
        display_name = check_display_name(request.version.display_name, "version.display_name")
        project_id, version_id = ids
        async with self._db.transaction() as conn:
            await store.get_project(conn, project_id, lock=True)
            version = await store.get_version(conn, project_id, version_id, lock=True)
            if version.delete_time:
                raise FailedPrecondition(
                    f"{version.name} is in the trash; undelete it first", reason="VERSION_DELETED"
                )
            _check_etag(version, request.version.etag)
            if version.display_name != display_name:
                version = await store.update_display_name(conn, version, display_name)
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
            version = await store.update_deleted(conn, version, deleted=True)
            await announce(conn, version, "deleted")
        return version_to_proto(version)

    async def UndeleteVersion(  # noqa: D102
        self, request: version_pb2.UndeleteVersionRequest, context: Context
    ) -> version_pb2.Version:
        project_id = project_of(request.name)
        async with self._db.transaction() as conn:
            await store.get_project(conn, project_id, lock=True)
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
            await store.get_project(conn, project_id)

        def of_this_project(change: Change) -> bool:
            return project_of(change.event.version.name) == project_id

        items = self._watcher.follow(
            subjects=["detflow.v1.version.>"],
            cursor=request.cursor,
            snapshot=lambda: self._snapshots.get(project_id),
            matches=of_this_project,
        )
        async with contextlib.aclosing(items):
            async for item in items:
                if isinstance(item, Snapshot):
                    for part in _parts(item.value, item.cursor):
                        yield part
                    continue
                response = version_pb2.WatchVersionsResponse(cursor=item.cursor)
                if isinstance(item, Change):
                    response.version.CopyFrom(item.event.version)
                else:
                    response.heartbeat.SetInParent()
                yield response

    async def _snapshot(self, project_id: str) -> Snapshot[list[version_pb2.Version]]:
        """Reads all versions of a project, and which of their events that includes."""
        async with self._db.transaction(isolation="repeatable_read") as conn:
            versions = await store.list_versions(conn, project_id)
            # Of older changes no event is still under way; deleted ones are not in the list.
            recent = await store.list_recent_version_ids(conn, project_id, _RECENT)
            seqs = await outbox.last_seqs(conn, [f"version.{id_}" for id_ in recent])
        return Snapshot([version_to_proto(version) for version in versions], seqs)

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
    versions: list[version_pb2.Version], cursor: str
) -> Iterator[version_pb2.WatchVersionsResponse]:
    """Cuts a snapshot into messages that fit; only after the last can the watch be resumed."""
    for start in range(0, max(len(versions), 1), _PART):
        more = start + _PART < len(versions)
        yield version_pb2.WatchVersionsResponse(
            cursor="" if more else cursor,
            snapshot=version_pb2.VersionsSnapshot(
                versions=versions[start : start + _PART], more=more
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
    if version.delete_time:
        message.delete_time.FromDatetime(version.delete_time)
    return message


def _fingerprint(dataset: str, display_name: str, recipe: bytes) -> bytes:
    """Hashes what a request asks for, with defaults resolved."""
    return hashlib.sha256(repr((dataset, display_name, recipe)).encode()).digest()


def _check_etag(version: domain.Version, etag: str) -> None:
    if etag and etag != version.etag:
        raise Aborted(
            f"{version.name} changed since etag {etag} was read; read it again and retry",
            reason="ETAG_MISMATCH",
            metadata={"resource": version.name, "etag": version.etag},
        )
