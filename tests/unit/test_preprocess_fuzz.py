"""Whatever the bytes, the readers answer with a reason and nothing else."""

import io
import json
import os
import tarfile
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detflow.image_headers import EXTENSIONS
from services.preprocess.archive import ArchiveError, Limits, check_name, list_entries, read_entry
from services.preprocess.domain import InvalidData, place_key
from services.preprocess.formats import Format, find_layout, parse_labels
from services.preprocess.images import decode, verify
from tests.preprocess_import import (
    download,
    forget_peak_memory,
    import_archive,
    peak_memory_bytes,
)
from tests.preprocess_samples import encode, pack, picture, voc_xml, with_orientation, yolo_files

LIMITS = Limits(entries=100, total_bytes=1 << 22, entry_bytes=1 << 20, free_bytes=1 << 20)
SIZE = (64, 48)


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """An original with bytes replaced, inserted or cut off."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 2)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                data[at:at] = draw(st.binary(max_size=8))
            case _:
                del data[at : at + draw(st.integers(1, 50))]
    return bytes(data)


IMAGES = [
    with_orientation(encode(".jpg", picture(24, 16)), 6),
    *(encode(extension, picture(24, 16)) for extension in (".png", ".bmp", ".webp", ".tiff")),
]
ARCHIVE = pack(yolo_files(2, size=(16, 16)))


@settings(max_examples=400, deadline=None)
@given(damaged(IMAGES) | st.binary(max_size=200), st.sampled_from(sorted(EXTENSIONS)))
def test_damaged_images(data: bytes, extension: str) -> None:
    try:
        header, _ = verify(f"a{extension}", data)
        assert decode("a", data, header).shape[1::-1] == header.upright_size
    except InvalidData as error:
        assert error.problem.description


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damaged([ARCHIVE]) | st.binary(max_size=200))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_archives(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "archive.zip"
    path.write_bytes(data)
    try:
        entries = list_entries(path, LIMITS)
        with path.open("rb") as file:
            find_layout(entries, lambda name: read_entry(file, entries[name], LIMITS))
            for entry in entries.values():
                assert len(read_entry(file, entry, LIMITS)) == entry.size_bytes
    except (ArchiveError, InvalidData):
        pass


@settings(max_examples=200, deadline=None)
@given(
    damaged([b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.1 0.1\n"]) | st.text().map(str.encode),
    st.none() | st.integers(1, 5),
)
def test_damaged_rows(data: bytes, num_classes: int | None) -> None:
    try:
        labels = parse_labels(Format.YOLO, "a.txt", data, SIZE, num_classes)
    except InvalidData:
        return
    assert len(labels.boxes) == 4 * len(labels.classes)
    assert all(0 <= v <= 64 for v in labels.boxes)


@settings(max_examples=200, deadline=None)
@given(damaged([voc_xml(("cell", 1, 2, 10, 20), ("disc", 0, 0, 64, 48))]) | st.binary())
def test_damaged_annotations(data: bytes) -> None:
    try:
        labels = parse_labels(Format.VOC, "a.xml", data, SIZE, None)
    except InvalidData:
        return
    assert len(labels.boxes) == 4 * len(labels.classes)
    assert all(0 <= v <= 64 for v in labels.boxes)


@given(st.text() | st.sampled_from(["²", "a:٣", "object[²]"]))
def test_any_name_is_judged(name: str) -> None:
    check_name(name)
    place_key(name)


@settings(max_examples=200, deadline=None)
@given(damaged([b"names: {0: disc, 1: square}\nnc: 2\ntrain: ../x\n"]) | st.binary())
def test_damaged_yaml(data: bytes) -> None:
    files = {"images/a.jpg": b"", "labels/a.txt": b"", "data.yaml": data}
    try:
        layout = find_layout(files, files.__getitem__)
    except InvalidData:
        return
    assert layout.class_names


NUM_CASES = int(os.environ.get("DETFLOW_FUZZ_CASES", "300"))
MAX_GROWTH_BYTES = 512 << 20


def _coco(num_images: int) -> bytes:
    return json.dumps(
        {
            "images": [{"id": i, "file_name": f"{i:03d}.jpg"} for i in range(num_images)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 5, 6], "iscrowd": i % 2}
                for i in range(num_images)
            ],
            "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}],
        }
    ).encode()


def _whole_archives() -> list[dict[str, bytes]]:
    """A good archive of each format, with everything that a reader may look at."""
    yolo = yolo_files(4, size=(16, 16))
    pictures = {path: data for path, data in yolo.items() if path.endswith(".jpg")}
    others = {f"images/x{e}": encode(e, picture(16, 16)) for e in (".png", ".bmp", ".webp", ".tif")}
    lists = {"train.txt": b"images/000.jpg\nimages/001.jpg\n", "valid.txt": b"images/002.jpg\n"}
    xml = voc_xml(("disc", 1, 2, 10, 12), ("square", 0, 0, 16, 16))
    voc = {path.replace("images", "JPEGImages"): data for path, data in pictures.items()}
    voc |= {f"Annotations/{i:03d}.xml": xml for i in range(3)}
    voc |= {"ImageSets/Main/train.txt": b"000\n001\n", "ImageSets/Main/val.txt": b"002\n"}
    coco = {**pictures, "annotations/instances_train.json": _coco(2)}
    return [{**yolo, **others, **lists}, voc, coco]


def _pack_tar(files: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _mutated(random: Random, data: bytes) -> bytes:
    """Replaces, inserts, deletes, repeats or copies a few bytes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(changed) + 1)
        end = at + random.choice((1, 1, 2, 4, 30))
        match random.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                changed[at:at] = random.choice(_TOKENS)
            case 2:
                changed[at:end] = random.choice(_TOKENS)
            case 3:
                del changed[at:end]
            case 4:
                changed[at:at] = changed[at:end] * random.choice((2, 50))
            case _:
                start = random.randrange(len(changed) + 1)
                changed[at:end] = changed[start : start + end - at]
    return bytes(changed)


