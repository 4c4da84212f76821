"""Checking the images and labels of an archive, shard by shard, in the processes of the pool."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from detflow.image_headers import Header, extension_of
from services.preprocess.archive import Entry, Limits, read_entry
from services.preprocess.bundle import open_store
from services.preprocess.domain import InvalidData, Problem
from services.preprocess.formats import Format, Labels, Rows, parse_labels, read_rows
from services.preprocess.formats.layout import ClassKey
from services.preprocess.images import verify
from services.preprocess.looks import perceptual_hash
from services.preprocess.shards import ShardWriter, divide

_MIN_SAMPLES = 8
_SHARDS_PER_DATASET = 24


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """An image and its label file or rows, and the split that the archive puts it in."""

    image: Entry
    label: Entry | None
    split: str | None = None
    rows: Rows | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckJob:
    """Some samples to be checked; picklable, complete in itself.

    Attributes:
        archive: The archive on the local disk.
        limits: How much it may hold.
        layout_format: Format of its labels.
        num_classes: Declared classes; None if only the labels tell.
        samples: What to check.
        store_url: Object store.
        shard_key: Where the original images go; empty to check only.
        scratch: Folder for the shard that is being written.
    """

    archive: Path
    limits: Limits
    layout_format: Format
    num_classes: int | None
    samples: tuple[SampleEntry, ...]
    store_url: str
    shard_key: str
    scratch: Path


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """A good image; `classes` are as the label file names them."""

    path: str
    sha256: str
    width: int
    height: int
    shard_key: str
    offset: int
    size_bytes: int
    classes: tuple[ClassKey, ...]
    boxes: tuple[float, ...]
    existing_split: str | None
    crowds: tuple[bool, ...]
    perceptual_hash: int | None


@dataclass(frozen=True, slots=True)
class CheckedShard:
    """What came of a job."""

    images: tuple[CheckedImage, ...]
    problems: tuple[Problem, ...]


def group_samples(samples: Sequence[SampleEntry]) -> list[tuple[SampleEntry, ...]]:
    """Divides samples into shards, in order."""
    shards = divide(
        [sample.image.size_bytes for sample in samples],
        num_shards=_SHARDS_PER_DATASET,
        min_sources=_MIN_SAMPLES,
    )
    return [tuple(samples[shard.start : shard.stop]) for shard in shards]


def check_samples(job: CheckJob) -> CheckedShard:
    """Checks every image and label of a job and stores the good images.

    An image that cannot be decoded, or whose label file cannot be read, is left out; of the others
    wrong boxes are left out. What was left out is among the problems: the caller decides whether
    that is acceptable.
    """
    checked: list[CheckedImage] = []
    problems: list[Problem] = []
    store = open_store(job.store_url)
    path = job.scratch / f"dataset-{job.shard_key.replace('/', '-') or 'check'}.tar"
    try:
        with job.archive.open("rb") as archive, ShardWriter(path) as writer:
            for sample in job.samples:
                try:
                    data, image, gray, labels = _check_sample(job, archive, sample)
                except InvalidData as error:
                    problems.append(error.problem)
                    continue
                problems.extend(labels.problems)
                width, height = image.upright_size
                extension = extension_of(sample.image.path)
                offset = writer.add(f"{len(checked):08d}{extension}", data) if job.shard_key else 0
                checked.append(
                    CheckedImage(
                        sample.image.path,
                        hashlib.sha256(data).hexdigest(),
                        width,
                        height,
                        job.shard_key,
                        offset,
                        len(data),
                        labels.classes,
                        labels.boxes,
                        sample.split,
                        labels.crowds,
                        perceptual_hash(gray),
                    )
                )
        if job.shard_key and checked:
            store.put(job.shard_key, path)
    finally:
        path.unlink(missing_ok=True)
    return CheckedShard(tuple(checked), tuple(problems))


def _check_sample(
    job: CheckJob, archive: BinaryIO, sample: SampleEntry
) -> tuple[bytes, Header, NDArray[np.uint8], Labels]:
    data = read_entry(archive, sample.image, job.limits)
    header, gray = verify(sample.image.path, data)
    if sample.rows is not None:
        return data, header, gray, read_rows(sample.rows, header.upright_size)
    if sample.label is None:
        return data, header, gray, Labels()
    labels = parse_labels(
        job.layout_format,
        sample.label.path,
        read_entry(archive, sample.label, job.limits),
        header.upright_size,
        job.num_classes,
    )
    return data, header, gray, labels
