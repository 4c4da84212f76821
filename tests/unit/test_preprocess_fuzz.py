"""Whatever the bytes, the readers answer with a reason and nothing else."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.preprocess import images
from services.preprocess.archive import ArchiveError, Limits, check_name, list_entries, read_entry
from services.preprocess.domain import InvalidData, place_key
from services.preprocess.formats import Format, find_layout, parse_labels
from services.preprocess.headers import EXTENSIONS
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
        header, _ = images.verify(f"a{extension}", data)
        assert images.decode("a", data, header).shape[1::-1] == header.upright_size
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
