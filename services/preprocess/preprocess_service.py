"""The gRPC servicer of preprocessings."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from detflow import outbox
from detflow.errors import FailedPrecondition, NotFound, not_found
from detflow.names import last_segment, new_id, project_of
from detflow.postgres import Database
from detflow.scratch import Scratch
from detflow.store import ObjectStore
from detflow.tasks import Bell, wait
from detflow.v1 import common_pb2, preprocess_pb2, preprocess_pb2_grpc
from detflow.watch import Change, Gauge, Snapshot, Watcher
from services.preprocess import bundle_store
from services.preprocess import store as sql
from services.preprocess.domain import Preprocessing, PreprocessingState, Reason
from services.preprocess.messages import preprocessing_message
from services.preprocess.pool import WorkerPool
from services.preprocess.preview import preview
from services.preprocess.quota import StorageQuota, get_usage
from services.preprocess.replay import replay
from services.preprocess.report_store import get_leak_report

_FINAL_PREPROCESSING = (
    preprocess_pb2.Preprocessing.SUCCEEDED,
    preprocess_pb2.Preprocessing.FAILED,
    preprocess_pb2.Preprocessing.CANCELLED,
)
_PATIENCE_SECONDS = 1.5
_LOOK_AGAIN_SECONDS = 0.2


class PreprocessService(preprocess_pb2_grpc.PreprocessServiceServicer):
    """The making of bundles: preview, read, watch, replay.

    Args:
        db: Database of the service.
        store: Object store.
        pool: Processes that decode images.
        scratch: Where what is read for a replay lies meanwhile.
        quota: Says what projects may store.
        watcher: Fan-out of events.
        created: Rung when a preprocessing was recorded.
    """

    def __init__(
        self,
        *,
        db: Database,
        store: ObjectStore,
        pool: WorkerPool,
        scratch: Scratch,
        quota: StorageQuota,
        watcher: Watcher,
        created: Bell,
    ) -> None:
        self._db = db
        self._store = store
        self._pool = pool
        self._scratch = scratch
        self._watcher = watcher
        self._created = created
        self._quota = quota

    async def GetStorageUsage(
        self, request: preprocess_pb2.GetStorageUsageRequest, context: Any
    ) -> preprocess_pb2.StorageUsage:
        """Reads how much of its quota a project has used."""
        project_id = project_of(request.name)
        limit = await self._quota.limit(project_id)
        async with self._db.connection() as conn:
            usage = await get_usage(conn, project_id)
        return preprocess_pb2.StorageUsage(
            name=request.name,
            upload_bytes=usage.upload_bytes,
            dataset_bytes=usage.dataset_bytes,
            bundle_bytes=usage.bundle_bytes,
            max_storage_bytes=limit,
        )

    async def PreviewVersion(
        self, request: preprocess_pb2.PreviewVersionRequest, context: Any
    ) -> preprocess_pb2.PreviewVersionResponse:
        """Shows what a recipe would make of a dataset."""
        if project_of(request.dataset) != project_of(request.parent):
            raise not_found(request.dataset)
        return await preview(self._db, self._pool, self._store.url, request)

    async def GetPreprocessing(
        self, request: preprocess_pb2.GetPreprocessingRequest, context: Any
    ) -> preprocess_pb2.Preprocessing:
        """Reads the preprocessing of a version."""
        preprocessing, _ = await self._get_patiently(request.version)
        return preprocessing_message(preprocessing)

    async def WatchPreprocessing(
        self, request: preprocess_pb2.WatchPreprocessingRequest, context: Any
    ) -> AsyncIterator[preprocess_pb2.WatchPreprocessingResponse]:
        """Watches a preprocessing until it is over."""
        version_id = last_segment(request.version)

        async def snapshot() -> Snapshot[preprocess_pb2.Preprocessing]:
            preprocessing, seqs = await self._get_patiently(request.version)
            return Snapshot(preprocessing_message(preprocessing), seqs)

        if request.cursor:  # a cursor does not carry the right to see another project's version
            await snapshot()
        items = self._watcher.follow(
            subjects=[f"detflow.v1.preprocessing.{version_id}.>"],
            cursor=request.cursor,
            snapshot=snapshot,
            progress_subject=f"detflow.progress.preprocessing.{version_id}",
        )
        async with contextlib.aclosing(items):
            async for item in items:
                response = preprocess_pb2.WatchPreprocessingResponse(cursor=item.cursor)
                if isinstance(item, Snapshot):
                    response.preprocessing.CopyFrom(item.value)
                elif isinstance(item, Change):
                    response.preprocessing.CopyFrom(item.event.preprocessing)
                elif isinstance(item, Gauge):
                    response.progress.CopyFrom(common_pb2.Progress.FromString(item.payload))
                else:
                    response.heartbeat.SetInParent()
                yield response
                if (
                    response.HasField("preprocessing")
                    and response.preprocessing.state in _FINAL_PREPROCESSING
                ):
                    return

    async def GetLeakReport(
        self, request: preprocess_pb2.GetLeakReportRequest, context: Any
    ) -> preprocess_pb2.LeakReport:
        """Reads what the split of a version kept together."""
        preprocessing, _ = await self._get_patiently(request.name.removesuffix("/leakReport"))
        async with self._db.connection() as conn:
            report = await get_leak_report(conn, preprocessing.version_id)
        if report is None:
            done = preprocessing.state is PreprocessingState.SUCCEEDED
            raise FailedPrecondition(
                f"{preprocessing.version_name} was made before there were leak reports; create it"
                " again"
                if done
                else f"{preprocessing.version_name} has no leak report: its preprocessing is"
                f" {preprocessing.state}, not SUCCEEDED",
                reason=Reason.NO_LEAK_REPORT,
            )
        report.name = request.name
        return report

    async def DownloadReplay(
        self, request: preprocess_pb2.DownloadReplayRequest, context: Any
    ) -> AsyncIterator[HttpBody]:
        """Says how to make a version again, while it is read."""
        async with self._db.connection() as conn:
            preprocessing = await bundle_store.get_preprocessing(conn, request.name)
            project_id = project_of(request.name)
            try:
                dataset = await sql.get_dataset(conn, project_id, preprocessing.dataset_id)
            except NotFound:
                dataset = None
        folder = self._scratch.folder(new_id())
        content_type = "application/json"
        try:
            async for chunk in replay(self._store, folder, preprocessing, dataset):
                yield HttpBody(content_type=content_type, data=chunk)
                content_type = ""  # said once
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _get_patiently(self, version_name: str) -> tuple[Preprocessing, dict[str, int]]:
        """Reads a preprocessing, which may lag behind its version by an event's travel time."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            heard = self._created.listen()
            try:
                async with self._db.transaction(isolation="repeatable_read") as conn:
                    preprocessing = await bundle_store.get_preprocessing(conn, version_name)
                    resource = f"preprocessing.{preprocessing.version_id}"
                    return preprocessing, await outbox.last_seqs(conn, [resource])
            except NotFound:
                if time.monotonic() > deadline:
                    raise
            await wait(heard, _LOOK_AGAIN_SECONDS)
