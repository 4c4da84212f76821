"""Importing: from an uploaded archive to a READY dataset, or to FAILED with all that is wrong.

The work is claimed for as long as its lease is renewed. A process that dies leaves a claim that
runs out; the next one begins from scratch under another prefix of the object store, and only the
holder of the claim can complete the dataset, so nothing is doubled.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from detflow import telemetry
from detflow.errors import DataLoss, DetflowError, InvalidArgument, failure
from detflow.events import Bus
from detflow.names import new_id
from detflow.postgres import Database
from detflow.scratch import Scratch
from detflow.store import ObjectStore
from services.preprocess import store as sql
from services.preprocess.archive import ArchiveError, Entry, Limits, open_archive, read_entry
from services.preprocess.assembly import assemble_upload
from services.preprocess.checking import (
    CheckedImage,
    CheckJob,
    SampleEntry,
    check_samples,
    group_samples,
)
from services.preprocess.domain import (
    MAX_KEPT_PROBLEMS,
    MAX_PROBLEMS,
    Dataset,
    Image,
    InvalidData,
    Problem,
    ProblemList,
    Reason,
    dataset_prefix,
    describe,
    place_key,
)
from services.preprocess.events import append_dataset_event
from services.preprocess.formats import Format, Layout, find_layout
from services.preprocess.formats.layout import MAX_CLASSES
from services.preprocess.garbage import empty
from services.preprocess.garbage_store import insert_garbage_unless_used
from services.preprocess.leases import Claimed, ClaimLost, WorkLoop
from services.preprocess.messages import refusal
from services.preprocess.pool import WorkerPool
from services.preprocess.problem_store import insert_problems
from services.preprocess.progress import ProgressReporter
from services.preprocess.quota import StorageQuota, check_quota, exceeded
from services.preprocess.report_store import insert_statistics
from services.preprocess.sources import Sources
from services.preprocess.statistics import count_dataset
from services.preprocess.upload_store import delete_unused_uploads, list_parts

log = telemetry.get_logger(__name__)

_SPANS = {"download": (0.0, 20.0), "check": (20.0, 100.0)}
"""Percent of an import at the beginning and the end of its stages."""

_ALWAYS_FATAL = frozenset({Reason.ARCHIVE_LIMIT, Reason.CORRUPT_ARCHIVE})
"""Problems of the archive as such; skip_invalid does not leave these out."""

_SKIP_HINT = "; or import with skip_invalid to leave out what is wrong"


@dataclass(slots=True)
class Findings:
    """What an import found wrong so far, and what it only warns of."""

    wrong: ProblemList = field(default_factory=ProblemList)
    warnings: ProblemList = field(default_factory=ProblemList)

    @property
    def total(self) -> int:
        """How many there are."""
        return self.wrong.total + self.warnings.total

    def add(self, problems: Sequence[Problem]) -> None:
        """Adds problems and warnings."""
        self.wrong.add(p for p in problems if p.num_left_out)
        self.warnings.add(p for p in problems if not p.num_left_out)

    def by_place(self) -> list[Problem]:
        """Returns at most a million in the order of their places."""
        kept = [*self.wrong.kept, *self.warnings.kept][:MAX_KEPT_PROBLEMS]
        return sorted(kept, key=lambda p: place_key(p.where))


class Importer:
    """Imports datasets one after the other; several processes may do so side by side."""

    def __init__(
        self,
        *,
        db: Database,
        bus: Bus,
        store: ObjectStore,
        pool: WorkerPool,
        scratch: Scratch,
        sources: Sources,
        quota: StorageQuota,
        limits: Limits,
    ) -> None:
        self._quota = quota
        self._db = db
        self._bus = bus
        self._store = store
        self._pool = pool
        self._scratch = scratch
        self._sources = sources
        self._limits = limits
        self.loop = WorkLoop("importer", self.step)

    async def step(self) -> bool:
        """Imports the next dataset; False if there is none to import."""
        claim = new_id()
        async with self._db.transaction() as conn:
            dataset = await sql.claim_dataset(conn, claim)
        if dataset is None:
            return False
        log.info("import begins", dataset=dataset.name)
        folder = self._scratch.folder(claim)
        found = Findings()
        work = self._claimed(dataset, claim, found)
        try:
            await work.carry_out(self._read(dataset, claim, folder, found))
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            await self._discard(dataset, claim)
        return True

    def _claimed(self, dataset: Dataset, claim: str, found: Findings) -> Claimed:
        async def renew() -> bool:
            async with self._db.connection() as conn:
                return await sql.renew_dataset(conn, dataset.id, claim)

        async def release(failed: bool, delay_seconds: float) -> None:
            async with self._db.connection() as conn:
                await sql.release_dataset(
                    conn, dataset.id, claim, failed=failed, delay_seconds=delay_seconds
                )

        async def fail(error: DetflowError) -> None:
            why = failure(error).SerializeToString(deterministic=True)
            problems = await asyncio.to_thread(found.by_place)
            async with self._db.transaction() as conn:
                failed = await sql.fail_dataset(conn, dataset.id, claim, why)
                if isinstance(error, DataLoss) and dataset.upload_id:  # nobody can use it again
                    await delete_unused_uploads(conn, [dataset.upload_id])
                if failed is not None:
                    await insert_problems(conn, dataset.id, problems, found.total)
                    await append_dataset_event(conn, failed, "failed")

        return Claimed(
            what="import",
            name=dataset.name,
            num_failures=dataset.num_failures,
            renew=renew,
            release=release,
            fail=fail,
        )

    async def _discard(self, dataset: Dataset, claim: str) -> None:
        """Marks what this claim stored as garbage, unless the import was completed after all."""
        async with self._db.connection() as conn:
            await insert_garbage_unless_used(
                conn, dataset.id, f"{dataset_prefix(dataset.id)}/{claim}"
            )

    async def _read(self, dataset: Dataset, claim: str, folder: Path, found: Findings) -> None:
        """Does the import; raises a DetflowError that says all that is wrong with the archive."""
        wrong = found.wrong
        subject = f"detflow.progress.dataset.{dataset.id}"
        progress = ProgressReporter(self._bus, subject, _SPANS)
        await progress.update("download")
        prefix = dataset_prefix(dataset.id)
        await asyncio.to_thread(empty, self._store, prefix, f"{prefix}/{claim}/")
        wanted = Format(dataset.wanted_format) if dataset.wanted_format else None
        try:
            archive, entries = await self._fetch(dataset, folder, progress)
            layout = await asyncio.to_thread(self._find_layout, archive, entries, wanted)
        except ArchiveError as error:
            found.wrong = error.problems
            raise refusal(error.problems) from error
        except InvalidData as error:
            wrong.add([error.problem])
            raise refusal(wrong) from error
        found.add(layout.problems)
        wrong.count(layout.num_more_problems)
        checked: list[CheckedImage] = []
        samples = [
            SampleEntry(entries[s.image], entries[s.label] if s.label else None, s.split, s.rows)
            for s in layout.samples
        ]

        async def jobs() -> AsyncIterator[CheckJob]:
            for number, group in enumerate(group_samples(samples)):
                # Once the archive is to be refused, the rest is checked but not stored.
                keep = dataset.skip_invalid or not wrong.total
                yield CheckJob(
                    archive=archive,
                    limits=self._limits,
                    layout_format=layout.format,
                    num_classes=len(layout.class_names) if layout.class_names else None,
                    samples=group,
                    store_url=self._store.url,
                    shard_key=f"{prefix}/{claim}/{number:05d}.tar" if keep else "",
                    scratch=folder,
                )

        limit = await self._quota.limit(dataset.project_id)
        room = await self._quota.room(dataset.project_id, limit, besides=dataset.upload_id)
        num_done = num_bytes = 0
        await progress.update("check", 0, len(samples))
        async with aclosing(self._pool.map(check_samples, jobs())) as results:
            async for job, shard in results:
                checked.extend(shard.images)
                found.add(shard.problems)
                num_done += len(job.samples)
                num_bytes += sum(image.size_bytes for image in shard.images)
                if room is not None and num_bytes > room:
                    raise exceeded(dataset.project_id, limit - room + num_bytes, limit)
                await progress.update("check", num_done, len(samples))

        fatal = ProblemList()
        fatal.add(p for p in wrong.kept if p.reason in _ALWAYS_FATAL)
        if fatal.total:
            raise refusal(fatal)
        if wrong.total and not dataset.skip_invalid:
            raise refusal(wrong, _SKIP_HINT)
        await self._complete(dataset, claim, layout, checked, found, limit)

    async def _fetch(
        self, dataset: Dataset, folder: Path, progress: ProgressReporter
    ) -> tuple[Path, Mapping[str, Entry]]:
        """Brings the archive to the local disk; returns it with the files in it."""
        if dataset.source_url:
            fetched = await self._sources.fetch(dataset.source_url, folder, progress)
            await progress.update("read")
            return fetched
        archive = folder / "archive"
        async with self._db.connection() as conn:
            parts = await list_parts(conn, dataset.project_id, dataset.upload_id or "")
        await assemble_upload(archive, self._store, parts, progress)
        await progress.update("read")
        return await asyncio.to_thread(open_archive, archive, folder, self._limits)

    def _find_layout(
        self, archive: Path, entries: Mapping[str, Entry], wanted: Format | None
    ) -> Layout:
        with archive.open("rb") as file:
            return find_layout(
                entries, lambda path: read_entry(file, entries[path], self._limits), wanted
            )

    async def _complete(
        self,
        dataset: Dataset,
        claim: str,
        layout: Layout,
        checked: list[CheckedImage],
        found: Findings,
        limit: int,
    ) -> None:
        class_names, images = await asyncio.to_thread(number_classes, layout, checked)
        statistics = await asyncio.to_thread(describe, images, len(class_names))
        counted = await asyncio.to_thread(count_dataset, images, class_names)
        problems = await asyncio.to_thread(found.by_place)
        async with self._db.transaction() as conn:
            ready = await sql.complete_dataset(
                conn,
                dataset_id=dataset.id,
                claim=claim,
                layout_format=layout.format,
                class_names=class_names,
                statistics=statistics,
                skipped=[*found.wrong.first(), *found.warnings.first()][:MAX_PROBLEMS],
                num_skipped=found.wrong.num_left_out,
                images=images,
            )
            if ready is None:
                raise ClaimLost
            await check_quota(conn, dataset.project_id, limit)
            await insert_problems(conn, dataset.id, problems, found.total)
            await insert_statistics(conn, dataset.id, counted)
            await append_dataset_event(conn, ready, "imported")
        log.info("dataset imported", dataset=dataset.name, images=statistics.num_images)


def number_classes(
    layout: Layout, checked: list[CheckedImage]
) -> tuple[tuple[str, ...], list[Image]]:
    """Decides the class list and gives each box its index; images are sorted by path.

    Raises:
        InvalidArgument: EMPTY_DATASET: nothing to learn from; UNKNOWN_CLASS: too many classes.
    """
    keys = {key for image in checked for key in image.classes}
    names = layout.class_names
    if layout.format is Format.VOC and not (names and keys <= set(names)):
        names = tuple(sorted(str(key) for key in keys))
    elif names is None:
        names = tuple(f"class_{i}" for i in range(max((int(k) for k in keys), default=-1) + 1))
    if not checked or not names:
        what = "images" if not checked else "boxes"
        raise InvalidArgument(
            f"the archive holds no usable {what}; label the images and pack them again",
            reason=Reason.EMPTY_DATASET,
        )
    if len(names) > MAX_CLASSES:
        raise InvalidArgument(
            f"{len(names)} different classes are more than {MAX_CLASSES}; are the names right?",
            reason=Reason.UNKNOWN_CLASS,
        )
    index: dict[int | str, int] = {name: i for i, name in enumerate(names)}
    images = [
        Image(
            path=image.path,
            sha256=image.sha256,
            width=image.width,
            height=image.height,
            shard_key=image.shard_key,
            offset=image.offset,
            size_bytes=image.size_bytes,
            class_ids=tuple(k if isinstance(k, int) else index[k] for k in image.classes),
            boxes=image.boxes,
            existing_split=image.existing_split,
            crowds=image.crowds,
            perceptual_hash=image.perceptual_hash,
        )
        for image in sorted(checked, key=lambda i: i.path)
    ]
    return names, images
