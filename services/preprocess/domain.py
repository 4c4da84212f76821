"""Datasets and bundles as plain data, and the rules that hold for them."""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

_LAST_NUMBER = re.compile(r"([0-9]{1,9})(?:\](?:\.[a-z_]+)?)?$")

SPLITS = ("train", "val", "test")

_WITH_CROWDS = 1 << 31  # in the count of boxes that is hashed: one byte per box follows them

MAX_PROBLEMS = 100
"""Problems kept and shown of any number found."""

MAX_KEPT_PROBLEMS = 1_000_000
"""Problems that are stored, to be listed; more are counted only."""

EDGE_TOLERANCE_PX = 1.0
"""A box may reach this far over the edge of its image and is clipped; farther is BAD_BOX."""

ROUNDING_PX = 0.01
"""Clipping less than this is rounding of the label file and not worth a warning."""

LEASE_SECONDS = 8.0
"""How long a claim lasts without renewal; work of a killed process starts again after it."""


class DatasetState(StrEnum):
    """IMPORTING -> READY | FAILED."""

    IMPORTING = "IMPORTING"
    READY = "READY"
    FAILED = "FAILED"


class UploadState(StrEnum):
    """RECEIVING -> RECEIVED."""

    RECEIVING = "RECEIVING"
    RECEIVED = "RECEIVED"


