"""Generated archives and images for the tests of the preprocess service."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from hypothesis import strategies as st

from detflow.boxes import Boxes, as_boxes, from_normalized_cxcywh

BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd-voc.zip"
DATA_YAML = b"names: [disc, square]\nnc: 2\n"

_SIDES = st.integers(2, 4000)


@st.composite
def boxed_images(draw: st.DrawFn) -> tuple[Boxes, int, int]:
    """Boxes on whole pixels inside an image, with its width and height."""
    width, height = draw(_SIDES), draw(_SIDES)
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        rows.append([x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))])
    return as_boxes(rows), width, height


def picture(
    width: int = 64, height: int = 48, seed: int = 0
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A smooth random BGR image, shape (height, width, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def encode(extension: str, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """Encodes an image by extension, e.g. ".png"."""
    return bytes(cv2.imencode(extension, pixels)[1])


def jpeg(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """A JPEG of a random picture."""
    return encode(".jpg", picture(width, height, seed))


def with_orientation(data: bytes, orientation: int) -> bytes:
    """Adds an EXIF orientation to a JPEG."""
    tiff = (
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"
        + bytes([orientation, 0, 0, 0])
        + b"\0\0\0\0"
    )
    exif = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]


def pack(files: Mapping[str, bytes]) -> bytes:
    """Packs files into a zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def yolo_files(num_images: int = 10, *, size: tuple[int, int] = (64, 48)) -> dict[str, bytes]:
    """A YOLO data set with one box in each image."""
    files = {"data.yaml": DATA_YAML}
    for i in range(num_images):
        files[f"images/{i:03d}.jpg"] = jpeg(*size, seed=i)
        files[f"labels/{i:03d}.txt"] = f"{i % 2} 0.5 0.5 0.25 0.5\n".encode()
    return files


def voc_xml(*objects: tuple[str, float, float, float, float]) -> bytes:
    """A Pascal VOC annotation of objects (name, xmin, ymin, xmax, ymax)."""
    body = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in objects
    )
    return f"<annotation>{body}</annotation>".encode()


__all__ = [
    "BCCD",
    "DATA_YAML",
    "as_boxes",
    "encode",
    "from_normalized_cxcywh",
    "jpeg",
    "pack",
    "picture",
    "voc_xml",
    "with_orientation",
    "yolo_files",
]
