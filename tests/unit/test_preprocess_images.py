"""Images are judged by their content, from the header first, and decoded in one documented way."""

import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg

from detflow import images
from detflow.image_headers import ImageKind, read_header
from services.preprocess.domain import InvalidData, Reason
from services.preprocess.images import decode, verify
from tests.preprocess_samples import encode, jpeg, picture, with_orientation

EXTENSIONS = [".jpg", ".png", ".bmp", ".webp", ".tiff"]


def refused(path: str, data: bytes) -> Reason:
    """The reason an image is refused for."""
    with pytest.raises(InvalidData) as caught:
        verify(path, data)
    assert caught.value.problem.where == path
    return caught.value.problem.reason


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims a size."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + ihdr
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + encode(".png", picture())[33:]
    )


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_supported_formats_are_read_by_content(extension: str) -> None:
    header, _ = verify(f"a{extension}", encode(extension, picture(65, 43)))
    assert header.upright_size == (65, 43)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_truncated_images_are_corrupt(extension: str, keep: float) -> None:
    data = encode(extension, picture(200, 100))
    assert refused(f"a{extension}", data[: int(len(data) * keep)]) is Reason.CORRUPT_IMAGE


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("length", [0, 1, 3, 8, 12, 20, 30])
def test_stumps_are_refused_without_a_crash(extension: str, length: int) -> None:
    data = encode(extension, picture())[:length]
    assert refused(f"a{extension}", data) in (Reason.CORRUPT_IMAGE, Reason.UNSUPPORTED_IMAGE)


def test_absurd_dimensions_are_refused_from_the_header() -> None:
    assert refused("a.png", png_claiming(20_000, 20_000)) is Reason.IMAGE_TOO_LARGE
    assert refused("a.png", png_claiming(2**31 - 1, 2**31 - 1)) is Reason.IMAGE_TOO_LARGE
    assert refused("a.png", png_claiming(40_000, 1)) is Reason.IMAGE_TOO_LARGE


@pytest.mark.parametrize(
    ("path", "data", "reason"),
    [
        ("a.png", jpeg(), Reason.TYPE_MISMATCH),
        ("a.jpg", encode(".png", picture()), Reason.TYPE_MISMATCH),
        ("a.jpg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.UNSUPPORTED_IMAGE),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.UNSUPPORTED_IMAGE),
        ("a.jpg", b"%PDF-1.7", Reason.UNSUPPORTED_IMAGE),
        ("a.gif", b"GIF89a", Reason.UNSUPPORTED_IMAGE),
        ("a.jpg", b"hello", Reason.UNSUPPORTED_IMAGE),
    ],
)
def test_content_decides(path: str, data: bytes, reason: Reason) -> None:
    assert refused(path, data) is reason


@pytest.mark.parametrize("path", ["a.JPG", "b/c.JPEG", "x.y.jpg"])
def test_every_spelling_of_the_extension_is_fine(path: str) -> None:
    assert verify(path, jpeg())[0].kind is ImageKind.JPEG


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    data = with_orientation(encode(".jpg", picture(64, 48)), orientation)
    header, _ = verify("a.jpg", data)
    assert header.upright_size == ((64, 48) if orientation < 5 else (48, 64))
    ours = decode("a.jpg", data, header)
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)  # applies EXIF itself
    assert theirs is not None
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 2


def decoded(path: str, data: bytes) -> images.Pixels:
    """A decoded image."""
    header, _ = verify(path, data)
    return decode(path, data, header)


def test_sixteen_bit_samples_keep_their_upper_half() -> None:
    pixels = picture().astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(
        decoded("a.png", bytes(cv2.imencode(".png", pixels)[1])), picture()
    )


def test_gray_becomes_three_equal_channels() -> None:
    gray = cv2.cvtColor(picture(), cv2.COLOR_BGR2GRAY)
    out = decoded("a.png", bytes(cv2.imencode(".png", gray)[1]))
    np.testing.assert_array_equal(out, np.stack([gray] * 3, axis=2))


def test_transparency_is_blended_over_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (10, 20, 30, 128)
    out = decoded("a.png", bytes(cv2.imencode(".png", pixels)[1]))
    assert out[0, 0].tolist() == [10, 20, 30]
    assert out[0, 1].tolist() == [132, 137, 142]
    assert out[1, 1].tolist() == [255, 255, 255]


def test_palettes_are_looked_up() -> None:
    indices = bytes([0, 0, 1, 0, 1, 0])  # two rows: filter byte, then two indices
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes([255, 0, 0, 0, 0, 255])),
        (b"IDAT", zlib.compress(indices)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    out = decoded("a.png", data)
    assert out[0].tolist() == [[0, 0, 255], [255, 0, 0]]


def test_cmyk_becomes_rgb() -> None:
    inverted = np.full((16, 16, 4), 255, np.uint8)
    inverted[:, :, 0] = 0  # Adobe writes inverted samples: full cyan, no black
    data = bytes(simplejpeg.encode_jpeg(inverted, 95, "CMYK", "444"))
    blue, green, red = decoded("a.jpg", data)[8, 8].tolist()
    assert (blue > 245, green > 245, red < 10) == (True, True, True)
    header = read_header(data)
    assert header is not None
    assert not images.is_plain_jpeg(data, header)


def test_scaled_decode_never_falls_below_the_target() -> None:
    data = jpeg(1000, 600)
    header, _ = verify("a.jpg", data)
    out = decode("a.jpg", data, header, (333, 200))
    assert out.shape[1] >= 333
    assert out.shape[0] >= 200
    assert out.shape[1] < 1000


def test_encoding_is_deterministic_and_neutral_for_gray() -> None:
    gray = images.to_gray(picture())
    assert images.encode_jpeg(gray) == images.encode_jpeg(gray.copy())
    out = decoded("a.jpg", images.encode_jpeg(gray))
    assert (out[:, :, 0] == out[:, :, 1]).all()
    assert (out[:, :, 1] == out[:, :, 2]).all()
