"""Tar archives, plain and in gzip: read like zips, refused for the same reasons."""

import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.preprocess.archive import ArchiveError, Limits, open_archive, read_entry
from services.preprocess.domain import Reason

SMALL = Limits(
    entries=20,
    directory_bytes=1 << 16,
    total_bytes=1 << 20,
    entry_bytes=1 << 19,
    ratio=20,
    free_bytes=1 << 16,
)
FILES = {"data.yaml": b"names: [a]", "images/a.jpg": b"x" * 5000, "images/b.jpg": b""}


def pack(files: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """Packs files into a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def with_entry(name: str, **attributes: object) -> bytes:
    """A tar of one entry with odd attributes, and a plain one behind it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        for key, value in attributes.items():
            setattr(info, key, value)
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo("images/z.jpg"))
    return out.getvalue()


def unpack_all(folder: Path, data: bytes, limits: Limits = SMALL) -> dict[str, bytes]:
    """Everything in an archive; nothing but the tar itself may be on the disk after it."""
    work = folder / "work"
    work.mkdir()
    path = work / "archive"
    path.write_bytes(data)
    try:
        archive, entries = open_archive(path, work, limits)
        assert [*work.iterdir()] == [archive]
        with archive.open("rb") as file:
            return {name: read_entry(file, entry, limits) for name, entry in entries.items()}
    finally:
        for left in work.iterdir():
            left.unlink()
        work.rmdir()


def refused(folder: Path, data: bytes, limits: Limits = SMALL) -> Reason:
    """The reason an archive is refused for."""
    with pytest.raises(ArchiveError) as caught:
        unpack_all(folder, data, limits)
    return caught.value.problems.first()[0].reason


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("is_packed", [False, True], ids=["tar", "tar.gz"])
def test_every_format_of_tar_is_read_plain_and_in_gzip(
    tmp_path: Path, kind: int, is_packed: bool
) -> None:
    data = pack(FILES, kind)
    assert unpack_all(tmp_path, gzip.compress(data) if is_packed else data) == FILES


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names_are_read(tmp_path: Path, kind: int) -> None:
    files = {f"{'폴더' * 40}/{'고양이 😀' * 5}.jpg": b"1", "a" * 99 + "/" + "b" * 99 + ".jpg": b"2"}
    assert unpack_all(tmp_path, pack(files, kind)) == files


@pytest.mark.parametrize("options", [["-C", "{}", "."], ["--format=gnu", "-C", "{}", "images"]])
def test_what_the_tar_command_writes_is_read(tmp_path: Path, options: list[str]) -> None:
    folder = tmp_path / "set" / "images"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"x" * 700)
    arguments = [option.format(folder.parent) for option in options]
    packed = subprocess.run(["tar", "czf", "-", *arguments], capture_output=True, check=True)
    assert unpack_all(tmp_path, packed.stdout) == {"images/a.jpg": b"x" * 700}


def test_gzip_of_several_members_and_padding_is_read_whole(tmp_path: Path) -> None:
    data = pack(FILES)
    members = gzip.compress(data[:3000]) + gzip.compress(data[3000:]) + bytes(2000)
    assert unpack_all(tmp_path, members) == FILES


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "a/../../b.jpg", "C:/a.jpg", "a\\b"])
def test_unsafe_paths_are_refused(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, with_entry(name)) is Reason.UNSAFE_PATH


@pytest.mark.parametrize("name", ["a\nb.jpg", "a//b.jpg", "a/./b.jpg", os.fsdecode(b"\xff.jpg")])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, with_entry(name)) is Reason.BAD_NAME


@pytest.mark.parametrize(
    "names", [("a.jpg", "A.jpg"), ("caf\u00e9", "cafe\u0301"), ("a.jpg", "./a.jpg")]
)
def test_equal_names_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    assert refused(tmp_path, pack(dict.fromkeys(names, b"x"))) is Reason.DUPLICATE_NAME


@pytest.mark.parametrize(
    "attributes",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "images/z.jpg"},
        {"type": tarfile.CHRTYPE},
        {"type": tarfile.BLKTYPE},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.GNUTYPE_SPARSE},
        {"type": b"M"},
        {"pax_headers": {"GNU.sparse.major": "1"}},
    ],
    ids=lambda attributes: str(next(iter(attributes.values()))),
)
def test_links_devices_and_sparse_files_are_refused(
    tmp_path: Path, attributes: dict[str, object]
) -> None:
    data = with_entry("images/a.jpg", **attributes)
    assert refused(tmp_path, data) is Reason.UNSUPPORTED_ENTRY


