"""What an image file says about itself before it is decoded: kind, size and EXIF orientation.

Read from the bytes with bounds checks only, so that a small file that claims 400 megapixels costs
nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NO_LENGTH_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
_TIFF_INT_SIZES = {1: 1, 3: 2, 4: 4}
_TAG_WIDTH, _TAG_HEIGHT, _TAG_ORIENTATION = 256, 257, 274


class ImageKind(StrEnum):
    """Image formats that are read."""

    JPEG = "JPEG"
    PNG = "PNG"
    BMP = "BMP"
    WEBP = "WebP"
    TIFF = "TIFF"


EXTENSIONS = {
    ".jpg": ImageKind.JPEG,
    ".jpeg": ImageKind.JPEG,
    ".jpe": ImageKind.JPEG,
    ".png": ImageKind.PNG,
    ".bmp": ImageKind.BMP,
    ".dib": ImageKind.BMP,
    ".webp": ImageKind.WEBP,
    ".tif": ImageKind.TIFF,
    ".tiff": ImageKind.TIFF,
}
"""Lower-case extension -> the content it promises."""


def extension_of(path: str) -> str:
    """Returns the lower-case extension of a path with its dot, or an empty string."""
    name = path.rsplit("/", 1)[-1]
    stem, dot, extension = name.rpartition(".")
    return f".{extension.lower()}" if dot and stem else ""


_OTHER_IMAGES = (
    (b"GIF8", "a GIF"),
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop document"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """Size and orientation of an image as stored.

    Attributes:
        kind: Format by content.
        width: Stored width in pixels, before the orientation is applied.
        height: Stored height in pixels.
        orientation: EXIF orientation, 1..8; 1 means upright.
    """

    kind: ImageKind
    width: int
    height: int
    orientation: int = 1

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height in pixels after the orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


class BadHeader(Exception):
    """The header is damaged or truncated."""


def sniff(data: bytes) -> ImageKind | None:
    """Names the image format by the first bytes; None if it is none that is read."""
    if data[:3] == b"\xff\xd8\xff":
        return ImageKind.JPEG
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return ImageKind.PNG
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ImageKind.WEBP
    if data[:4] in (b"II*\0", b"MM\0*"):
        return ImageKind.TIFF
    if data[:2] == b"BM" and len(data) >= 18 and data[14:18] in _BMP_HEADER_SIZES:
        return ImageKind.BMP
    return None


_BMP_HEADER_SIZES = frozenset(struct.pack("<I", n) for n in (12, 40, 52, 56, 64, 108, 124))


def name_content(data: bytes) -> str:
    """Describes content that is no image that is read, for a message."""
    for magic, name in _OTHER_IMAGES:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return "HEIF, AVIF or video"
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml")):
        return "SVG or another XML document"
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    return "no known image format"


def read_header(data: bytes) -> Header | None:
    """Reads kind, size and orientation.

    Returns:
        None if the content is no image format that is read.

    Raises:
        BadHeader: It begins like an image but its header is damaged.
    """
    kind = sniff(data)
    if kind is None:
        return None
    try:
        header = _READERS[kind](data)
    except (struct.error, IndexError) as error:
        raise BadHeader(f"the {kind} header is truncated") from error
    if header.width < 1 or header.height < 1:
        raise BadHeader(f"the {kind} header says {header.width}x{header.height} pixels")
    return header


def _read_jpeg(data: bytes) -> Header:
    orientation, at = 1, 2
    while True:
        if data[at] != 0xFF:
            raise BadHeader("the JPEG has no image before its data")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _NO_LENGTH_MARKERS:
            at += 2
            continue
        if marker in (0xD9, 0xDA):
            raise BadHeader("the JPEG has no image before its data")
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker in _SOF_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header(ImageKind.JPEG, width, height, orientation)
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 10 : at + 2 + length])
        at += 2 + length


def _read_png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise BadHeader("the PNG does not begin with IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    orientation, at = 1, 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name = data[at + 4 : at + 8]
        if name == b"IEND":
            break
        at += 12 + length
        if at > len(data):  # the decoder would take as much memory as the chunk claims to have
            raise BadHeader("the PNG ends within a chunk")
        if name == b"eXIf":
            orientation = _orientation(data[at - 4 - length : at - 4])
    return Header(ImageKind.PNG, width, height, orientation)


def _read_bmp(data: bytes) -> Header:
    if data[14:18] == b"\x0c\0\0\0":
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return Header(ImageKind.BMP, width, abs(height))


def _read_webp(data: bytes) -> Header:
    first = data[12:16]
    if first == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header(ImageKind.WEBP, width & 0x3FFF, height & 0x3FFF)
    if first == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header(ImageKind.WEBP, (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if first != b"VP8X":
        raise BadHeader("the WebP has no image")
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    orientation, at = 1, 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        if data[at : at + 4] == b"EXIF":
            exif = data[at + 8 : at + 8 + length]
            orientation = _orientation(exif.removeprefix(b"Exif\0\0"))
            break
        at += 8 + length + length % 2
    return Header(ImageKind.WEBP, width, height, orientation)


def _read_tiff(data: bytes) -> Header:
    tags = _tiff_tags(data)
    return Header(
        ImageKind.TIFF,
        tags.get(_TAG_WIDTH, 0),
        tags.get(_TAG_HEIGHT, 0),
        _valid_orientation(tags.get(_TAG_ORIENTATION, 1)),
    )


def _orientation(exif: bytes) -> int:
    """Reads the orientation of an EXIF block; a damaged block means none is stated."""
    try:
        return _valid_orientation(_tiff_tags(exif).get(_TAG_ORIENTATION, 1))
    except (struct.error, BadHeader):
        return 1


def _valid_orientation(value: int) -> int:
    return value if 1 <= value <= 8 else 1


def _tiff_tags(data: bytes) -> dict[int, int]:
    """Reads the whole-number tags of the first directory of a TIFF structure."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        raise BadHeader("the TIFF structure has no byte order")
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    tags = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, num_values = struct.unpack_from(order + "HHI", data, entry)
        size = _TIFF_INT_SIZES.get(kind)
        if size and num_values == 1:
            code = {1: "B", 2: "H", 4: "I"}[size]
            (tags[tag],) = struct.unpack_from(order + code, data, entry + 8)
    return tags


_READERS = {
    ImageKind.JPEG: _read_jpeg,
    ImageKind.PNG: _read_png,
    ImageKind.BMP: _read_bmp,
    ImageKind.WEBP: _read_webp,
    ImageKind.TIFF: _read_tiff,
}
