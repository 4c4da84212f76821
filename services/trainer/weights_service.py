"""The gRPC servicer of uploaded weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from detflow import telemetry
from detflow.errors import (
    Aborted,
    Internal,
    InvalidArgument,
    Unavailable,
)
from detflow.names import check_display_name, new_id, project_of
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Database
from detflow.projects import Projects
from detflow.scratch import Scratch
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.uploads import MAX_WEIGHTS_BYTES, full_disk_refused, receive, weights_too_large
from detflow.v1 import weights_pb2, weights_pb2_grpc
from detflow.v1.worker_pb2 import InspectJob, JobSpec
from services.trainer import weights as sql
from services.trainer.jobs import run_job
from services.trainer.trials import RunJob
from services.trainer.weights import to_message

log = telemetry.get_logger(__name__)

_DEFAULT_NAME = "weights"


class WeightsService(weights_pb2_grpc.WeightsServiceServicer):
    """Weights that users upload to begin trainings with.

    Args:
        db: Database of the service.
        objects: Object store.
        scratch: Where uploads are collected.
        projects: The projects there are.
        settings: Limit of uploads; for the jobs that look into them.
        run: Runs those.
    """

    def __init__(
        self,
        *,
        db: Database,
        objects: ObjectStore,
        scratch: Scratch,
        projects: Projects,
        settings: Settings,
        run: RunJob = run_job,
    ) -> None:
        self._db = db
        self._objects = objects
        self._scratch = scratch
        self._projects = projects
        self._settings = settings
        self._max_bytes = min(settings.max_upload_bytes, MAX_WEIGHTS_BYTES)
        self._run = run
        self._looking = asyncio.Lock()  # each look may take gigabytes of memory

    async def UploadWeights(
        self, request_iterator: AsyncIterator[weights_pb2.UploadWeightsRequest], context: object
    ) -> weights_pb2.Weights:
        """Receives a file, looks into it in a sandbox and stores it."""
        weights_id = new_id()
        path = self._scratch.path / f"weights-{weights_id}"
        try:
            with full_disk_refused():
                header = await self._receive(request_iterator, path)
                found = await self._inspect(path)
                found.display_name = header.display_name or _DEFAULT_NAME
                async with self._db.transaction() as conn:
                    await sql.insert_weights(
                        conn, weights_id=weights_id, project=project_of(header.parent), found=found
                    )
                key = sql.object_key(weights_id)
                stored = await asyncio.to_thread(self._objects.put, key, path)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        async with self._db.transaction() as conn:
            weights = await sql.update_stored(conn, weights_id, stored)
        log.info("weights received", weights=weights.name, size_bytes=stored.size_bytes)
        return to_message(weights)

    async def _receive(
        self, requests: AsyncIterator[weights_pb2.UploadWeightsRequest], path: Path
    ) -> weights_pb2.UploadWeightsHeader:
        """Writes the chunks of an upload to a file; returns what came first."""
        header = weights_pb2.UploadWeightsHeader()

        async def opened(request: weights_pb2.UploadWeightsRequest) -> None:
            header.CopyFrom(request.header)
            if header.display_name:
                check_display_name(header.display_name, "header.display_name")
            await self._projects.check(header.parent)

        await receive(
            requests,
            path,
            opening="header",
            opened=opened,
            max_bytes=self._max_bytes,
            too_large=weights_too_large(self._max_bytes),
            noun="file",
        )
        return header

    async def _inspect(self, path: Path) -> weights_pb2.Weights:
        """Looks into a file in a sandbox.

        Raises:
            InvalidArgument: UNSAFE_WEIGHTS, it is no file of weights.
            ResourceExhausted: Looking into it takes too much memory.
        """
        spec = JobSpec(inspect=InspectJob(path=str(path)))
        try:
            async with self._looking:
                message = await self._run(spec, settings=self._settings, sandbox=True)
        except Aborted as error:
            raise InvalidArgument(
                "the process that looked into the file was ended by it; upload a file that holds"
                " nothing but tensors, such as a state_dict saved with torch.save or safetensors",
                reason="UNSAFE_WEIGHTS",
            ) from error
        except OSError as error:
            raise Unavailable(
                "the process that looks into the file could not be started; try again",
                reason="JOB_NOT_STARTED",
            ) from error
        if not message.HasField("weights"):
            raise Internal("the inspect job answered something else", reason="JOB_BROKEN")
        return message.weights

    async def GetWeights(
        self, request: weights_pb2.GetWeightsRequest, context: object
    ) -> weights_pb2.Weights:
        """Reads weights' description."""
        async with self._db.connection() as conn:
            return to_message(await sql.get_weights(conn, request.name))

    async def ListWeights(
        self, request: weights_pb2.ListWeightsRequest, context: object
    ) -> weights_pb2.ListWeightsResponse:
        """Reads a page of a project's weights, newest first."""
        await self._projects.check(request.parent)
        query = f"weights of {request.parent}"
        key = decode_token(request.page_token, query)
        size = page_size(request.page_size)
        async with self._db.connection() as conn:
            found = await sql.list_weights(
                conn,
                project=project_of(request.parent),
                before=str(key[0]) if key else None,
                limit=size + 1,
            )
        page = found[:size]
        return weights_pb2.ListWeightsResponse(
            weights=[to_message(weights) for weights in page],
            next_page_token=encode_token(query, page[-1].id) if len(found) > size else "",
        )

    async def DeleteWeights(
        self, request: weights_pb2.DeleteWeightsRequest, context: object
    ) -> weights_pb2.DeleteWeightsResponse:
        """Deletes weights that no training is still to take over."""
        async with self._db.transaction() as conn:
            await sql.delete_weights(conn, request.name)
        log.info("weights deleted", weights=request.name)
        return weights_pb2.DeleteWeightsResponse()
