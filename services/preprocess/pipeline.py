"""Preprocessing: from a READY dataset and a recipe to a bundle.

A shard is the unit of work. Each finished shard is recorded with its hash under the claim of the
process that made it, so that after a kill another process goes on with the shards that are missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from google.protobuf import json_format

from detflow import telemetry
from detflow.errors import DetflowError, Unavailable, failure
from detflow.events import Bus
from detflow.names import last_segment, new_id, project_of
from detflow.postgres import Database
from detflow.scratch import Scratch
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.preprocess_pb2 import LeakReport
from detflow.v1.version_pb2 import Recipe
from services.preprocess import bundle_store as sql
from services.preprocess import store as dataset_sql
from services.preprocess.bundle import (
    GroundTruth,
    ShardJob,
    ShardPlan,
    StoredShard,
    make_shard,
    plan_shards,
    render_manifest,
)
from services.preprocess.domain import (
    SPLITS,
    Dataset,
    Image,
    Preprocessing,
)
from services.preprocess.events import append_state
from services.preprocess.garbage_store import lock_object
from services.preprocess.leaks import plan_split
from services.preprocess.leases import Claimed, ClaimLost, WorkLoop
from services.preprocess.messages import num_copies, transform_of
from services.preprocess.outlines import Outlines
from services.preprocess.progress import ProgressReporter
from services.preprocess.quota import StorageQuota, check_quota
from services.preprocess.report_store import insert_leak_report, list_outlines

log = telemetry.get_logger(__name__)

_IMAGES_AT_ONCE = 1000


class ShardPool(Protocol):
    """Where shards are made: `WorkerPool` or `RayPool`."""

    def map(
        self, work: Callable[[ShardJob], StoredShard], jobs: AsyncIterator[ShardJob]
    ) -> AsyncGenerator[tuple[ShardJob, StoredShard], None]:
        """Runs jobs side by side; yields each with its result as it is done, in any order."""


class Pipeline:
    """Makes bundles one after the other; several processes may do so side by side."""

    def __init__(
        self,
        *,
        db: Database,
        bus: Bus,
        store: ObjectStore,
        pool: ShardPool,
        scratch: Scratch,
        quota: StorageQuota,
    ) -> None:
        self._quota = quota
        self._db = db
        self._bus = bus
        self._store = store
        self._pool = pool
        self._scratch = scratch
        self.loop = WorkLoop("pipeline", self.step)

    async def step(self) -> bool:
        """Makes the next bundle; False if there is none to make."""
        claim = new_id()
        async with self._db.transaction() as conn:
            claimed = await sql.claim_preprocessing(conn, claim)
            if claimed is None:
                return False
            preprocessing, changed = claimed
            if changed:
                await append_state(conn, preprocessing)
        log.info("preprocessing begins", version=preprocessing.version_name)
        folder = self._scratch.folder(claim)
        work = self._claimed(preprocessing, claim)
        try:
            await work.carry_out(self._make(preprocessing, claim, folder))
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return True

    def _claimed(self, preprocessing: Preprocessing, claim: str) -> Claimed:
        version_id = preprocessing.version_id

        async def renew() -> bool:
            async with self._db.connection() as conn:
                return await sql.renew_preprocessing(conn, version_id, claim)

        async def release(failed: bool, delay_seconds: float) -> None:
            async with self._db.connection() as conn:
                await sql.release_preprocessing(
                    conn, version_id, claim, failed=failed, delay_seconds=delay_seconds
                )

        async def fail(error: DetflowError) -> None:
            why = failure(error).SerializeToString(deterministic=True)
            async with self._db.transaction() as conn:
                failed = await sql.fail_preprocessing(conn, version_id, claim, why)
                if failed is not None:
                    await append_state(conn, failed)

        return Claimed(
            what="preprocessing",
            name=preprocessing.version_name,
            num_failures=preprocessing.num_failures,
            renew=renew,
            release=release,
            fail=fail,
        )

    async def _make(self, preprocessing: Preprocessing, claim: str, folder: Path) -> None:
        """Makes the missing shards, the ground truth and the manifest."""
        progress = ProgressReporter(
            self._bus, f"detflow.progress.preprocessing.{preprocessing.version_id}"
        )
        await progress.update("plan")
        recipe = Recipe.FromString(preprocessing.recipe)
        async with self._db.transaction() as conn:
            dataset = await dataset_sql.get_ready_dataset(
                conn, project_of(preprocessing.version_name), preprocessing.dataset_id
            )
            outlines = await list_outlines(conn, dataset.id)
            recorded = await sql.list_shards(conn, preprocessing.version_id)
        assigned, plans, report = await asyncio.to_thread(_plan, outlines, dataset, recipe)
        done = await asyncio.to_thread(self._still_there, recorded, plans, recipe)
        num_total = sum(len(p.sources) * num_copies(recipe, p.split) for p in plans)
        num_done = sum(shard.num_images for shard in done.values())

        async def jobs() -> AsyncIterator[ShardJob]:
            for plan in plans:
                if (plan.split, plan.position) not in done:
                    yield await self._job(dataset, plan, recipe, folder)

        await progress.update("transform", num_done, num_total)
        async with aclosing(self._pool.map(make_shard, jobs())) as results:
            async for job, shard in results:
                await self._record(preprocessing.version_name, claim, job.plan, shard)
                done[job.plan.split, job.plan.position] = shard
                num_done += shard.num_images
                await progress.update("transform", num_done, num_total)

        splits = {
            split: await self._describe(dataset, split, assigned[split], recipe, done, folder)
            for split in SPLITS
        }
        for described in splits.values():
            await self._use(preprocessing.version_id, claim, described["ground_truth"]["key"])
        await self._complete(preprocessing, claim, dataset, recipe, splits, report)

    def _still_there(
        self,
        recorded: Mapping[tuple[str, int], StoredShard],
        plans: Sequence[ShardPlan],
        recipe: Recipe,
    ) -> dict[tuple[str, int], StoredShard]:
        """Keeps the recorded shards that fit the plan and are in the object store."""
        kept = {}
        for plan in plans:
            shard = recorded.get((plan.split, plan.position))
            expected = len(plan.sources) * num_copies(recipe, plan.split)
            if shard and shard.num_images == expected and self._store.exists(shard.key):
                kept[plan.split, plan.position] = shard
        return kept

    async def _job(
        self, dataset: Dataset, plan: ShardPlan, recipe: Recipe, folder: Path
    ) -> ShardJob:
        async with self._db.connection() as conn:
            sources = await dataset_sql.list_images(conn, dataset.id, plan.sources)
        return ShardJob(
            plan=plan,
            store_url=self._store.url,
            scratch=folder,
            first_image_id=plan.first * num_copies(recipe, plan.split) + 1,
            sources=tuple(sources),
            transform=transform_of(recipe, plan.split),
        )

    async def _record(
        self, version_name: str, claim: str, plan: ShardPlan, shard: StoredShard
    ) -> None:
        project_id = project_of(version_name)
        limit = await self._quota.limit(project_id)
        async with self._db.transaction() as conn:
            await lock_object(conn, shard.key)
            if not await sql.insert_shard(
                conn,
                version_id=last_segment(version_name),
                claim=claim,
                split=plan.split,
                position=plan.position,
                shard=shard,
            ):
                raise ClaimLost
            await check_quota(conn, project_id, limit)
        await self._check_there(shard.key)

    async def _use(self, version_id: str, claim: str, key: str) -> None:
        """Notes that a version uses an object that is no shard."""
        async with self._db.transaction() as conn:
            await lock_object(conn, key)
            if not await sql.insert_bundle_object(
                conn, version_id=version_id, claim=claim, key=key
            ):
                raise ClaimLost
        await self._check_there(key)

    async def _check_there(self, key: str) -> None:
        """Checks an object whose use was noted just now.

        Raises:
            Unavailable: It was there already and went with the last version that used it.
        """
        if not await asyncio.to_thread(self._store.exists, key):
            raise Unavailable(f"{key} was deleted with a purged version; it is made again")

    async def _describe(
        self,
        dataset: Dataset,
        split: str,
        positions: Sequence[int],
        recipe: Recipe,
        shards: Mapping[tuple[str, int], StoredShard],
        folder: Path,
    ) -> dict[str, Any]:
        """Stores the ground truth of a split and returns its part of the manifest."""
        truth = GroundTruth(folder / f"{split}-images", folder / f"{split}-annotations")
        transform = transform_of(recipe, split)
        for start in range(0, len(positions), _IMAGES_AT_ONCE):
            batch = positions[start : start + _IMAGES_AT_ONCE]
            async with self._db.connection() as conn:
                sources: list[Image] = await dataset_sql.list_images(conn, dataset.id, batch)
            await asyncio.to_thread(truth.extend, sources, transform)
        path = folder / f"{split}.json"
        await asyncio.to_thread(truth.finish, dataset.class_names, path)
        stored = await asyncio.to_thread(self._put, "bundles/ground-truth", path)
        return {
            "num_images": truth.num_images,
            "num_boxes": truth.num_boxes,
            "shards": [
                {
                    "key": shard.key,
                    "size_bytes": shard.size_bytes,
                    "sha256": shard.sha256,
                    "num_images": shard.num_images,
                }
                for (name, _), shard in sorted(shards.items())
                if name == split
            ],
            "ground_truth": {
                "key": stored.key,
                "size_bytes": stored.size_bytes,
                "sha256": stored.sha256,
            },
        }

    def _put(self, folder: str, path: Path) -> StoredObject:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._store.put_if_absent(f"{folder}/{sha256}.json", path)

    async def _complete(
        self,
        preprocessing: Preprocessing,
        claim: str,
        dataset: Dataset,
        recipe: Recipe,
        splits: dict[str, dict[str, Any]],
        report: LeakReport,
    ) -> None:
        manifest = render_manifest(
            dataset_sha256=dataset.content_sha256,
            recipe=json_format.MessageToDict(recipe, always_print_fields_with_no_presence=True),
            class_names=dataset.class_names,
            splits=splits,
        )
        key = f"bundles/manifests/{hashlib.sha256(manifest).hexdigest()}.json"
        stored = await asyncio.to_thread(self._store.put_if_absent, key, manifest)
        await self._use(preprocessing.version_id, claim, key)
        async with self._db.transaction() as conn:
            succeeded = await sql.complete_preprocessing(
                conn,
                version_id=preprocessing.version_id,
                claim=claim,
                num_images=[splits[split]["num_images"] for split in SPLITS],
                manifest=stored,
            )
            if succeeded is None:
                raise ClaimLost
            await insert_leak_report(conn, preprocessing.version_id, report)
            await append_state(conn, succeeded)
        log.info("preprocessing succeeded", version=preprocessing.version_name)


def _plan(
    images: Outlines, dataset: Dataset, recipe: Recipe
) -> tuple[dict[str, tuple[int, ...]], list[ShardPlan], LeakReport]:
    """Assigns the images to splits and the images of each split to shards.

    Raises:
        FailedPrecondition: TOO_FEW_IMAGES or TOO_FEW_GROUPS.
    """
    planned = plan_split(images, recipe, len(dataset.class_names))
    assigned = planned.positions()
    # Small images may be enlarged: a JPEG takes about half a byte per pixel.
    size = recipe.exact_size
    size_bytes = np.maximum(images.size_bytes, size.width_px * size.height_px // 2)
    plans = [
        plan
        for name, positions in assigned.items()
        for plan in plan_shards(
            name, positions, size_bytes[list(positions)].tolist(), num_copies(recipe, name)
        )
    ]
    return assigned, plans, planned.report