class PreprocessingState(StrEnum):
    """PENDING -> RUNNING -> SUCCEEDED | FAILED; PENDING, RUNNING -> CANCELLED."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Reason(StrEnum):
    """Machine-readable reasons of what can be wrong with an archive, an image or a label."""

    UNSAFE_PATH = "UNSAFE_PATH"
    UNSUPPORTED_ENTRY = "UNSUPPORTED_ENTRY"
    ARCHIVE_LIMIT = "ARCHIVE_LIMIT"
    CORRUPT_ARCHIVE = "CORRUPT_ARCHIVE"
    EMPTY_DATASET = "EMPTY_DATASET"
    BAD_NAME = "BAD_NAME"
    DUPLICATE_NAME = "DUPLICATE_NAME"
    UNKNOWN_LAYOUT = "UNKNOWN_LAYOUT"
    AMBIGUOUS_LAYOUT = "AMBIGUOUS_LAYOUT"
    BAD_DATA_YAML = "BAD_DATA_YAML"
    CORRUPT_IMAGE = "CORRUPT_IMAGE"
    IMAGE_TOO_LARGE = "IMAGE_TOO_LARGE"
    TYPE_MISMATCH = "TYPE_MISMATCH"
    UNSUPPORTED_IMAGE = "UNSUPPORTED_IMAGE"
    CORRUPT_LABEL = "CORRUPT_LABEL"
    BAD_BOX = "BAD_BOX"
    BOX_CLIPPED = "BOX_CLIPPED"
    UNKNOWN_CLASS = "UNKNOWN_CLASS"
    MISSING_IMAGE = "MISSING_IMAGE"
    DTD_FORBIDDEN = "DTD_FORBIDDEN"
    DUPLICATE_ID = "DUPLICATE_ID"
    NOT_LISTED = "NOT_LISTED"
    TOO_FEW_IMAGES = "TOO_FEW_IMAGES"
    TOO_FEW_GROUPS = "TOO_FEW_GROUPS"
    DATASET_NOT_READY = "DATASET_NOT_READY"
    DATASET_IN_USE = "DATASET_IN_USE"
    NO_LEAK_REPORT = "NO_LEAK_REPORT"
    WORKER_DIED = "WORKER_DIED"


LIMIT_REASONS = frozenset({Reason.ARCHIVE_LIMIT, Reason.IMAGE_TOO_LARGE})
"""Reasons answered with RESOURCE_EXHAUSTED; the others are INVALID_ARGUMENT."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in what a user brought.

    Attributes:
        where: Path in the archive, with the line ("labels/a.txt:3") or element ("a.xml object[2]").
        reason: What kind of problem.
        description: Sentence for a person: the value and the remedy.
        num_left_out: Images and boxes that skip_invalid leaves out because of it; 0 for a warning.
    """

    where: str
    reason: Reason
    description: str
    num_left_out: int = 1


class InvalidData(Exception):
    """Something in an archive is wrong; carries the problem."""

    def __init__(self, where: str, reason: Reason, description: str) -> None:
        super().__init__(f"{where}: {description}")
        self.problem = Problem(where, reason, description)

    def __reduce__(self) -> tuple[type[InvalidData], tuple[str, Reason, str]]:
        return InvalidData, (self.problem.where, self.problem.reason, self.problem.description)


@dataclass(frozen=True, slots=True)
class Image:
    """A verified image of a dataset and its boxes.

    Attributes:
        path: Path in the archive it came from.
        sha256: Hash of the original bytes.
        width: Pixels, after the EXIF orientation is applied.
        height: Pixels, after the EXIF orientation is applied.
        shard_key: Tar shard in the object store that holds the original bytes.
        offset: Where they begin in the shard.
        size_bytes: How many they are.
        class_ids: One index into the dataset's class names per box.
        boxes: Flat x1, y1, x2, y2 per box, pixels of the upright image.
        existing_split: "train", "val" or "test" if the archive says so, else None.
        crowds: Whether each box is a crowd region; empty if none is.
        perceptual_hash: How it looks (`looks.perceptual_hash`); None for an image without features.
    """

    path: str
    sha256: str
    width: int
    height: int
    shard_key: str
    offset: int
    size_bytes: int
    class_ids: tuple[int, ...]
    boxes: tuple[float, ...]
    existing_split: str | None = None
    crowds: tuple[bool, ...] = ()
    perceptual_hash: int | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a READY dataset says about itself; `existing_split` counts images by SPLITS."""

    num_images: int
    num_boxes: int
    num_background_images: int
    num_boxes_by_class: tuple[int, ...]
    num_crowd_boxes: int
    existing_split: tuple[int, int, int] | None
    content_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """An archive in the object store, in parts under `uploads/{id}/`.

    Attributes:
        id: Its id.
        project_id: Project.
        state: Where it stands.
        size_bytes: Size of the whole archive; None until a stream that did not say it has ended.
        committed_bytes: Bytes that are stored.
        sha256: Hash of the whole archive; while it is RECEIVING what it must be, if that is known.
        create_time: When it was begun.
        expire_time: When it is thrown away unless bytes come or an import needs it.
    """

    id: str
    project_id: str
    state: UploadState
    size_bytes: int | None
    committed_bytes: int
    sha256: str
    create_time: datetime
    expire_time: datetime

    @property
    def name(self) -> str:
        """Resource name."""
        return f"projects/{self.project_id}/uploads/{self.id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A dataset as it is stored; the fields are those of detflow.v1.Dataset and its request."""

    id: str
    project_id: str
    display_name: str
    state: DatasetState
    upload_id: str | None
    source_url: str
    skip_invalid: bool
    wanted_format: str | None
    format: str | None
    class_names: tuple[str, ...]
    num_images: int
    num_boxes: int
    num_background_images: int
    num_boxes_by_class: tuple[int, ...]
    skipped: tuple[Problem, ...]
    num_skipped: int
    content_sha256: str
    existing_split: tuple[int, int, int] | None
    num_crowd_boxes: int
    num_problems: int
    failure: bytes | None
    create_time: datetime
    import_time: datetime | None
    num_failures: int

    @property
    def name(self) -> str:
        """Resource name."""
        return f"projects/{self.project_id}/datasets/{self.id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """The making of a bundle as it is stored; protobuf fields are serialized."""

    version_id: str
    version_name: str
    dataset_id: str
    recipe: bytes
    state: PreprocessingState
    revision: int
    num_images: tuple[int, int, int] | None
    manifest: bytes | None
    failure: bytes | None
    create_time: datetime
    end_time: datetime | None
    num_failures: int


def upload_prefix(upload_id: str) -> str:
    """Returns where the parts of an upload are in the object store."""
    return f"uploads/{upload_id}"


def dataset_prefix(dataset_id: str) -> str:
    """Returns what the keys of a dataset's objects begin with."""
    return f"datasets/{dataset_id}"