def test_an_archive_inside_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, with_entry("more.zip")) is Reason.UNSUPPORTED_ENTRY


def test_a_bomb_is_stopped_by_what_really_comes_out(tmp_path: Path) -> None:
    many = pack({f"{i}.bmp": bytes(1 << 18) for i in range(3)})
    assert refused(tmp_path, gzip.compress(many)) is Reason.ARCHIVE_LIMIT  # the ratio
    endless = gzip.compress(bytes(64 << 20))
    assert refused(tmp_path, endless) is Reason.ARCHIVE_LIMIT
    total = Limits(total_bytes=1 << 18, ratio=10_000)
    assert refused(tmp_path, gzip.compress(many), total) is Reason.ARCHIVE_LIMIT
    large = with_entry("a.bmp", size=1 << 40)
    assert refused(tmp_path, large) is Reason.CORRUPT_ARCHIVE  # it is not there
    assert refused(tmp_path, pack({"a.bmp": bytes(1 << 20)})) is Reason.ARCHIVE_LIMIT
    assert refused(tmp_path, pack({f"{i}": b"" for i in range(21)})) is Reason.ARCHIVE_LIMIT


def test_endless_headers_are_refused(tmp_path: Path) -> None:
    one = with_entry("a.jpg", pax_headers={"SCHILY.xattr.user.x": "x" * (2 << 20)})
    assert refused(tmp_path, one) is Reason.ARCHIVE_LIMIT
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(10):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.pax_headers = {"comment": "x" * 10_000}
            archive.addfile(info)
    assert refused(tmp_path, out.getvalue()) is Reason.ARCHIVE_LIMIT


@pytest.mark.parametrize(
    "data",
    [
        # Named: a gzip holds the time it was made, and processes that share the tests must agree.
        pytest.param(gzip.compress(pack(FILES))[:-20], id="gzip without its end"),
        pytest.param(gzip.compress(pack(FILES))[:100], id="gzip cut off early"),
        pytest.param(gzip.compress(pack(FILES))[:-1] + b"\xff", id="gzip of a wrong size"),
        pytest.param(gzip.compress(pack(FILES)) + b"more", id="more behind a gzip"),
        pytest.param(gzip.compress(b"no tar"), id="gzip of no tar"),
        pytest.param(gzip.compress(b""), id="gzip of nothing"),
        pytest.param(b"\x1f\x8b", id="only the mark of a gzip"),
        pytest.param(pack(FILES)[:3000], id="cut off in a file"),
        pytest.param(pack(FILES)[: 512 * 2], id="cut off behind a file"),
        pytest.param(pack(FILES).rstrip(b"\0"), id="without its end"),
        pytest.param(pack(FILES) + pack(FILES), id="two in one"),
        pytest.param(with_entry("a", pax_headers={"size": "x"}), id="size that is no number"),
        pytest.param(with_entry("a", pax_headers={"size": "-1"}), id="negative size"),
    ],
)
def test_damaged_and_cut_off_tars_are_refused(tmp_path: Path, data: bytes) -> None:
    assert refused(tmp_path, data) is Reason.CORRUPT_ARCHIVE


def test_a_tar_without_files_is_refused(tmp_path: Path) -> None:
    empty = [pack({}), gzip.compress(pack({})), pack({"._a": b""})]
    assert {refused(tmp_path, data) for data in empty} == {Reason.EMPTY_DATASET}


@pytest.mark.parametrize(
    "magic", [b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c"]
)
def test_other_archives_are_named(tmp_path: Path, magic: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"pack it as zip, tar or tar\.gz"):
        unpack_all(tmp_path, magic + bytes(1000))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.lists(st.tuples(st.integers(0, 8000), st.binary(min_size=1, max_size=3)), max_size=5),
    st.booleans(),
)
def test_damaged_tars_end_in_files_or_a_reason(
    tmp_path: Path, kind: int, changes: list[tuple[int, bytes]], is_packed: bool
) -> None:
    data = pack(FILES | {f"{'긴' * 60}.jpg": b"1"}, kind)
    data = gzip.compress(data) if is_packed else data
    for at, new in changes:
        data = data[: at % len(data)] + new + data[at % len(data) + len(new) :]
    try:
        unpack_all(tmp_path, data)
    except ArchiveError as error:
        assert error.problems.first()[0].description
