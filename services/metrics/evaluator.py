"""The loop that takes up predictions, has a child process measure them, and records the result.

A job is leased, so that a killed service's work is taken up again by whoever is there. The
evaluation, its event and the end of the job are committed together: each is published once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from typing import Any

from detflow import faults, outbox, telemetry
from detflow.errors import Internal, Unavailable, failure
from detflow.postgres import Database
from detflow.tasks import Bell, wait
from detflow.v1 import events_pb2
from services.metrics import garbage, store
from services.metrics.domain import Job
from services.metrics.service import to_evaluation

log = telemetry.get_logger(__name__)

LEASE_SECONDS = 5.0
MAX_TRIES = 8
_POLL_SECONDS = 1.0
_DEADLINE_SECONDS = 1800.0
_MAX_BACKOFF_SECONDS = 30.0


class Evaluator:
    """Measures what is queued, one split at a time.

    Args:
        db: Database of the service.
        store_url: Object store with predictions and bundles.
        jobs: Rung when something was queued.
    """

    def __init__(self, db: Database, store_url: str, jobs: Bell) -> None:
        self._db = db
        self._store_url = store_url
        self._jobs = jobs

    async def run(self) -> None:
        """Works forever; while the database is away it waits."""
        while True:
            heard = self._jobs.listen()
            try:
                worked = await self._work_once()
            except Unavailable as error:
                log.warning("evaluations wait for the database", error=str(error))
                worked = False
            if not worked:
                await wait(heard, _POLL_SECONDS)

    async def _work_once(self) -> bool:
        async with self._db.transaction() as conn:
            job = await store.claim_job(conn, lease=uuid.uuid4().hex, lease_seconds=LEASE_SECONDS)
            if job is not None:
                # Until the evaluation is recorded nothing else points to what the child stores.
                await garbage.mark(conn, job.matches_key, after_seconds=2 * _DEADLINE_SECONDS)
        if job is None:
            return False
        try:
            with telemetry.span("evaluate", {"traceparent": job.traceparent}):
                await self._measure(job)
        except asyncio.CancelledError:
            # We are shutting down: whoever comes next need not wait for the lease to end.
            async with self._db.transaction() as conn:
                await store.update_job_lease(conn, job, seconds=0.0)
            raise
        return True

    async def _measure(self, job: Job) -> None:
        """Has a job measured and records the result, or gives the job back to be tried again."""
        if job.num_tries > MAX_TRIES:
            # Whoever took it up before did not live to record anything.
            return await self._record(job, _gave_up("it ends the process that measures"))
        answer = await self._ask_child(job)
        if answer is None:
            return
        if answer.get("code") == "UNAVAILABLE" or "died" in answer:
            log.warning("evaluation failed", training=job.training, split=job.split, answer=answer)
            if job.num_tries < MAX_TRIES:
                backoff = min(0.5 * 2.0**job.num_tries, _MAX_BACKOFF_SECONDS)
                async with self._db.transaction() as conn:
                    await store.update_job_lease(conn, job, seconds=backoff)
                return
            if "died" in answer:
                answer = _gave_up(answer["died"])
        await self._record(job, answer)

    async def _ask_child(self, job: Job) -> dict[str, Any] | None:
        """Returns the child's answer, `died` and why, or None if the job was taken from us."""
        request = {
            "store_url": self._store_url,
            "manifest": base64.b64encode(job.manifest).decode(),
            "predictions": base64.b64encode(job.predictions).decode(),
            "split": job.split,
            "matches_key": job.matches_key,
        }
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.metrics.measure", stdin=PIPE, stdout=PIPE
        )
        assert child.stdin is not None and child.stdout is not None
        reading = asyncio.create_task(child.stdout.read())
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            with contextlib.suppress(ConnectionError):  # it is gone: reading tells
                await child.stdin.drain()
            if not await self._hold_lease(job, reading):
                log.warning("evaluation taken away", training=job.training, split=job.split)
                return None
            output = await reading
            code = await child.wait()
        except TimeoutError:
            return {"died": f"it takes longer than {_DEADLINE_SECONDS:.0f} seconds"}
        finally:
            reading.cancel()
            await _end(child)
        if code != 0:
            return {"died": f"the process that measures ended with {code}"}
        answer: dict[str, Any] = json.loads(output)
        return answer

    async def _hold_lease(self, job: Job, work: asyncio.Task[bytes]) -> bool:
        """Renews the lease until `work` is done; False if the job is not ours any more."""
        async with asyncio.timeout(_DEADLINE_SECONDS):
            while not (await asyncio.wait({work}, timeout=LEASE_SECONDS / 3))[0]:
                async with self._db.transaction() as conn:
                    if not await store.update_job_lease(conn, job, seconds=LEASE_SECONDS):
                        return False
        return True

    async def _record(self, job: Job, answer: dict[str, Any]) -> None:
        faults.point("evaluation.before_store")
        measured, failed = answer.get("measurement"), answer.get("failure")
        matches = answer.get("matches")
        async with self._db.transaction() as conn:
            # The same order of locks as when an event of the training is applied.
            await store.lock_training_by_id(conn, job.training_id)
            if not await store.delete_job(conn, job):
                return
            evaluation = await store.insert_evaluation(
                conn,
                job,
                measurement=store.measurement_from_json(measured) if measured else None,
                ground_truth_sha256=answer.get("ground_truth_sha256", ""),
                matches=base64.b64decode(matches) if matches else None,
                failure=base64.b64decode(failed) if failed else None,
            )
            if evaluation is None:
                return
            await outbox.append(
                conn,
                kind="evaluation",
                resource_id=job.training_id,
                what="completed",
                name=f"{job.training}/evaluations/{job.split}",
                event=events_pb2.Event(evaluation=to_evaluation(evaluation)),
            )
        faults.point("evaluation.after_store")
        log.info(
            "evaluated",
            training=job.training,
            split=job.split,
            attempt=job.attempt,
            failed=failed is not None,
        )


def _gave_up(why: str) -> dict[str, Any]:
    error = Internal(
        f"the predictions could not be measured in {MAX_TRIES} tries: {why};"
        " give the metrics service more memory and resume the training",
        reason="EVALUATION_KEEPS_FAILING",
    )
    encoded = base64.b64encode(failure(error).SerializeToString(deterministic=True))
    return {"failure": encoded.decode()}


async def _end(child: Process) -> None:
    """Leaves no process behind, whatever happened."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    await child.wait()
    if child.stdin is not None:
        child.stdin.close()
