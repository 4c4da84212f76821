"""Decoding, converting, resizing and encoding images.

Every image becomes 8-bit BGR, shape (height, width, 3), upright. There is one conversion for each
odd kind:

- 16-bit samples keep their upper 8 bits;
- palettes are looked up; gray becomes three equal channels;
- CMYK and YCCK become RGB by libjpeg's rule without a colour profile (R = C * K / 255 on Adobe's
  inverted samples);
- transparent pixels are blended over white;
- the EXIF orientation is applied, and with it width and height may swap;
- of several pages or frames the first is taken.

The decoder of JPEGs may drop pixels that are not needed (DCT scaling by n/8). Output is baseline
JPEG, quality 95, 4:2:0, without metadata. The same bytes in give the same bytes out with the same
library versions.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from detflow.errors import InvalidArgument, ResourceExhausted
from detflow.image_headers import BadHeader, Header, ImageKind, name_content, read_header

Pixels: TypeAlias = NDArray[np.uint8]
"""Shape (height, width, 3), BGR, 0..255."""

MAX_PIXELS = 100_000_000
MAX_SIDE_PX = 32_768
JPEG_QUALITY = 95
JPEG_SUBSAMPLING = "420"

_STRIP_ROWS = 64
_MIN_SEEN_PX = 32  # what a perceptual hash looks at

_COPYABLE_COLORS = frozenset({"YCbCr", "Gray"})


def use_one_thread() -> None:
    """Prepares a process that works beside others: one thread, and nothing on its log."""
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(0)  # damaged images are told to the user, not to the log


def header_of(data: bytes) -> Header:
    """Reads the header of an image.

    Args:
        data: The whole file.

    Raises:
        InvalidArgument: CORRUPT_IMAGE or UNSUPPORTED_IMAGE.
    """
    if not data:
        raise _corrupt("the image file is empty")
    try:
        header = read_header(data)
    except BadHeader as error:
        raise _corrupt(str(error), "export the image again") from error
    if header is None:
        raise InvalidArgument(
            f"the content is {name_content(data)}; convert it to JPEG, PNG, BMP, WebP or TIFF",
            reason="UNSUPPORTED_IMAGE",
        )
    return header


def check_size(header: Header) -> None:
    """Refuses to decode what would take too much memory.

    Raises:
        ResourceExhausted: IMAGE_TOO_LARGE.
    """
    if header.width * header.height > MAX_PIXELS or max(header.width, header.height) > MAX_SIDE_PX:
        raise ResourceExhausted(
            f"{header.width}x{header.height} pixels are more than {MAX_PIXELS} in all or"
            f" {MAX_SIDE_PX} on a side; make it smaller",
            reason="IMAGE_TOO_LARGE",
        )


def look(data: bytes, header: Header) -> NDArray[np.uint8]:
    """Decodes an image completely to prove that it can be.

    Returns:
        It in gray: shape (height, width), upright; a JPEG in an eighth of its size, or as much of
        it as keeps `_MIN_SEEN_PX` a side.

    Raises:
        InvalidArgument: CORRUPT_IMAGE or UNSUPPORTED_IMAGE.
    """
    if header.kind is ImageKind.JPEG:
        try:  # every coefficient is read, but only one pixel in 64 is reconstructed
            gray = simplejpeg.decode_jpeg(
                data, "GRAY", min_width=_MIN_SEEN_PX, min_height=_MIN_SEEN_PX, fastdct=True
            )
            return _upright(gray[:, :, 0], header.orientation)
        except ValueError:
            pass  # kinds that cannot be decoded to gray, such as CMYK; or it is corrupt
    gray = cv2.cvtColor(decode(data, header), cv2.COLOR_BGR2GRAY)
    return np.asarray(gray, np.uint8)


def decode(data: bytes, header: Header, target: tuple[int, int] | None = None) -> Pixels:
    """Decodes an image to upright 8-bit BGR.

    Args:
        data: The whole file.
        header: Its header.
        target: Upright width and height that will be needed; a JPEG may come out smaller than it
            is stored, but not smaller than this.

    Returns:
        Shape (height, width, 3).

    Raises:
        InvalidArgument: CORRUPT_IMAGE or UNSUPPORTED_IMAGE.
    """
    if header.kind is ImageKind.JPEG:
        pixels = _decode_jpeg(data, header, target)
    else:
        pixels = _decode_other(data)
        if pixels.shape[:2] != (header.height, header.width):
            raise _corrupt("its size differs from its header")
    return _upright(pixels, header.orientation)


def to_gray(pixels: Pixels) -> Pixels:
    """Makes an image gray (ITU-R BT.601 luma), as three equal channels."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    return np.asarray(cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR), np.uint8)


