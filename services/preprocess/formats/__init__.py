"""Annotation formats: detection, and one entry point for their readers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from services.preprocess.domain import MAX_KEPT_PROBLEMS, InvalidData, Problem, Reason
from services.preprocess.formats import coco, voc, yolo
from services.preprocess.formats.layout import (
    Format,
    Labels,
    Layout,
    PathIndex,
    ReadFile,
    Rows,
    folder_of,
)

__all__ = ["Format", "Labels", "Layout", "Rows", "find_layout", "parse_labels", "read_rows"]

read_rows = coco.read_rows

_MASKS = "Segmentation"  # SegmentationClass and SegmentationObject of Pascal VOC
_NAMES = {Format.VOC: "Pascal VOC", Format.YOLO: "YOLO", Format.COCO: "COCO"}
_REMEDY = (
    "expected COCO (a .json with images, annotations and categories), Pascal VOC (Annotations/*.xml"
    " beside JPEGImages/) or YOLO (images/ and labels/*.txt, or labels beside the images)"
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
    in_json = coco.find_files(index, read) if wanted in (None, Format.COCO) else coco.Found()
    found = [
        name
        for name, is_there in (
            (Format.COCO, bool(in_json.files)),
            (Format.VOC, wanted in (None, Format.VOC) and voc.is_there(index)),
            (Format.YOLO, wanted in (None, Format.YOLO) and yolo.is_there(index)),
        )
        if is_there
    ]
    if len(found) > 1:
        raise InvalidData(
            "archive",
            Reason.AMBIGUOUS_LAYOUT,
            f"it holds {' and '.join(_NAMES[name] for name in found)} labels; say which to use"
            " with `format`",
        )
    if not found:
        meant = [*in_json.broken, *([in_json.partial] if in_json.partial else [])]
        raise (
            meant[0]
            if meant
            else InvalidData(
                "archive",
                Reason.UNKNOWN_LAYOUT,
                f"no {_NAMES[wanted] if wanted else 'known'} labels found among {len(index.paths)}"
                f" files; {_REMEDY}",
            )
        )
    match found[0]:
        case Format.COCO:
            layout = coco.find_layout(index, in_json)
        case Format.VOC:
            layout = voc.find_layout(index, read)
        case Format.YOLO:
            layout = yolo.find_layout(index, read)
    return _with_others(index, layout)


def _with_others(index: PathIndex, layout: Layout) -> Layout:
    """Adds a warning for each image that the layout does not have."""
    known = {sample.image for sample in layout.samples} | layout.left_out
    others = (
        Problem(
            image,
            Reason.NOT_LISTED,
            f"no {_NAMES[layout.format]} label file is beside it or lists it; it was left out",
            num_left_out=0,
        )
        for image in index.images
        if image not in known and not folder_of(image).rpartition("/")[2].startswith(_MASKS)
    )
    room = MAX_KEPT_PROBLEMS - len(layout.problems)
    return replace(layout, problems=(*layout.problems, *islice(others, room)))


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
