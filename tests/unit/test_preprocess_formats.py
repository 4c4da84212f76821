"""Layouts are told apart, labels are paired with images, bad labels are named by line or object."""

from collections.abc import Mapping

import pytest

from services.preprocess.domain import InvalidData, Reason
from services.preprocess.formats import Format, Labels, Layout, find_layout, parse_labels
from tests.preprocess_samples import DATA_YAML, voc_xml

ROW = b"0 0.5 0.5 0.25 0.5\n"
XML = voc_xml(("cell", 1, 2, 10, 20))


def layout_of(files: Mapping[str, bytes], wanted: Format | None = None) -> Layout:
    """The layout of an archive in memory."""
    return find_layout(files, files.__getitem__, wanted)


def refused(files: Mapping[str, bytes], wanted: Format | None = None) -> Reason:
    """The reason an archive is refused for."""
    with pytest.raises(InvalidData) as caught:
        layout_of(files, wanted)
    return caught.value.problem.reason


def pairs(layout: Layout) -> dict[str, str | None]:
    """Label file by image."""
    return {sample.image: sample.label for sample in layout.samples}


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.jpg", "labels/train/a.txt"),
        ("train/images/a.jpg", "train/labels/a.txt"),
        ("images/a.png", "labels/a.txt"),
        ("set/images/a.jpg", "set/labels/a.txt"),
        ("Images/a.JPG", "Labels/a.txt"),
        ("a.jpg", "a.txt"),
        ("folder/a.jpg", "folder/a.txt"),
    ],
)
def test_yolo_layouts_are_recognised(image: str, label: str) -> None:
    layout = layout_of({image: b"", label: ROW})
    assert layout.format is Format.YOLO
    assert pairs(layout) == {image: label}
    assert layout.class_names is None
    assert layout.problems == ()


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("JPEGImages/a.jpg", "Annotations/a.xml"),
        ("VOC/JPEGImages/a.jpg", "VOC/Annotations/a.xml"),
        ("images/a.png", "annotations/a.xml"),
        ("train/a.jpg", "train/a.xml"),
        ("a.jpg", "Annotations/a.xml"),
    ],
)
def test_voc_layouts_are_recognised(image: str, label: str) -> None:
    layout = layout_of({image: b"", label: XML})
    assert layout.format is Format.VOC
    assert pairs(layout) == {image: label}


def test_images_without_label_are_background() -> None:
    files = {"images/a.jpg": b"", "images/b.jpg": b"", "labels/a.txt": ROW}
    assert pairs(layout_of(files)) == {"images/a.jpg": "labels/a.txt", "images/b.jpg": None}
    files = {"JPEGImages/a.jpg": b"", "JPEGImages/b.jpg": b"", "Annotations/a.xml": XML}
    assert pairs(layout_of(files)) == {
        "JPEGImages/a.jpg": "Annotations/a.xml",
        "JPEGImages/b.jpg": None,
    }


def test_pictures_that_are_not_part_of_the_data_are_left_alone() -> None:
    files = {
        "JPEGImages/a.jpg": b"",
        "Annotations/a.xml": XML,
        "SegmentationClass/a.png": b"",
        "logo.png": b"",
        "ImageSets/Main/train.txt": b"a\n",
    }
    assert list(pairs(layout_of(files))) == ["JPEGImages/a.jpg"]


def test_voc_annotation_is_matched_by_its_filename_element() -> None:
    xml = XML.replace(b"<object>", b"<filename>C:\\x\\b.jpg</filename><object>", 1)
    assert pairs(layout_of({"JPEGImages/b.jpg": b"", "Annotations/a.xml": xml})) == {
        "JPEGImages/b.jpg": "Annotations/a.xml"
    }


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ({"images/a.jpg": b"", "labels/a.txt": ROW, "labels/b.txt": ROW}, "labels/b.txt"),
        ({"a.jpg": b"", "a.txt": ROW, "b.txt": ROW}, "b.txt"),
        (
            {"JPEGImages/a.jpg": b"", "Annotations/a.xml": XML, "Annotations/b.xml": XML},
            "Annotations/b.xml",
        ),
    ],
)
def test_labels_without_image_are_named(files: dict[str, bytes], label: str) -> None:
    (problem,) = layout_of(files).problems
    assert (problem.where, problem.reason) == (label, Reason.MISSING_IMAGE)


