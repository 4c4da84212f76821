"""The gRPC servicer of exports: checks, calls, converts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator

from google.api.httpbody_pb2 import HttpBody

from detflow import outbox
from detflow.errors import DataLoss, FailedPrecondition, not_found
from detflow.names import last_segment, new_id
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Connection, Database
from detflow.store import ObjectStore
from detflow.v1 import export_pb2, export_pb2_grpc
from detflow.v1.common_pb2 import Heartbeat, StoredObject
from detflow.watch import Beat, Change, Gauge, Snapshot, Watcher
from services.trainer import exports, store, versions
from services.trainer.domain import Training
from services.trainer.export_domain import (
    FINAL,
    Export,
    State,
    check_installed,
    file_name,
    resolve,
)

_CHUNK_BYTES = 1 << 20
_CONTENT_TYPES = {".zip": "application/zip", ".onnx": "application/octet-stream"}


class ExportService(export_pb2_grpc.ExportServiceServicer):
    """Exports of trained models; `exporter.Exporter` makes them."""

    def __init__(self, db: Database, watcher: Watcher, objects: ObjectStore) -> None:
        self._db = db
        self._watcher = watcher
        self._objects = objects

    async def CreateExport(
        self, request: export_pb2.CreateExportRequest, context: object
    ) -> export_pb2.Export:
        """Queues an export of a training."""
        async with self._db.transaction() as conn:
            training = await store.find_training(conn, request.parent)
            known = await exports.get_by_request(conn, training.id, request.request_id)
            if known is not None:
                return exports.to_message(known)
            await _check_exportable(conn, training)
            options = resolve(
                request.export,
                model=training.model,
                image_size_px=int(training.hyperparameters["image_size"]),
            )
            check_installed(options)
            export = await exports.insert_export(
                conn,
                export_id=new_id(),
                training_id=training.id,
                training=training.name,
                request_id=request.request_id,
                options=options,
                file_name=file_name(options, model=training.model, training_id=training.id),
            ) or await exports.get_by_request(conn, training.id, request.request_id)
            assert export is not None  # inserted just now, here or by the same request elsewhere
            return exports.to_message(export)

    async def GetExport(
        self, request: export_pb2.GetExportRequest, context: object
    ) -> export_pb2.Export:
        """Reads one export."""
        async with self._db.connection() as conn:
            return exports.to_message(await _find(conn, request.name))

    async def ListExports(
        self, request: export_pb2.ListExportsRequest, context: object
    ) -> export_pb2.ListExportsResponse:
        """Reads a page of exports, newest first."""
        query = f"ListExports {request.parent}"
        key = decode_token(request.page_token, query)
        size = page_size(request.page_size)
        async with self._db.connection() as conn:
            training = await store.find_training(conn, request.parent)
            found = await exports.list_exports(
                conn,
                training_id=training.id,
                before=str(key[0]) if key else None,
                limit=size + 1,
            )
        page = found[:size]
        more = len(found) > size
        return export_pb2.ListExportsResponse(
            exports=[exports.to_message(export) for export in page],
            next_page_token=encode_token(query, page[-1].id) if more else "",
        )

    async def CancelExport(
        self, request: export_pb2.CancelExportRequest, context: object
    ) -> export_pb2.Export:
        """Cancels an export; one that is cancelled already stays so."""
        async with self._db.transaction() as conn:
            export = await _find(conn, request.name, lock=True)
            if export.state in (State.SUCCEEDED, State.FAILED):
                raise FailedPrecondition(
                    f"{export.name} is {export.state} and cannot be cancelled; delete it to be "
                    "rid of it",
                    reason="EXPORT_FINISHED",
                    metadata={"state": export.state},
                )
            return exports.to_message(await exports.cancel_export(conn, export.id) or export)

    async def DeleteExport(
        self, request: export_pb2.DeleteExportRequest, context: object
    ) -> export_pb2.DeleteExportResponse:
        """Deletes an export; the exporter removes its objects."""
        async with self._db.transaction() as conn:
            export = await _find(conn, request.name, lock=True)
            if export.state not in FINAL:
                await exports.cancel_export(conn, export.id)
            await exports.update_deleted(conn, export.id)
        return export_pb2.DeleteExportResponse()

    async def WatchExport(
        self, request: export_pb2.WatchExportRequest, context: object
    ) -> AsyncIterator[export_pb2.WatchExportResponse]:
        """Streams an export until it has ended."""
        async with self._db.connection() as conn:
            current = await _find(conn, request.name)

        async def snapshot() -> Snapshot[Export]:
            async with self._db.transaction(isolation="repeatable_read") as conn:
                export = await _find(conn, request.name)
                seqs = await outbox.last_seqs(conn, [f"export.{export.id}"])
            return Snapshot(export, seqs)

        items = self._watcher.follow(
            subjects=[f"detflow.v1.export.{current.id}.*"],
            cursor=request.cursor,
            snapshot=snapshot,
            progress_subject=f"detflow.progress.export.{current.id}",
        )
        async with contextlib.aclosing(items):
            async for item in items:
                response = export_pb2.WatchExportResponse(cursor=item.cursor)
                if isinstance(item, Snapshot):
                    response.export.CopyFrom(exports.to_message(item.value))
                elif isinstance(item, Change):
                    response.export.CopyFrom(item.event.export)
                elif isinstance(item, Gauge):
                    response.progress.ParseFromString(item.payload)
                else:
                    response.heartbeat.CopyFrom(Heartbeat())
                yield response
                if _is_final(response) or (
                    isinstance(item, Beat) and await self._ended_long_ago(current.id)
                ):
                    return

    async def DownloadExport(
        self, request: export_pb2.DownloadExportRequest, context: object
    ) -> AsyncIterator[HttpBody]:
        """Streams the file; the last chunk only if all of it is what was stored."""
        async with self._db.connection() as conn:
            export = await _find(conn, request.name)
        if export.object is None:
            raise FailedPrecondition(
                f"{export.name} is {export.state} and has no file; "
                + ("wait for it" if export.state not in FINAL else "export again"),
                reason="EXPORT_HAS_NO_FILE",
                metadata={"state": export.state},
            )
        content_type = _CONTENT_TYPES[export.file_name[export.file_name.rindex(".") :]]
        async for chunk in _read(self._objects, export.object):
            yield HttpBody(content_type=content_type, data=chunk)
            content_type = ""  # said once

    async def _ended_long_ago(self, export_id: str) -> bool:
        """Says whether a watch that began with the cursor of the final state gets nothing more."""
        async with self._db.connection() as conn:
            return await exports.ended_before(conn, export_id, seconds=10)


async def _read(objects: ObjectStore, stored: StoredObject) -> AsyncIterator[bytes]:
    """Reads an object in chunks; the last comes only if its hash is the recorded one.

    Raises:
        DataLoss: It is gone, shorter, or differs.
    """
    digest = hashlib.sha256()
    start = 0
    while start < stored.size_bytes:
        length = min(_CHUNK_BYTES, stored.size_bytes - start)
        chunk = await asyncio.to_thread(objects.get_range, stored.key, start, length)
        digest.update(chunk)
        start += length
        if start == stored.size_bytes and digest.hexdigest() != stored.sha256:
            raise DataLoss(
                f"stored object {stored.key} has SHA-256 {digest.hexdigest()}; recorded: "
                f"{stored.sha256}; delete this export and export again",
                reason="OBJECT_LOST",
                metadata={"key": stored.key},
            )
        yield chunk


async def _find(conn: Connection, name: str, *, lock: bool = False) -> Export:
    """Reads an export by its name.

    Raises:
        NotFound: There is none, or not in that training.
    """
    export = await exports.get_export(conn, last_segment(name), lock=lock)
    if export is None or export.name != name:
        raise not_found(name)
    return export


async def _check_exportable(conn: Connection, training: Training) -> None:
    """Checks that a training can be exported.

    Raises:
        FailedPrecondition: TRAINING_HAS_NO_WEIGHTS, VERSION_DELETED.
    """
    if training.weights is None:
        raise FailedPrecondition(
            f"{training.name} is {training.state} and has no weights to export; export a training "
            "that has come to its end",
            reason="TRAINING_HAS_NO_WEIGHTS",
            metadata={"training": training.name, "state": training.state},
        )
    if await versions.is_deleted(conn, training.version):
        raise FailedPrecondition(
            f"the version of {training.name} is in the trash; undelete it first",
            reason="VERSION_DELETED",
        )


def _is_final(response: export_pb2.WatchExportResponse) -> bool:
    if not response.HasField("export"):
        return False
    return State(export_pb2.Export.State.Name(response.export.state)) in FINAL
