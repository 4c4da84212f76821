"""The images of an archive, decoded by `detflow.images`; what is wrong is told by their paths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from detflow import images
from detflow.errors import DetflowError
from detflow.image_headers import EXTENSIONS, Header, extension_of
from detflow.images import Pixels
from services.preprocess.domain import InvalidData, Reason


def check_header(path: str, data: bytes) -> Header:
    """Reads the header of an image and decides whether it is worth decoding.

    Args:
        path: Path in the archive, for messages; its extension must match the content.
        data: The whole file.

    Raises:
        InvalidData: CORRUPT_IMAGE, UNSUPPORTED_IMAGE, TYPE_MISMATCH or IMAGE_TOO_LARGE.
    """
    with _told_of(path):
        header = images.header_of(data)
        if EXTENSIONS.get(extension_of(path)) is not header.kind:
            raise InvalidData(
                path,
                Reason.TYPE_MISMATCH,
                f"the content is {header.kind} but the name ends in"
                f" {extension_of(path) or 'no extension'};"
                " give it the right extension",
            )
        images.check_size(header)
    return header


def verify(path: str, data: bytes) -> tuple[Header, NDArray[np.uint8]]:
    """Decodes an image completely to prove that it can be.

    Returns:
        Its header, and the image in gray and small: see `images.look`.

    Raises:
        InvalidData: CORRUPT_IMAGE, UNSUPPORTED_IMAGE, TYPE_MISMATCH or IMAGE_TOO_LARGE.
    """
    header = check_header(path, data)
    with _told_of(path):
        return header, images.look(data, header)


def decode(path: str, data: bytes, header: Header, target: tuple[int, int] | None = None) -> Pixels:
    """Decodes an image to upright 8-bit BGR; see `images.decode`.

    Raises:
        InvalidData: CORRUPT_IMAGE or UNSUPPORTED_IMAGE.
    """
    with _told_of(path):
        return images.decode(data, header, target)


@contextlib.contextmanager
def _told_of(path: str) -> Iterator[None]:
    try:
        yield
    except DetflowError as error:
        raise InvalidData(path, Reason(error.reason), error.message) from error