@dataclass(slots=True)
class ProblemList:
    """Problems of one import: all counted, the first million kept."""

    kept: list[Problem] = field(default_factory=list)
    total: int = 0
    num_left_out: int = 0

    def add(self, problems: Iterable[Problem]) -> None:
        """Counts problems and keeps the first ones."""
        for problem in problems:
            self.total += 1
            self.num_left_out += problem.num_left_out
            if len(self.kept) < MAX_KEPT_PROBLEMS:
                self.kept.append(problem)

    def count(self, num_more: int) -> None:
        """Counts problems that are not kept."""
        self.total += num_more
        self.num_left_out += num_more

    def first(self) -> list[Problem]:
        """Returns at most a hundred, in the order of their place."""
        return heapq.nsmallest(MAX_PROBLEMS, self.kept, key=lambda p: place_key(p.where))


def place_key(where: str) -> tuple[str, int]:
    """Sorts places by path, then by line (`a.txt:3`) or element (`a.json images[3].id`)."""
    found = _LAST_NUMBER.search(where)
    return (where[: found.start()], int(found[1])) if found else (where, 0)


def check_box(
    where: str, x1: float, y1: float, x2: float, y2: float, width: int, height: int
) -> tuple[tuple[float, float, float, float], Problem | None]:
    """Checks one box against its upright image; clips what reaches at most 1 px over the edge.

    Args:
        where: Place of the box, for the message.
        x1: Left edge in pixels.
        y1: Top edge.
        x2: Right edge.
        y2: Bottom edge.
        width: Width of the upright image.
        height: Height of the upright image.

    Returns:
        The box inside the image, and a BOX_CLIPPED warning if it was changed by more than rounding.

    Raises:
        InvalidData: BAD_BOX: a coordinate is not a finite number, the area is zero or negative, or
            the box lies more than one pixel outside.
    """
    box = (x1, y1, x2, y2)
    text = f"({', '.join(f'{v:g}' for v in box)})"
    if not all(math.isfinite(v) for v in box):
        raise InvalidData(
            where,
            Reason.BAD_BOX,
            f"box {text} has a coordinate that is no finite number; correct it",
        )
    if x2 <= x1 or y2 <= y1:
        raise InvalidData(
            where,
            Reason.BAD_BOX,
            f"box {text} in pixels (x1, y1, x2, y2) has no area; draw it again or delete it",
        )
    over = max(-x1, -y1, x2 - width, y2 - height)
    if over > EDGE_TOLERANCE_PX:
        raise InvalidData(
            where,
            Reason.BAD_BOX,
            f"box {text} in pixels (x1, y1, x2, y2) reaches {over:g} px outside the"
            f" {width}x{height} image;"
            " correct it (the image counts after its EXIF orientation is applied)",
        )
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise InvalidData(
            where, Reason.BAD_BOX, f"box {text} lies outside the {width}x{height} image; delete it"
        )
    warning = None
    if over > ROUNDING_PX:
        warning = Problem(
            where,
            Reason.BOX_CLIPPED,
            f"box {text} reached {over:g} px outside the {width}x{height} image and was clipped",
            num_left_out=0,
        )
    return inside, warning


def describe(images: Sequence[Image], num_classes: int) -> Statistics:
    """Counts a dataset and hashes its sorted (path, image hash, classes, boxes, crowds)."""
    counts: Counter[int] = Counter()
    split = Counter(image.existing_split for image in images)
    digest = hashlib.sha256()
    for image in sorted(images, key=lambda i: i.path.encode()):
        counts.update(image.class_ids)
        path = image.path.encode()
        digest.update(struct.pack("<I", len(path)) + path + bytes.fromhex(image.sha256))
        digest.update(
            struct.pack(
                f"<I{len(image.class_ids)}i",
                len(image.class_ids) | (_WITH_CROWDS if image.crowds else 0),
                *image.class_ids,
            )
        )
        digest.update(struct.pack(f"<{len(image.boxes)}d", *image.boxes) + bytes(image.crowds))
    return Statistics(
        num_images=len(images),
        num_boxes=counts.total(),
        num_background_images=sum(not image.class_ids for image in images),
        num_boxes_by_class=tuple(counts[i] for i in range(num_classes)),
        num_crowd_boxes=sum(sum(image.crowds) for image in images),
        existing_split=(split["train"], split["val"], split["test"])
        if len(split) > (None in split)
        else None,
        content_sha256=digest.hexdigest(),
    )