def test_lists_and_readmes_are_no_labels() -> None:
    files = {"a.jpg": b"", "a.txt": ROW, "classes.txt": b"x\n", "README.txt": b"", "train.txt": b""}
    assert layout_of(files).problems == ()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"notes.txt": b""}, Reason.EMPTY_DATASET),
        ({"images/a.jpg": b""}, Reason.UNKNOWN_LAYOUT),
        ({"images/a.jpg": b"", "annotations.json": b"{}"}, Reason.UNKNOWN_LAYOUT),
        (
            {"images/a.jpg": b"", "labels/a.txt": ROW, "annotations/a.xml": XML},
            Reason.AMBIGUOUS_LAYOUT,
        ),
    ],
)
def test_what_cannot_be_told_is_refused(files: dict[str, bytes], reason: Reason) -> None:
    assert refused(files) is reason


def test_the_user_can_decide_between_two_layouts() -> None:
    files = {"images/a.jpg": b"", "labels/a.txt": ROW, "annotations/a.xml": XML}
    assert layout_of(files, Format.VOC).format is Format.VOC
    assert layout_of(files, Format.YOLO).format is Format.YOLO
    assert refused({"images/a.jpg": b"", "labels/a.txt": ROW}, Format.VOC) is Reason.UNKNOWN_LAYOUT


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("data.yaml", DATA_YAML),
        ("sub/data.yml", b"names: {0: disc, 1: square}\n"),
        ("classes.txt", b"disc\nsquare\n"),
        ("data.yaml", b"names: [disc, square]\npath: ../../etc\ndownload: rm -rf /\ntrain: /x\n"),
    ],
)
def test_class_names_are_read(name: str, data: bytes) -> None:
    files = {"images/a.jpg": b"", "labels/a.txt": ROW, name: data}
    assert layout_of(files).class_names == ("disc", "square")


@pytest.mark.parametrize(
    "data",
    [
        b"!!python/object/apply:os.system ['echo']",
        b"names: !custom [a]",
        b"a: &a [x]\nnames: [*a, *a]\n",
        b"names: " + b"[" * 50 + b"]" * 50,
        b"names: [a, b",
        b"names: []",
        b"nc: 3\nnames: [a]",
        b"names: [a, a]",
        b"names: [a, '']",
        b"names: {0: a, 2: b}",
        b"names: [[a]]",
        b"just text",
        b"\xff\xfe\xfa",
        b"names: ['" + b"a" * 300_000 + b"']",
        b'names: ["a\\u0007"]',
        b'names: ["a\\u202eb"]',
    ],
)
def test_hostile_data_yaml_is_refused(data: bytes) -> None:
    files = {"images/a.jpg": b"", "labels/a.txt": ROW, "data.yaml": data}
    assert refused(files) is Reason.BAD_DATA_YAML


def yolo(data: bytes, num_classes: int | None = 2) -> Labels:
    """Reads YOLO rows for an image of 100 x 50 pixels."""
    return parse_labels(Format.YOLO, "labels/a.txt", data, (100, 50), num_classes)


def voc(data: bytes) -> Labels:
    """Reads a VOC annotation for an image of 100 x 50 pixels."""
    return parse_labels(Format.VOC, "a.xml", data, (100, 50), None)


