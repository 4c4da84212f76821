"""What goes into a bundle."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from detflow.resize import Resize
from services.preprocess.augment import ORIGINAL, Augmentation, Copy
from services.preprocess.bundle import (
    GroundTruth,
    Transform,
    copy_boxes,
    plan_shards,
    transform_image,
)
from services.preprocess.domain import Image
from services.preprocess.shards import MAX_SOURCE_BYTES, MAX_SOURCES
from tests.preprocess_samples import encode, jpeg, picture, with_orientation

ALL = (
    *(Copy(kind) for kind in list(Augmentation)[:-2]),
    Copy(Augmentation.BRIGHTNESS, -30),
    Copy(Augmentation.CONTRAST, 1.5),
)


def transform(
    max_side_px: int = 0, grayscale: bool = False, copies: tuple[Copy, ...] = (ORIGINAL,)
) -> Transform:
    """A transform that leaves out what is not said."""
    return Transform(resize=Resize(max_side_px), grayscale=grayscale, copies=copies)


def image(path: str, data: bytes, width: int = 64, height: int = 48) -> Image:
    """An image of a dataset with one box."""
    return Image(
        path,
        hashlib.sha256(data).hexdigest(),
        width,
        height,
        "k",
        0,
        len(data),
        (1,),
        (8, 12, 40, 36),
    )


@given(st.lists(st.integers(1, MAX_SOURCE_BYTES), min_size=1, max_size=2000), st.integers(1, 6))
def test_shards_hold_every_source_once_within_the_limits(sizes: list[int], copies: int) -> None:
    sources = list(range(10, 10 + len(sizes)))
    plans = plan_shards("train", sources, sizes, copies)
    assert [s for plan in plans for s in plan.sources] == sources
    assert [plan.position for plan in plans] == list(range(len(plans)))
    assert all(b.first == a.first + len(a.sources) for a, b in pairwise(plans))
    for plan in plans:
        assert 1 <= len(plan.sources) <= MAX_SOURCES
        size = sum(sizes[s - 10] * copies for s in plan.sources)
        assert size <= MAX_SOURCE_BYTES or len(plan.sources) == 1


def test_an_unchanged_upright_jpeg_is_copied_byte_for_byte() -> None:
    data = jpeg()
    assert list(transform_image(image("a.jpg", data), data, transform())) == [data]
    assert list(transform_image(image("a.jpg", data), data, transform(max_side_px=64))) == [data]


def test_everything_else_is_encoded_again() -> None:
    turned = with_orientation(jpeg(), 6)
    (out,) = transform_image(image("a.jpg", turned, 48, 64), turned, transform())
    assert simplejpeg.decode_jpeg_header(out)[:2] == (64, 48)
    assert b"Exif" not in out

    png = encode(".png", picture())
    (out,) = transform_image(image("a.png", png), png, transform())
    assert simplejpeg.decode_jpeg_header(out) == (48, 64, "YCbCr", "420")

    data = jpeg()
    (out,) = transform_image(image("a.jpg", data), data, transform(max_side_px=32))
    assert simplejpeg.decode_jpeg_header(out)[:2] == (24, 32)

    (out,) = transform_image(image("a.jpg", data), data, transform(grayscale=True))
    pixels = simplejpeg.decode_jpeg(out, "BGR")
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()


def test_every_augmentation_adds_a_copy_in_order_and_the_bytes_are_the_same_every_time() -> None:
    data = jpeg(60, 40)
    source = image("a.jpg", data, 60, 40)
    copies = list(transform_image(source, data, transform(copies=ALL)))
    sizes = [simplejpeg.decode_jpeg_header(copy)[1::-1] for copy in copies]
    upright, turned = (60, 40), (40, 60)
    assert sizes == [upright] * 3 + [turned, upright, turned] + [upright] * 3
    assert copies == list(transform_image(source, data, transform(copies=ALL)))
    plain, flipped = (simplejpeg.decode_jpeg(copy, "BGR").astype(int) for copy in copies[:2])
    assert np.abs(plain[:, ::-1] - flipped).mean() < 3


def test_ground_truth_follows_size_and_augmentation(tmp_path: Path) -> None:
    data = b"1"
    truth = GroundTruth(tmp_path / "i", tmp_path / "a")
    recipe = transform(32, copies=(ORIGINAL, Copy(Augmentation.ROTATE_90)))
    background = Image("b.jpg", "00", 10, 20, "k", 0, 1, (), ())
    truth.extend([image("a.jpg", data), background], recipe)
    truth.finish(["disc", "square"], tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_bytes())

    assert (truth.num_images, truth.num_boxes) == (4, 2)
    assert [(i["id"], i["width"], i["height"]) for i in document["images"]] == [
        (1, 32, 24),
        (2, 24, 32),
        (3, 10, 20),
        (4, 20, 10),
    ]
    assert document["images"][1]["file_name"] == "00000002.jpg"
    assert document["images"][1]["source"] == {
        "path": "a.jpg",
        "sha256": hashlib.sha256(data).hexdigest(),
        "augmentation": "rotate_90",
    }
    assert document["annotations"] == [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 2,
            "bbox": [4, 6, 16, 12],
            "area": 192,
            "iscrowd": 0,
        },
        {
            "id": 2,
            "image_id": 2,
            "category_id": 2,
            "bbox": [6, 4, 12, 16],
            "area": 192,
            "iscrowd": 0,
        },
    ]
    assert document["categories"] == [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]


def test_ground_truth_without_images_is_valid(tmp_path: Path) -> None:
    truth = GroundTruth(tmp_path / "i", tmp_path / "a")
    truth.finish([], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_bytes()) == {
        "images": [],
        "annotations": [],
        "categories": [],
    }


def test_copies_of_another_size_are_decoded_once_each_and_all_have_the_exact_size() -> None:
    data = jpeg(90, 40)
    source = image("a.jpg", data, 90, 40)
    exact = Transform(resize=Resize(exact_size=(64, 32)), copies=ALL)
    for copied in transform_image(source, data, exact):
        assert simplejpeg.decode_jpeg_header(copied)[:2] == (32, 64)
    assert {(width, height) for _, width, height, _ in copy_boxes(source, exact)} == {(64, 32)}
