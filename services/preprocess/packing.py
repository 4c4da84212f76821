"""A dataset as files in each of the formats: what they are called and what they say.

What is written here is what `formats` reads: an import of it gives the same images, classes, boxes
and splits. Labels refer to the upright image, as `formats` and every viewer take it; the bytes of
the images are those that were imported, their EXIF orientation included. Crowd regions are left out
of YOLO and VOC, which have no word for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from unicodedata import normalize
from xml.sax.saxutils import escape

import orjson

from services.preprocess.domain import SPLITS, Image
from services.preprocess.formats.layout import stem_of
from services.preprocess.formats.yolo import DIGITS, to_edges

_MAX_STEM_BYTES = 200
_SHORT_DIGITS = (6, 9, 12, 17, 20, 24)
_NOT_IN_XML = dict.fromkeys((0xFFFE, 0xFFFF), "_")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image goes: its split and its name, which no other image of the dataset has."""

    split: str | None
    stem: str
    extension: str

    @property
    def name(self) -> str:
        """Name of the image's file."""
        return f"{self.stem}.{self.extension}"

    @property
    def folder(self) -> str:
        """Its split as a folder with a slash; empty if it has none."""
        return f"{self.split}/" if self.split else ""


def find_places(images: Iterable[tuple[str, str | None]]) -> list[Place]:
    """Names images by the last part of their paths, with a number where two would be the same.

    Args:
        images: Path and existing split of each.
    """
    taken: set[str] = set()
    next_number: dict[str, int] = {}
    places = []
    for path, split in images:
        stem = original = _shortened(stem_of(path))
        while _key(stem) in taken:
            number = next_number.get(_key(original), 2)
            next_number[_key(original)] = number + 1
            stem = f"{original}_{number}"
        taken.add(_key(stem))
        places.append(Place(split, stem, path.rpartition(".")[2]))
    return places


def render_yolo(image: Image) -> bytes:
    """Renders the rows of an image, with as many digits as give the very same box back."""
    rows = (
        f"{class_id} {_yolo_row(box, image.width, image.height)}\n"
        for class_id, box, crowd in _boxes(image)
        if not crowd
    )
    return "".join(rows).encode()


def render_data_yaml(class_names: Sequence[str], splits: Iterable[str]) -> bytes:
    """Renders a data.yaml as Ultralytics reads it."""
    present = [split for split in SPLITS if split in splits]
    first = f"images/{present[0]}" if present else "images"
    folders = {split: f"images/{split}" for split in present}
    lines = [
        f"train: {folders.get('train', first)}",
        f"val: {folders.get('val', first)}",
        *([f"test: {folders['test']}"] if "test" in folders else []),
        f"nc: {len(class_names)}",
        "names:",
        *(f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(class_names)),
    ]
    return ("\n".join(lines) + "\n").encode()


def render_voc(image: Image, name: str, class_names: Sequence[str]) -> bytes:
    """Renders the annotation of an image.

    Args:
        image: The image.
        name: Name of its file.
        class_names: Names of the classes.
    """
    objects = "".join(
        f"  <object>\n    <name>{escape(class_names[class_id])}</name>\n"
        "    <pose>Unspecified</pose>\n    <truncated>0</truncated>\n"
        "    <difficult>0</difficult>\n    <bndbox>\n"
        + "".join(
            f"      <{edge}>{_number(value)}</{edge}>\n"
            for edge, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "    </bndbox>\n  </object>\n"
        for class_id, box, crowd in _boxes(image)
        if not crowd
    )
    file_name = escape(name.translate(_NOT_IN_XML))
    return (
        f"<annotation>\n  <folder>JPEGImages</folder>\n  <filename>{file_name}</filename>\n"
        f"  <size>\n    <width>{image.width}</width>\n    <height>{image.height}</height>\n"
        "    <depth>3</depth>\n  </size>\n  <segmented>0</segmented>\n"
        f"{objects}</annotation>\n"
    ).encode()


def render_coco_image(image_id: int, name: str, width: int, height: int) -> bytes:
    """Renders an element of `images`."""
    return orjson.dumps({"id": image_id, "file_name": name, "width": width, "height": height})


def render_coco_annotations(image: Image, image_id: int, first_id: int) -> list[bytes]:
    """Renders the elements of `annotations` of an image, numbered from `first_id`."""
    return [
        orjson.dumps(
            {
                "id": first_id + i,
                "image_id": image_id,
                "category_id": class_id + 1,
                "bbox": [box[0], box[1], _extent(box[0], box[2]), _extent(box[1], box[3])],
                "area": (box[2] - box[0]) * (box[3] - box[1]),
                "iscrowd": int(crowd),
                "segmentation": [],
            }
        )
        for i, (class_id, box, crowd) in enumerate(_boxes(image))
    ]


def render_coco_categories(class_names: Sequence[str]) -> bytes:
    """Renders `categories`; ids are class indexes + 1."""
    return orjson.dumps(
        [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(class_names, 1)]
    )


def _boxes(image: Image) -> Iterator[tuple[int, tuple[float, float, float, float], bool]]:
    crowds = image.crowds or (False,) * len(image.class_ids)
    for i, (class_id, crowd) in enumerate(zip(image.class_ids, crowds, strict=True)):
        x1, y1, x2, y2 = image.boxes[4 * i : 4 * i + 4]
        yield class_id, (x1, y1, x2, y2), crowd


def _extent(low: float, high: float) -> float:
    """Returns the length that added to the low edge gives exactly the high one."""
    extent = high - low
    while low + extent < high:
        extent = math.nextafter(extent, math.inf)
    while low + extent > high:
        extent = math.nextafter(extent, 0.0)
    return extent


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _yolo_row(box: tuple[float, float, float, float], width: int, height: int) -> str:
    x = _yolo_pair(box[0], box[2], width)
    y = _yolo_pair(box[1], box[3], height)
    return f"{x[0]} {y[0]} {x[1]} {y[1]}"


def _yolo_pair(low: float, high: float, side: int) -> tuple[str, str]:
    """Returns centre and length of an interval as shares of a side, in decimal digits.

    They are as many as it takes for the reader, which rounds once, to arrive at the same edges; a
    box that came from six digits leaves with the same six.
    """
    with localcontext(prec=DIGITS):
        centre = (Decimal(low) + Decimal(high)) / (2 * side)
        extent = (Decimal(high) - Decimal(low)) / side
        for digits in _SHORT_DIGITS:
            unit = Decimal(1).scaleb(-digits)
            c, e = centre.quantize(unit), extent.quantize(unit)
            edges = to_edges(c, e, side)
            if (max(edges[0], 0.0), min(edges[1], float(side))) == (low, high):
                return _short(c), _short(e)
    return str(centre), str(extent)


def _short(value: Decimal) -> str:
    """Renders a number with six digits after the point, and more only where they say something."""
    whole, _, digits = f"{value:f}".partition(".")
    return f"{whole}.{digits[:6]}{digits[6:].rstrip('0')}"


def _shortened(stem: str) -> str:
    return stem.encode()[:_MAX_STEM_BYTES].decode(errors="ignore")


def _key(stem: str) -> str:
    return stem.casefold() if stem.isascii() else normalize("NFC", stem).casefold()
