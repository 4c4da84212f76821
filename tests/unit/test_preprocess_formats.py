"""Layouts are told apart, labels are paired with images, bad labels are named by line or object."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.preprocess.domain import Image, InvalidData, Reason, place_key
from services.preprocess.formats import (
    Format,
    Labels,
    Layout,
    find_layout,
    json_stream,
    parse_labels,
    read_rows,
)
from services.preprocess.packing import render_yolo
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
        ("top/set/train/images/a.jpg", "top/set/train/labels/a.txt"),
        ("top/set/images/a.jpg", "top/set/labels/a.txt"),
        ("top/a.jpg", "top/labels/a.txt"),
        ("obj_train_data/a.jpg", "obj_train_data/a.txt"),
        ("img/a.jpg", "labels/a.txt"),
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
        ("top/VOCdevkit/VOC2012/JPEGImages/a.jpg", "top/VOCdevkit/VOC2012/Annotations/a.xml"),
        ("top/a.jpg", "top/Annotations/a.xml"),
        ("images/a.jpg", "labels/a.xml"),
        ("images/a.jpg", "xmls/a.xml"),
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


def test_pictures_that_are_not_part_of_the_data_are_left_out_with_a_warning() -> None:
    files = {
        "JPEGImages/a.jpg": b"",
        "Annotations/a.xml": XML,
        "SegmentationClass/a.png": b"",
        "logo.png": b"",
        "ImageSets/Main/train.txt": b"a\n",
    }
    layout = layout_of(files)
    assert list(pairs(layout)) == ["JPEGImages/a.jpg"]
    (problem,) = layout.problems
    assert (problem.where, problem.reason) == ("logo.png", Reason.NOT_LISTED)
    assert problem.num_left_out == 0


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


def splits(layout: Layout) -> dict[str, str | None]:
    """Split by image."""
    return {sample.image: sample.split for sample in layout.samples}


def yolo_of(*images: str, **more: bytes) -> dict[str, bytes]:
    """A YOLO archive of images, each with its label beside it or in labels/."""
    files = dict(more)
    for image in images:
        files[image] = b""
        files[image.replace("images", "labels").replace(".jpg", ".txt")] = ROW
    return files


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("images/train", "train"),
        ("train/images", "train"),
        ("Train/images", "train"),
        ("set/images/train2017", "train"),
        ("valid/images", "val"),
        ("images/val", "val"),
        ("images/validation", "val"),
        ("val2017", "val"),
        ("test/images/train", "train"),
        ("testing", "test"),
        ("images", None),
        ("trains/images", None),
        ("contest/images", None),
    ],
)
def test_folders_tell_the_split(folder: str, split: str | None) -> None:
    assert splits(layout_of(yolo_of(f"{folder}/a.jpg"))) == {f"{folder}/a.jpg": split}


def test_a_data_yaml_hints_at_splits_and_is_followed_nowhere() -> None:
    files = yolo_of("images/tr/a.jpg", "images/va/b.jpg", "images/x/c.jpg")
    files["data.yaml"] = (
        b"names: [disc]\npath: /etc\ntrain: ../data/images/tr\nval: [./images/va/]\n"
        b"test: ../../etc/passwd\ndownload: http://127.0.0.1/x\n"
    )
    files["images/va/b.jpg"] = b""
    found = splits(layout_of(files))
    assert found == {"images/tr/a.jpg": None, "images/va/b.jpg": "val", "images/x/c.jpg": None}
    files["data.yaml"] = b"names: [disc]\ntrain: images/tr\nval: images/va\n"
    assert splits(layout_of(files))["images/tr/a.jpg"] == "train"


def test_a_hint_that_names_one_folder_twice_says_nothing() -> None:
    files = yolo_of("images/train/a.jpg", "images/val/b.jpg")
    files["data.yaml"] = b"names: [disc]\ntrain: images\nval: images\n"
    assert splits(layout_of(files)) == {"images/train/a.jpg": "train", "images/val/b.jpg": "val"}


def test_darknet_lists_tell_the_split() -> None:
    files = yolo_of("obj_train_data/a.jpg", "obj_train_data/b.jpg", "obj_train_data/c.jpg")
    files["obj.data"] = b"classes = 1\ntrain = data/train.txt\n"
    files["obj.names"] = b"disc\n"
    files["train.txt"] = b"data/obj_train_data/a.jpg\r\n"
    files["valid.txt"] = b"/home/me/obj_train_data/b.jpg\n\n"
    layout = layout_of(files)
    assert layout.class_names == ("disc",)
    assert splits(layout) == {
        "obj_train_data/a.jpg": "train",
        "obj_train_data/b.jpg": "val",
        "obj_train_data/c.jpg": None,
    }


def test_image_sets_of_voc_tell_the_split() -> None:
    files: dict[str, bytes] = {}
    for stem in ("a", "b b", "c", "d", "e"):
        files |= {f"VOC/JPEGImages/{stem}.jpg": b"", f"VOC/Annotations/{stem}.xml": XML}
    files["VOC/ImageSets/Main/train.txt"] = b"a\n"
    files["VOC/ImageSets/Main/val.txt"] = b"b b\r\n"
    files["VOC/ImageSets/Main/trainval.txt"] = b"a\nb b\nc\n"
    files["VOC/ImageSets/Main/test.txt"] = b"d"
    files["VOC/ImageSets/Main/cell_train.txt"] = b"e 1\n"
    layout = layout_of(files)
    found = {image.rpartition("/")[2]: split for image, split in splits(layout).items()}
    assert found == {
        "a.jpg": "train",
        "b b.jpg": "val",
        "c.jpg": "train",
        "d.jpg": "test",
        "e.jpg": None,
    }
    assert layout.problems == ()


def coco(*names: str, **more: object) -> bytes:
    """A COCO file of images of some names, one box each."""
    numbers = range(len(names))
    return json.dumps(
        {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 4, "bbox": [i, 2, 3, 4]} for i in numbers
            ],
            "categories": [{"id": 4, "name": "cat"}, {"id": 2, "name": " dog "}],
            **more,
        }
    ).encode()


@pytest.mark.parametrize(
    ("images", "path", "names", "split"),
    [
        (["a.jpg"], "annotations.json", ["a.jpg"], None),
        (["images/a.jpg"], "instances_train.json", ["a.jpg"], "train"),
        (["train/a.jpg"], "train/_annotations.coco.json", ["a.jpg"], "train"),
        (["val2017/a.jpg"], "annotations/instances_val2017.json", ["a.jpg"], "val"),
        (["set/images/test/a.jpg"], "set/annotations/test.json", ["a.jpg"], "test"),
        (["images/train/a.jpg"], "annotations/all.json", ["train/a.jpg"], "train"),
        (["data/x/a.jpg"], "labels.json", ["C:\\photos\\a.jpg"], None),
        (["data/x/A.JPG"], "labels.json", ["./a.jpg"], None),
        (["x/e\u0301.jpg"], "labels.json", ["\u00e9.jpg"], None),
        (["x/1/a.jpg", "x/2/a.jpg"], "labels.json", ["2/a.jpg", "1/a.jpg"], None),
    ],
)
def test_coco_images_are_found(
    images: list[str], path: str, names: list[str], split: str | None
) -> None:
    layout = layout_of({**dict.fromkeys(images, b""), path: coco(*names)})
    assert layout.format is Format.COCO
    assert layout.problems == ()
    assert splits(layout) == dict.fromkeys(images, split)


def test_several_coco_files_are_several_splits_of_the_same_classes() -> None:
    other = [{"id": 1, "name": "dog"}, {"id": 9, "name": "cat"}]
    annotations = [{"image_id": 0, "category_id": 9, "bbox": [1, 2, 3, 4], "iscrowd": 1}]
    files = {
        "train2017/a.jpg": b"",
        "val2017/a.jpg": b"",
        "annotations/instances_train2017.json": coco("a.jpg"),
        "annotations/instances_val2017.json": coco(
            "a.jpg", categories=other, annotations=annotations
        ),
        "annotations/captions_val2017.json": b'{"images": [], "annotations": []}',
        "annotations/person_keypoints_val2017.json": coco(
            "a.jpg", categories=[{"id": 4, "name": "person", "keypoints": ["nose"]}]
        ),
        "settings.json": b"{}",
    }
    layout = layout_of(files)
    assert layout.problems == ()
    assert layout.class_names == ("dog", "cat")
    assert splits(layout) == {"train2017/a.jpg": "train", "val2017/a.jpg": "val"}
    train, val = (read_rows(sample.rows, (50, 50)) for sample in layout.samples if sample.rows)
    assert (train.classes, train.boxes, train.crowds) == ((1,), (0, 2, 3, 6), ())
    assert (val.classes, val.crowds) == ((1,), (True,))


def test_annotations_keep_their_order_and_their_index() -> None:
    annotations = [
        {"image_id": 1, "category_id": 4, "bbox": [1, 1, 2, 2]},
        {
            "image_id": 0,
            "category_id": 2,
            "bbox": [2, 2, float("nan"), 2],
            "segmentation": {"counts": "x"},
        },
        {
            "image_id": 1,
            "category_id": 2,
            "bbox": [3, 3, 2, 2],
            "segmentation": [[1, 2, 3, 4, 5, 6]],
        },
    ]
    layout = layout_of(
        {"a.jpg": b"", "b.jpg": b"", "x.json": coco("a.jpg", "b.jpg", annotations=annotations)}
    )
    a, b = (read_rows(sample.rows, (50, 50)) for sample in layout.samples if sample.rows)
    assert [(p.where, p.reason) for p in a.problems] == [
        ("x.json annotations[1].bbox", Reason.BAD_BOX)
    ]
    assert (b.classes, b.boxes) == ((1, 0), (1, 1, 3, 3, 3, 3, 5, 5))


def test_a_large_file_is_read_in_pieces_wherever_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    document = b"\xef\xbb\xbf" + coco("한.jpg", "😀.jpg", info={"n": 12345.678, "t": "é" * 50})
    expected = list(json_stream.members("x.json", document))
    assert len(expected) == 10
    for size in range(1, 40):
        monkeypatch.setattr(json_stream, "_WINDOW_BYTES", size)
        assert list(json_stream.members("x.json", document)) == expected


def test_a_list_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_ELEMENTS", 2)
    files = {"a.jpg": b"", "x.json": coco("a.jpg", "b.jpg", "c.jpg")}
    with pytest.raises(InvalidData) as caught:
        layout_of(files)
    assert caught.value.problem.reason is Reason.ARCHIVE_LIMIT
    assert caught.value.problem.where == "x.json images[2]"


def test_a_class_list_of_a_voc_archive_names_classes_without_boxes() -> None:
    files = {"JPEGImages/a.jpg": b"", "Annotations/a.xml": XML, "classes.txt": b"none\ncell\n"}
    assert layout_of(files).class_names == ("none", "cell")
    files["classes.txt"] = b"not\nnot\n"
    assert layout_of(files).class_names is None


def test_other_yaml_files_do_not_hide_the_one_that_is_meant() -> None:
    files = {"set/images/a.jpg": b"", "set/labels/a.txt": ROW, "compose.yaml": b"services: {}"}
    assert layout_of(files).class_names is None
    files["set/coco8.yaml"] = b"names: [other]"
    assert layout_of(files).class_names is None
    files["set/data.yaml"] = DATA_YAML
    assert layout_of(files).class_names == ("disc", "square")
    del files["set/data.yaml"], files["compose.yaml"]
    assert layout_of(files).class_names == ("other",)


@given(st.integers(1, 5000), st.data())
def test_yolo_rows_of_a_download_give_the_very_box_back(side: int, data: st.DataObject) -> None:
    low = data.draw(st.just(0.0) | st.floats(1e-9, side - 0.5))
    high = data.draw(st.just(float(side)) | st.floats(low + 0.5, side))
    image = Image("a.jpg", "", side, side, "", 0, 0, (0,), (low, low, high, high))
    labels = parse_labels(Format.YOLO, "a.txt", render_yolo(image), (side, side), 1)
    assert (labels.boxes, labels.problems) == (image.boxes, ())


def test_six_digits_leave_as_the_same_six() -> None:
    rows = b"0 0.513300 0.334567 0.123456 0.100001\n0 0.500000 0.500000 1.000000 1.000000\n"
    labels = parse_labels(Format.YOLO, "a.txt", rows, (1333, 807), 1)
    image = Image("a.jpg", "", 1333, 807, "", 0, 0, (0, 0), labels.boxes)
    assert render_yolo(image) == rows


def test_places_are_in_the_order_of_their_numbers() -> None:
    places = [
        *("a.json annotations[9].bbox", "a.json annotations[10].bbox", "a.json images[2].id"),
        *("a.txt:2", "a.txt:10", "a.xml object[3]", "a.xml object[20]", "images/003.jpg"),
    ]
    assert sorted(reversed(places), key=place_key) == places
