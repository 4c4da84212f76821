"""The gRPC servicer of datasets."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from detflow import outbox, telemetry
from detflow.errors import FailedPrecondition, not_found
from detflow.names import check_display_name, last_segment, new_id, project_of
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Connection, Database
from detflow.projects import Projects
from detflow.sharing import SharedRead
from detflow.store import ObjectStore
from detflow.v1 import common_pb2, dataset_pb2, dataset_pb2_grpc
from detflow.watch import Change, Gauge, Snapshot, Watcher
from services.preprocess import store as sql
from services.preprocess import upload_store
from services.preprocess.counting import statistics_of
from services.preprocess.domain import Dataset, Upload, UploadState
from services.preprocess.download import open_download
from services.preprocess.events import append_dataset_event
from services.preprocess.messages import (
    dataset_message,
    problem_message,
    upload_message,
    wanted_format,
)
from services.preprocess.problem_store import list_problems
from services.preprocess.sources import Sources
from services.preprocess.uploads import Uploads

log = telemetry.get_logger(__name__)

_FINAL_DATASET = (dataset_pb2.Dataset.READY, dataset_pb2.Dataset.FAILED)


class DatasetService(dataset_pb2_grpc.DatasetServiceServicer):
    """Datasets: upload, import, read, delete, watch.

    Args:
        db: Database of the service.
        store: Object store.
        watcher: Fan-out of events.
        projects: The projects there are.
        uploads: Receives archives.
        sources: Says what may be imported from elsewhere.
        wake: Awaited when there is a dataset to import.
    """

    def __init__(
        self,
        *,
        db: Database,
        store: ObjectStore,
        watcher: Watcher,
        projects: Projects,
        uploads: Uploads,
        sources: Sources,
        wake: Callable[[], Awaitable[None]],
    ) -> None:
        self._db = db
        self._store = store
        self._watcher = watcher
        self._projects = projects
        self._uploads = uploads
        self._sources = sources
        self._wake = wake
        # Counting may take longer than a caller waits: it goes on, and the next one finds it.
        self._statistics = SharedRead(self._read_statistics)

    async def UploadArchive(
        self, request_iterator: AsyncIterator[dataset_pb2.UploadArchiveRequest], context: Any
    ) -> dataset_pb2.Upload:
        """Receives an archive in one stream."""
        return upload_message(await self._uploads.receive(request_iterator))

    async def CreateUpload(
        self, request: dataset_pb2.CreateUploadRequest, context: Any
    ) -> dataset_pb2.Upload:
        """Begins an upload."""
        return upload_message(await self._uploads.create(request))

    async def WriteUpload(
        self, request_iterator: AsyncIterator[dataset_pb2.WriteUploadRequest], context: Any
    ) -> dataset_pb2.Upload:
        """Adds bytes to an upload."""
        return upload_message(await self._uploads.write(request_iterator))

    async def GetUpload(
        self, request: dataset_pb2.GetUploadRequest, context: Any
    ) -> dataset_pb2.Upload:
        """Reads an upload."""
        return upload_message(await self._uploads.get(request.name))

    async def DeleteUpload(
        self, request: dataset_pb2.DeleteUploadRequest, context: Any
    ) -> dataset_pb2.DeleteUploadResponse:
        """Throws an upload away."""
        await self._uploads.delete(request.name)
        return dataset_pb2.DeleteUploadResponse()

    async def CreateDataset(
        self, request: dataset_pb2.CreateDatasetRequest, context: Any
    ) -> dataset_pb2.Dataset:
        """Starts an import."""
        project_id = project_of(request.parent)
        check_display_name(request.dataset.display_name, "dataset.display_name")
        source_url = ""
        if request.source_url:
            await self._projects.check(request.parent)
            source_url = self._sources.check(request.source_url).url
        async with self._db.transaction() as conn:
            if request.request_id and (
                known := await sql.get_requested_dataset(conn, project_id, request.request_id)
            ):
                return dataset_message(known)
            upload_id = None
            if not source_url:
                upload_id = (await _received(conn, project_id, request.upload)).id
            dataset = await sql.insert_dataset(
                conn,
                dataset_id=new_id(),
                project_id=project_id,
                display_name=request.dataset.display_name,
                request_id=request.request_id,
                upload_id=upload_id,
                source_url=source_url,
                skip_invalid=request.skip_invalid,
                wanted_format=wanted_format(request.format),
            )
            if dataset is None:  # the same request came twice at once, and the other one won
                known = await sql.get_requested_dataset(conn, project_id, request.request_id)
                assert known is not None
                return dataset_message(known)
            await append_dataset_event(conn, dataset, "created")
        await self._wake()
        return dataset_message(dataset)

    async def GetDataset(
        self, request: dataset_pb2.GetDatasetRequest, context: Any
    ) -> dataset_pb2.Dataset:
        """Reads a dataset."""
        async with self._db.connection() as conn:
            return dataset_message(await _get(conn, request.name))

    async def ListDatasets(
        self, request: dataset_pb2.ListDatasetsRequest, context: Any
    ) -> dataset_pb2.ListDatasetsResponse:
        """Reads a page of datasets, newest first."""
        await self._projects.check(request.parent)
        query = f"datasets of {request.parent}"
        key = decode_token(request.page_token, query)
        size = page_size(request.page_size)
        async with self._db.connection() as conn:
            datasets = await sql.list_datasets(
                conn, project_of(request.parent), str(key[0]) if key else None, size + 1
            )
        page = datasets[:size]
        return dataset_pb2.ListDatasetsResponse(
            datasets=[dataset_message(dataset) for dataset in page],
            next_page_token=encode_token(query, page[-1].id) if len(datasets) > size else "",
        )

    async def GetDatasetStatistics(
        self, request: dataset_pb2.GetDatasetStatisticsRequest, context: Any
    ) -> dataset_pb2.DatasetStatistics:
        """Reads what was counted in a dataset."""
        return await self._statistics.get(request.name.removesuffix("/statistics"))

    async def _read_statistics(self, name: str) -> dataset_pb2.DatasetStatistics:
        async with self._db.connection() as conn:
            dataset = await _get(conn, name)
        return await statistics_of(self._db, dataset)

    async def ListImportProblems(
        self, request: dataset_pb2.ListImportProblemsRequest, context: Any
    ) -> dataset_pb2.ListImportProblemsResponse:
        """Reads a page of what was wrong with an import, by place."""
        query = f"problems of {request.parent}"
        key = decode_token(request.page_token, query, int)
        size = page_size(request.page_size)
        async with self._db.connection() as conn:
            dataset = await _get(conn, request.parent)
            after = int(key[0]) if key else -1
            found = await list_problems(conn, dataset.id, after, size + 1)
        page = found[:size]
        return dataset_pb2.ListImportProblemsResponse(
            problems=[problem_message(problem) for _, problem in page],
            next_page_token=encode_token(query, page[-1][0]) if len(found) > size else "",
            num_total=dataset.num_problems,
        )

    async def DownloadDataset(
        self, request: dataset_pb2.DownloadDatasetRequest, context: Any
    ) -> AsyncIterator[HttpBody]:
        """Packs a dataset while it is sent."""
        async with self._db.connection() as conn:
            dataset = await _get(conn, request.name)
        packer = open_download(self._db, self._store, dataset, wanted_format(request.format))
        content_type = "application/zip"
        async with contextlib.aclosing(packer.chunks()) as chunks:
            async for chunk in chunks:
                yield HttpBody(content_type=content_type, data=chunk)
                content_type = ""  # said once

    async def DeleteDataset(
        self, request: dataset_pb2.DeleteDatasetRequest, context: Any
    ) -> dataset_pb2.DeleteDatasetResponse:
        """Deletes a dataset that no version uses."""
        async with self._db.transaction() as conn:
            dataset = await sql.delete_dataset(
                conn, project_of(request.name), last_segment(request.name)
            )
            await append_dataset_event(conn, dataset, "deleted")
        log.info("dataset deleted", dataset=request.name)
        return dataset_pb2.DeleteDatasetResponse()

    async def WatchDataset(
        self, request: dataset_pb2.WatchDatasetRequest, context: Any
    ) -> AsyncIterator[dataset_pb2.WatchDatasetResponse]:
        """Watches an import until it is over."""
        dataset_id = last_segment(request.name)

        async def snapshot() -> Snapshot[dataset_pb2.Dataset]:
            async with self._db.transaction(isolation="repeatable_read") as conn:
                dataset = await _get(conn, request.name)
                seqs = await outbox.last_seqs(conn, [f"dataset.{dataset_id}"])
            return Snapshot(dataset_message(dataset), seqs)

        if request.cursor:  # a cursor does not carry the right to see another project's dataset
            await snapshot()
        items = self._watcher.follow(
            subjects=[f"detflow.v1.dataset.{dataset_id}.>"],
            cursor=request.cursor,
            snapshot=snapshot,
            progress_subject=f"detflow.progress.dataset.{dataset_id}",
        )
        async with contextlib.aclosing(items):
            async for item in items:
                response = dataset_pb2.WatchDatasetResponse(cursor=item.cursor)
                if isinstance(item, Snapshot):
                    response.dataset.CopyFrom(item.value)
                elif isinstance(item, Change):
                    response.dataset.CopyFrom(item.event.dataset)
                elif isinstance(item, Gauge):
                    response.progress.CopyFrom(common_pb2.Progress.FromString(item.payload))
                else:
                    response.heartbeat.SetInParent()
                yield response
                deleted = isinstance(item, Change) and item.what == "deleted"
                if deleted or (
                    response.HasField("dataset") and response.dataset.state in _FINAL_DATASET
                ):
                    return


async def _get(conn: Connection, name: str) -> Dataset:
    return await sql.get_dataset(conn, project_of(name), last_segment(name))


async def _received(conn: Connection, project_id: str, name: str) -> Upload:
    """Reads an upload to be imported; it stays until the transaction ends.

    Raises:
        NotFound: There is none in this project.
        FailedPrecondition: UPLOAD_INCOMPLETE.
    """
    if project_of(name) != project_id:
        raise not_found(name, "; upload it again")
    upload = await upload_store.get_upload(conn, project_id, last_segment(name), lock=True)
    if upload.state is not UploadState.RECEIVED:
        raise FailedPrecondition(
            f"{name} has {upload.committed_bytes} of {upload.size_bytes} bytes; go on with it at"
            f" {upload.committed_bytes}",
            reason="UPLOAD_INCOMPLETE",
            metadata={"committed_bytes": str(upload.committed_bytes)},
        )
    return upload
