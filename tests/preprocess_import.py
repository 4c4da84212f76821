"""Imports and downloads without a service: the code of both, on archives in memory."""

from __future__ import annotations

import asyncio
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detflow.errors import InvalidArgument
from services.preprocess.archive import ArchiveError, Limits, open_archive, read_entry
from services.preprocess.bundle import open_store, read_source
from services.preprocess.checking import (
    CheckedImage,
    CheckJob,
    SampleEntry,
    check_samples,
    group_samples,
)
from services.preprocess.domain import Image, InvalidData, Problem, place_key
from services.preprocess.download import Packer
from services.preprocess.formats import Format, find_layout
from services.preprocess.importer import number_classes

LIMITS = Limits(entries=2000, total_bytes=1 << 26, entry_bytes=1 << 23, free_bytes=6 << 20)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What came of an import.

    Attributes:
        format: Layout found; None if the archive was refused as such.
        class_names: The classes.
        images: What is kept, by path.
        problems: What was left out, and warnings, by place.
    """

    format: Format | None = None
    class_names: tuple[str, ...] = ()
    images: tuple[Image, ...] = ()
    problems: tuple[Problem, ...] = ()


def import_archive(
    data: bytes,
    folder: Path,
    *,
    wanted: Format | None = None,
    limits: Limits = LIMITS,
    prefix: str = "data",
) -> Imported:
    """Imports an archive as the importer does with skip_invalid, into a store in `folder`."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = work / "archive"
    path.write_bytes(data)
    try:
        path, entries = open_archive(path, work, limits)
        with path.open("rb") as file:
            layout = find_layout(entries, lambda p: read_entry(file, entries[p], limits), wanted)
    except ArchiveError as error:
        return Imported(problems=tuple(error.problems.first()))
    except InvalidData as error:
        return Imported(problems=(error.problem,))
    samples = [
        SampleEntry(entries[s.image], entries[s.label] if s.label else None, s.split, s.rows)
        for s in layout.samples
    ]
    problems = [*layout.problems]
    checked: list[CheckedImage] = []
    (folder / "store").mkdir(exist_ok=True)
    for number, group in enumerate(group_samples(samples)):
        shard = check_samples(
            CheckJob(
                archive=path,
                limits=limits,
                layout_format=layout.format,
                num_classes=len(layout.class_names) if layout.class_names else None,
                samples=group,
                store_url=f"file://{folder}/store",
                shard_key=f"{prefix}/{number}.tar",
                scratch=work,
            )
        )
        problems.extend(shard.problems)
        checked.extend(shard.images)
    problems.sort(key=lambda p: place_key(p.where))
    try:
        class_names, images = number_classes(layout, checked)
    except InvalidArgument:
        return Imported(format=layout.format, problems=tuple(problems))
    return Imported(
        format=layout.format,
        class_names=class_names,
        images=tuple(images),
        problems=tuple(problems),
    )


class KeptImages:
    """The images of an import as a download wants them."""

    def __init__(self, imported: Imported, folder: Path) -> None:
        self._images = imported.images
        self._store = open_store(f"file://{folder}/store")

    async def describe(self) -> list[tuple[str, str | None, int, int]]:
        return [(i.path, i.existing_split, i.width, i.height) for i in self._images]

    async def page(self, positions: Sequence[int]) -> list[Image]:
        return [self._images[position] for position in positions]

    def read(self, image: Image) -> bytes:
        return read_source(self._store, image)


def download(imported: Imported, folder: Path, wanted: Format) -> bytes:
    """Downloads what was imported into `folder`."""

    async def collect() -> bytes:
        out = io.BytesIO()
        packer = Packer(KeptImages(imported, folder), imported.class_names, wanted)
        async for chunk in packer.chunks():
            out.write(chunk)
        return out.getvalue()

    return asyncio.run(collect())


def forget_peak_memory() -> int:
    """Lets the peak of this process's memory begin anew; returns it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """The most memory that was resident since."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