def test_yolo_rows_become_pixel_boxes() -> None:
    labels = yolo(b"\xef\xbb\xbf1 0.5 0.5 0.2 0.4\r\n\r\n0 0.1 0.1 0.2 0.2")
    assert labels.classes == (1, 0)
    assert labels.boxes == pytest.approx((40, 15, 60, 35, 0, 0, 20, 10))
    assert labels.problems == ()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"0 nan 0.5 0.2 0.2", Reason.BAD_BOX),
        (b"0 0.5 inf 0.2 0.2", Reason.BAD_BOX),
        (b"0 0.5 0.5 0 0.2", Reason.BAD_BOX),
        (b"0 0.5 0.5 -0.1 0.2", Reason.BAD_BOX),
        (b"0 0.95 0.5 0.2 0.2", Reason.BAD_BOX),
        (b"0 50 25 20 20", Reason.BAD_BOX),
        (b"0 0.5 0.5 0.2", Reason.BAD_BOX),
        (b"0 0.1 0.1 0.2 0.2 0.3 0.3", Reason.BAD_BOX),
        (b"0 0.5 0.5 0.2 wide", Reason.BAD_BOX),
        (b"2 0.5 0.5 0.2 0.2", Reason.UNKNOWN_CLASS),
        (b"-1 0.5 0.5 0.2 0.2", Reason.UNKNOWN_CLASS),
        (b"1.5 0.5 0.5 0.2 0.2", Reason.UNKNOWN_CLASS),
        (b"99999999999999999999 0.5 0.5 0.2 0.2", Reason.UNKNOWN_CLASS),
        (b"cat 0.5 0.5 0.2 0.2", Reason.UNKNOWN_CLASS),
    ],
)
def test_bad_yolo_rows_are_named_by_line(row: bytes, reason: Reason) -> None:
    labels = yolo(b"0 0.5 0.5 0.2 0.2\n\n" + row + b"\n1 0.5 0.5 0.2 0.2\n")
    (problem,) = labels.problems
    assert (problem.where, problem.reason) == ("labels/a.txt:3", reason)
    assert labels.classes == (0, 1)


def test_voc_boxes_are_continuous_edges() -> None:
    labels = voc(voc_xml(("cell", 1, 2, 10, 20), ("disc", 0, 0, 100, 50)))
    assert labels.classes == ("cell", "disc")
    assert labels.boxes == (1, 2, 10, 20, 0, 0, 100, 50)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (("cell", 5, 5, 5, 9), Reason.BAD_BOX),
        (("cell", 5, 5, float("nan"), 9), Reason.BAD_BOX),
        (("cell", 5, 5, 102, 9), Reason.BAD_BOX),
        (("", 5, 5, 9, 9), Reason.UNKNOWN_CLASS),
        (("x" * 300, 5, 5, 9, 9), Reason.UNKNOWN_CLASS),
    ],
)
def test_bad_voc_objects_are_named_by_number(
    item: tuple[str, float, float, float, float], reason: Reason
) -> None:
    labels = voc(voc_xml(("cell", 1, 2, 10, 20), item))
    (problem,) = labels.problems
    assert (problem.where, problem.reason) == ("a.xml object[2]", reason)
    assert labels.classes == ("cell",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            b"<!DOCTYPE annotation [<!ENTITY a 'b'>]><annotation>&a;</annotation>",
            Reason.DTD_FORBIDDEN,
        ),
        (b"<!DOCTYPE annotation SYSTEM 'http://x/y.dtd'><annotation/>", Reason.DTD_FORBIDDEN),
        (b"<annotation><object>", Reason.CORRUPT_LABEL),
        (b"<other/>", Reason.CORRUPT_LABEL),
        (b"", Reason.CORRUPT_LABEL),
        (b"\x00\x01\x02", Reason.CORRUPT_LABEL),
        (b"<?xml version='1.0' encoding='nonsense'?><annotation/>", Reason.CORRUPT_LABEL),
    ],
)
def test_unreadable_annotations_are_refused_as_a_whole(data: bytes, reason: Reason) -> None:
    with pytest.raises(InvalidData) as caught:
        voc(data)
    assert caught.value.problem.reason is reason


def test_a_binary_label_file_is_refused() -> None:
    with pytest.raises(InvalidData) as caught:
        yolo(b"\xff\xd8\xff\xe0")
    assert caught.value.problem.reason is Reason.CORRUPT_LABEL