_TOKENS = [
    *(b"\x00", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80", b"\n", b" ", b"../", b"/", b"\\"),
    *(b"-1", b"0", b"1e999", b"nan", b"NaN", b"-Infinity", b"null", b"true", b"9" * 30, b"0.5"),
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"<", b">", b"</object>", b"&a;", b"<!DOCTYPE a>"),
    *(
        b"*a",
        b"&a ",
        b"!!python/object:a ",
        b"\\ud800",
        b"\xed\xa0\x80",
        b"\xe2\x80\xae",
        b"[" * 500,
    ),
    *("é한😀\u0301\ufffe".encode(), b"PK\x01\x02", b"PK\x03\x04", b"\xff\xd8\xff\xe0", b"II*\x00"),
]


def _case(random: Random, archives: list[dict[str, bytes]]) -> bytes:
    """An archive with damage: to its bytes, to one file, or to a name."""
    files = dict(random.choice(archives))
    # Labels and lists are few bytes beside the images: hit them more often.
    texts = [path for path in files if not path.endswith((".jpg", ".png", ".bmp", ".webp", ".tif"))]
    path = random.choice(texts if random.random() < 0.7 else sorted(files))
    match random.randrange(8):
        case 0:
            return _mutated(random, pack(files))
        case 1:
            return _mutated(random, _pack_tar(files, random.choice(("w", "w:gz"))))
        case 2:
            renamed = _mutated(random, path.encode()).decode("utf-8", "replace")
            renamed = renamed.replace("\0", "") or "x"  # zipfile cuts names there
            files[renamed] = files.pop(path)
        case _:
            files[path] = _mutated(random, files[path])
    return pack(files)


@pytest.mark.timeout(0 if NUM_CASES > 1000 else 300)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_data_sets_harm_nothing(tmp_path: Path) -> None:
    """Whatever the damage, there is an answer within 2 s, in little memory."""
    archives = _whole_archives()
    goods = [
        import_archive(pack(files), tmp_path, prefix=f"good{i}") for i, files in enumerate(archives)
    ]
    assert [good.format for good in goods] == [Format.YOLO, Format.VOC, Format.COCO]
    assert not any(p.num_left_out for good in goods for p in good.problems)
    before = [download(good, tmp_path, Format.COCO) for good in goods]
    memory = forget_peak_memory()
    first = int(os.environ.get("DETFLOW_FUZZ_SEED", "0"))
    for seed in range(first, first + NUM_CASES):
        data = _case(Random(seed), archives)
        began = time.perf_counter()
        try:
            imported = import_archive(data, tmp_path, prefix="case")
        except Exception as error:
            raise AssertionError(f"DETFLOW_FUZZ_SEED={seed} breaks the import") from error
        seconds = time.perf_counter() - began
        assert seconds < 2, f"DETFLOW_FUZZ_SEED={seed} took {seconds:.1f} s"
        assert imported.images or imported.problems or not imported.class_names
        for problem in imported.problems:
            assert problem.where.encode() and problem.description.encode(), seed
            assert "\0" not in problem.where + problem.description, seed
        for image in imported.images:
            assert len(image.boxes) == 4 * len(image.class_ids), seed
    assert peak_memory_bytes() - memory < MAX_GROWTH_BYTES
    assert [download(good, tmp_path, Format.COCO) for good in goods] == before