def encode_jpeg(pixels: Pixels) -> bytes:
    """Encodes an image as JPEG, quality 95, 4:2:0."""
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), JPEG_QUALITY, "BGR", JPEG_SUBSAMPLING
    )
    return bytes(encoded)


def is_plain_jpeg(data: bytes, header: Header) -> bool:
    """Says whether an image can be copied byte for byte: an upright JPEG, colour or gray."""
    if header.kind is not ImageKind.JPEG or header.orientation != 1:
        return False
    _, _, color, _ = simplejpeg.decode_jpeg_header(data)
    return color in _COPYABLE_COLORS


def _decode_jpeg(data: bytes, header: Header, target: tuple[int, int] | None) -> Pixels:
    min_width, min_height = target or (0, 0)
    if header.orientation >= 5:
        min_width, min_height = min_height, min_width
    try:
        return np.asarray(
            simplejpeg.decode_jpeg(data, "BGR", min_width=min_width, min_height=min_height),
            np.uint8,
        )
    except ValueError as error:
        raise _corrupt(f"the JPEG is damaged ({error})") from error


def _decode_other(data: bytes) -> Pixels:
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise _corrupt(f"the image is damaged ({error.err})") from error
    if pixels is None:
        raise _corrupt("the image is truncated or damaged")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InvalidArgument(
            f"samples of type {pixels.dtype} are not read; convert it to 8 or 16 bit",
            reason="UNSUPPORTED_IMAGE",
        )
    if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3:
        return np.asarray(pixels, np.uint8)
    converted = np.empty((*pixels.shape[:2], 3), np.uint8)
    for top in range(0, len(pixels), _STRIP_ROWS):  # a whole image at once takes much memory beside
        converted[top : top + _STRIP_ROWS] = _to_bgr(pixels[top : top + _STRIP_ROWS])
    return converted


def _to_bgr(pixels: NDArray[Any]) -> Pixels:
    """Makes 8-bit BGR of samples of 8 or 16 bits, gray or with transparency."""
    if pixels.dtype == np.uint16:
        pixels = np.right_shift(pixels, 8).astype(np.uint8)
    pixels = np.asarray(pixels, np.uint8)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR), np.uint8)
    return _blend_over_white(pixels) if pixels.shape[2] == 4 else pixels


def _blend_over_white(pixels: NDArray[np.uint8]) -> Pixels:
    alpha = pixels[:, :, 3:].astype(np.uint16)
    if alpha.min() == 255:
        return pixels[:, :, :3]
    color = pixels[:, :, :3].astype(np.uint16)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Applies an EXIF orientation (Exif 2.32, tag 274)."""
    match orientation:
        case 2:
            turned = cv2.flip(pixels, 1)
        case 3:
            turned = cv2.rotate(pixels, cv2.ROTATE_180)
        case 4:
            turned = cv2.flip(pixels, 0)
        case 5:
            turned = cv2.transpose(pixels)
        case 6:
            turned = cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            turned = cv2.flip(cv2.transpose(pixels), -1)
        case 8:
            turned = cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
        case _:
            return pixels
    return np.asarray(turned, np.uint8)


def _corrupt(what: str, remedy: str = "export it again") -> InvalidArgument:
    return InvalidArgument(f"{what}; {remedy}", reason="CORRUPT_IMAGE")
