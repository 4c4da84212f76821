"""Annotation formats: detection, and one entry point for their readers."""

from __future__ import annotations

from collections.abc import Iterable

from services.preprocess.domain import InvalidData, Reason
from services.preprocess.formats import voc, yolo
from services.preprocess.formats.layout import Format, Labels, Layout, PathIndex, ReadFile

__all__ = ["Format", "Labels", "Layout", "find_layout", "parse_labels"]

_REMEDY = (
    "expected Pascal VOC (Annotations/*.xml beside JPEGImages/) or YOLO (images/ and labels/*.txt,"
    " or labels beside the images)"
)


def find_layout(paths: Iterable[str], read: ReadFile, wanted: Format | None = None) -> Layout:
    """Finds images, labels and classes in an archive.

    Args:
        paths: The files of the archive.
        read: Reads one of them.
        wanted: The layout the user named; None detects it.

    Raises:
        InvalidData: EMPTY_DATASET, UNKNOWN_LAYOUT, AMBIGUOUS_LAYOUT, BAD_DATA_YAML, or what is
            wrong with a file that had to be read.
    """
    index = PathIndex(paths)
    if not index.images:
        raise InvalidData("archive", Reason.EMPTY_DATASET, f"it holds no images; {_REMEDY}")
    found = [
        name
        for name, is_there in ((Format.VOC, voc.is_there), (Format.YOLO, yolo.is_there))
        if wanted in (None, name) and is_there(index)
    ]
    if len(found) > 1:
        raise InvalidData(
            "archive",
            Reason.AMBIGUOUS_LAYOUT,
            "it holds Pascal VOC and YOLO labels; say which to use with `format`",
        )
    if not found:
        raise InvalidData(
            "archive",
            Reason.UNKNOWN_LAYOUT,
            f"no {wanted or 'known'} labels found among {len(index.paths)} files; {_REMEDY}",
        )
    return voc.find_layout(index, read) if found == [Format.VOC] else yolo.find_layout(index, read)


def parse_labels(
    layout_format: Format, path: str, data: bytes, size: tuple[int, int], num_classes: int | None
) -> Labels:
    """Reads one label file.

    Args:
        layout_format: Format of the archive.
        path: Path of the label file, for messages.
        data: Its content.
        size: Width and height of the upright image in pixels.
        num_classes: Declared classes; None if only the labels tell.

    Raises:
        InvalidData: CORRUPT_LABEL or DTD_FORBIDDEN: the file as a whole cannot be read.
    """
    if layout_format is Format.VOC:
        return voc.parse_labels(path, data, size)
    return yolo.parse_labels(path, data, size, num_classes)
