"""Hostile archives are refused with the right reason, before anything is unpacked."""

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from services.preprocess.archive import ArchiveError, Limits, list_entries, read_entry
from services.preprocess.domain import InvalidData, Reason
from tests.preprocess_samples import jpeg, pack

SMALL = Limits(entries=20, total_bytes=1 << 20, entry_bytes=1 << 19, ratio=20, free_bytes=1 << 16)


def refused(path: Path, data: bytes, limits: Limits = SMALL) -> Reason:
    """The reason an archive is refused for by its table of contents."""
    file = path / "archive.zip"
    file.write_bytes(data)
    with pytest.raises(ArchiveError) as caught:
        list_entries(file, limits)
    return caught.value.problems.first()[0].reason


def unpack_all(path: Path, data: bytes, limits: Limits = SMALL) -> dict[str, bytes]:
    """Everything in an archive."""
    file = path / "archive.zip"
    file.write_bytes(data)
    entries = list_entries(file, limits)
    with file.open("rb") as archive:
        return {name: read_entry(archive, entry, limits) for name, entry in entries.items()}


def with_entry(name: str, **attributes: int) -> bytes:
    """An archive of one entry with odd attributes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("x" * len(name))
        for key, value in attributes.items():
            setattr(info, key, value)
        archive.writestr(info, b"data")
    return out.getvalue().replace(b"x" * len(name), name.encode())


@pytest.mark.parametrize(
    "name", ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "C:/a.jpg", "c:a.jpg", "a\\b.jpg", ".."]
)
def test_unsafe_paths_are_refused(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, with_entry(name)) is Reason.UNSAFE_PATH


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\x00b.jpg", "a\x7f.jpg", "a//b.jpg", "./a.jpg"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, with_entry(name)) is Reason.BAD_NAME


@pytest.mark.parametrize(
    "names",
    [
        ("images/a.jpg", "images/A.jpg"),
        ("images/caf\u00e9.jpg", "images/cafe\u0301.jpg"),
        ("Images/a.jpg", "images/a.JPG"),
    ],
)
def test_names_that_differ_only_in_case_or_unicode_form_are_refused(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    assert refused(tmp_path, pack(dict.fromkeys(names, b"x"))) is Reason.DUPLICATE_NAME


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.jpg", b"1")
        archive.writestr("a.jpg", b"2")
    assert refused(tmp_path, out.getvalue()) is Reason.DUPLICATE_NAME


def test_other_unicode_works(tmp_path: Path) -> None:
    names = ["이미지/고양이 1.jpg", "images/😀.jpg", "images/ж.txt"]
    assert sorted(unpack_all(tmp_path, pack(dict.fromkeys(names, b"x")))) == sorted(names)


def test_utf8_names_without_the_flag_are_read_as_utf8(tmp_path: Path) -> None:
    raw = "고양이.jpg".encode()
    data = pack({"x" * len(raw): b"1"}).replace(b"x" * len(raw), raw)
    assert list(unpack_all(tmp_path, data)) == ["고양이.jpg"]


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, "images/a.jpg"),
        ({"external_attr": (stat.S_IFCHR | 0o600) << 16}, "images/a.jpg"),
        ({"external_attr": (stat.S_IFIFO | 0o600) << 16}, "images/a.jpg"),
        ({"compress_type": zipfile.ZIP_BZIP2}, "images/a.jpg"),
        ({"compress_type": zipfile.ZIP_LZMA}, "images/a.jpg"),
        ({}, "more.zip"),
        ({}, "more.tar.gz"),
        ({}, "more.7z"),
    ],
)
def test_unsupported_entries_are_refused(
    tmp_path: Path, attributes: dict[str, int], name: str
) -> None:
    assert refused(tmp_path, with_entry(name, **attributes)) is Reason.UNSUPPORTED_ENTRY


def test_encrypted_entries_are_refused(tmp_path: Path) -> None:
    data = bytearray(pack({"a.jpg": b"x"}))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    assert refused(tmp_path, bytes(data)) is Reason.UNSUPPORTED_ENTRY


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"PK\x03\x04",
        pack({"a.jpg": jpeg()})[:-30],
        pack({"a.jpg": b"1"})[20:] + b"x",
    ],
    ids=["nothing", "text", "magic only", "truncated", "beginning cut off"],
)
def test_what_is_no_zip_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "archive.zip"
    file.write_bytes(data)
    with pytest.raises((ArchiveError, InvalidData)) as caught:
        unpack_all(tmp_path, data)
    error = caught.value
    if isinstance(error, ArchiveError):
        assert error.problems.first()[0].reason is Reason.CORRUPT_ARCHIVE
    else:
        assert isinstance(error, InvalidData)
        assert error.problem.reason is Reason.CORRUPT_ARCHIVE


def test_an_archive_without_files_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, pack({})) is Reason.EMPTY_DATASET
    assert refused(tmp_path, pack({"images/": b"", "__MACOSX/._a": b"x"})) is Reason.EMPTY_DATASET


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.jpg", b"0123456789")
    with pytest.raises(InvalidData) as caught:
        unpack_all(tmp_path, out.getvalue().replace(b"345", b"354"))
    assert caught.value.problem.reason is Reason.CORRUPT_ARCHIVE


def test_too_many_entries_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, pack({f"{i}.txt": b"" for i in range(21)})) is Reason.ARCHIVE_LIMIT


def test_a_bomb_that_declares_its_size_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, pack({"a.bmp": bytes(1 << 18)})) is Reason.ARCHIVE_LIMIT
    assert refused(tmp_path, pack({"a.bmp": bytes(1 << 20)})) is Reason.ARCHIVE_LIMIT


def test_a_bomb_that_lies_about_its_size_is_stopped_while_it_unpacks(tmp_path: Path) -> None:
    honest = bytearray(pack({"a.bmp": bytes(1 << 18)}))
    size = struct.pack("<I", 1 << 18)
    lying = bytes(honest).replace(size, struct.pack("<I", 1000))
    with pytest.raises(InvalidData) as caught:
        unpack_all(tmp_path, lying)
    assert caught.value.problem.reason is Reason.ARCHIVE_LIMIT


def test_every_bad_name_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "archive.zip"
    file.write_bytes(pack({"../a": b"", "../b": b"", "c\\d": b"", "fine": b""}))
    with pytest.raises(ArchiveError) as caught:
        list_entries(file, SMALL)
    assert [p.where for p in caught.value.problems.first()] == ["../a", "../b", "c\\d"]
