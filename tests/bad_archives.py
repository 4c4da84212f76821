"""A corpus of bad archives, made by code: what is wrong, where, and what it must be called.

Each case is an archive with one mistake (or a few) in an otherwise good data set.
"""

from __future__ import annotations

import io
import json
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.preprocess_samples import encode, jpeg, pack, picture, voc_xml

SIZE = (40, 30)
GOOD = jpeg(*SIZE)
ROW = b"0 0.5 0.5 0.25 0.5\n"
XML = voc_xml(("cell", 1, 2, 10, 20))
Found = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """A bad archive.

    Attributes:
        name: What is wrong with it.
        data: The archive.
        problems: Place and reason of everything that must be found, by place.
    """

    name: str
    data: bytes
    problems: Found


def all_cases() -> list[Case]:
    """The corpus."""
    groups = (names, kinds, containers, images, rows, data_yaml, voc, layouts, coco, coco_values)
    cases = [case for group in groups for case in group()]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def with_entry(name: str, data: bytes = b"data", **attributes: int) -> bytes:
    """An archive with a good image and one entry with odd attributes, its name unchanged."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("images/ok.jpg", GOOD)
        stand_in = "\x01" * len(name.encode())
        info = zipfile.ZipInfo(stand_in)
        for key, value in attributes.items():
            setattr(info, key, value)
        archive.writestr(info, data)
    return out.getvalue().replace(stand_in.encode(), name.encode())


def names() -> Iterator[Case]:
    """Names of entries."""
    for name in (
        *("../a.jpg", "a/../../b.jpg", "a/..", "/etc/passwd", "/a.jpg", "C:/a.jpg", "c:a.jpg"),
        *("a\\b.jpg", "..\\a.jpg", "images/..", "..", "\\\\host\\share\\a.jpg", "images\\a.jpg"),
    ):
        yield Case(f"unsafe name {name}", with_entry(name), [(name, "UNSAFE_PATH")])
    for name in ("a\nb.jpg", "a\x00b.jpg", "a\x7f.jpg", "a\tb.jpg", "a\rb.jpg", "\x1b[2J.jpg"):
        place = name.encode("unicode_escape").decode()
        yield Case(f"bad name {place}", with_entry(name), [(place, "BAD_NAME")])
    for name in ("a\x85b.jpg", "a\x9fb.jpg"):
        place = name.encode("unicode_escape").decode()
        yield Case(f"C1 control {place}", with_entry(name, flag_bits=0x800), [(place, "BAD_NAME")])
    for name in ("a//b.jpg", "./a.jpg", "a/./b.jpg", "images/./a.jpg", "a/b//c.txt"):
        yield Case(f"bad part {name}", with_entry(name), [(name, "BAD_NAME")])
    long = "x" * 1100 + ".jpg"
    yield Case("long name", with_entry(long), [(long[:200], "BAD_NAME")])
    for one, two in (
        ("images/A.jpg", "images/a.jpg"),
        ("images/a.jpg", "Images/a.jpg"),
        ("images/é.jpg", "images/e\u0301.jpg"),
        ("images/É.jpg", "images/e\u0301.JPG"),
        ("labels/ß.txt", "labels/SS.txt"),
        ("images/한.jpg", "images/\u1112\u1161\u11ab.jpg"),
    ):
        data = pack({"images/ok.jpg": GOOD, one: GOOD, two: GOOD})
        yield Case(f"names alike {one!a} {two!a}", data, [(two, "DUPLICATE_NAME")])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("a.jpg", "x.jpg"):
            archive.writestr(name, GOOD)
    same = out.getvalue().replace(b"x.jpg", b"a.jpg")
    yield Case("the same name twice", same, [("a.jpg", "DUPLICATE_NAME")])


def kinds() -> Iterator[Case]:
    """Entries that are no plain files."""
    for what, mode in (
        ("symlink", stat.S_IFLNK),
        ("character device", stat.S_IFCHR),
        ("block device", stat.S_IFBLK),
        ("fifo", stat.S_IFIFO),
        ("socket", stat.S_IFSOCK),
    ):
        data = with_entry("images/a.jpg", external_attr=(mode | 0o777) << 16, create_system=3)
        yield Case(what, data, [("images/a.jpg", "UNSUPPORTED_ENTRY")])
    for bit in (0x1, 0x40, 0x2000):
        data = _with_flag(with_entry("images/a.jpg"), bit)
        yield Case(f"encrypted {bit:x}", data, [("images/a.jpg", "UNSUPPORTED_ENTRY")])
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        data = with_entry("images/a.jpg", compress_type=method)
        yield Case(f"method {method}", data, [("images/a.jpg", "UNSUPPORTED_ENTRY")])
    for extension in "zip tar tgz tar.gz gz bz2 xz 7z rar zst jar ZIP".split():
        name = f"more.{extension}"
        yield Case(f"nested {extension}", with_entry(name), [(name, "UNSUPPORTED_ENTRY")])


def _with_flag(data: bytes, bit: int) -> bytes:
    """Sets a flag of the last entry in the table of contents."""
    at = data.rindex(b"PK\x01\x02") + 8
    (flags,) = struct.unpack_from("<H", data, at)
    return data[:at] + struct.pack("<H", flags | bit) + data[at + 2 :]


def containers() -> Iterator[Case]:
    """Archives that are none, or lie."""
    good = pack({"images/a.jpg": GOOD, "labels/a.txt": ROW})
    archive = [("archive", "CORRUPT_ARCHIVE")]
    for what, data in (
        ("empty file", b""),
        ("text", b"hello"),
        ("image", GOOD),
        ("html", b"<html>404</html>"),
        ("zeros", bytes(100)),
        ("signature only", b"PK\x03\x04"),
        ("end record cut", good[:-1]),
        ("table of contents cut", good[:-60]),
        ("first half", good[: len(good) // 2]),
        ("first byte", good[:1]),
        ("second half", good[len(good) // 2 :][:-30]),
        ("wrong size of the table", _end_record(good, size=7)),
        ("gzip of nothing", b"\x1f\x8b\x08\x00"),
        ("gzip of garbage", b"\x1f\x8b" + b"x" * 100),
    ):
        yield Case(f"archive: {what}", data, archive)
    for what, magic in (
        ("bzip2", b"BZh9"),
        ("xz", b"\xfd7zXZ\0"),
        ("zstd", b"\x28\xb5\x2f\xfd"),
        ("7z", b"7z\xbc\xaf\x27\x1c"),
        ("rar", b"Rar!\x1a\x07"),
    ):
        data = magic + bytes(100)
        yield Case(f"archive: {what}", data, [("archive", "UNSUPPORTED_ENTRY")])
    moved = _end_record(good, offset=1 << 20)
    yield Case("wrong place of the table", moved, [("images/a.jpg", "CORRUPT_ARCHIVE")])
    empty: Found = [("archive", "EMPTY_DATASET")]
    yield Case("archive: tar of nothing", bytes(10_240), empty)
    yield Case("archive: no entries", pack({}), empty)
    yield Case("archive: folders only", pack({"images/": b"", "labels/": b""}), empty)
    litter = {".DS_Store": b"x", "__MACOSX/._a.jpg": b"x", "Thumbs.db": b"x", "a/._b.jpg": b"x"}
    yield Case("archive: litter only", pack(litter), empty)
    yield Case("archive: texts only", pack({"readme.txt": b"x", "labels/a.txt": ROW}), empty)

    limit: Found = [("archive", "ARCHIVE_LIMIT")]
    yield Case("many entries", pack({f"{i}.jpg": b"" for i in range(2001)}), limit)
    yield Case("claims many entries", _end_record(good, count=60_000), limit)
    yield Case("ratio", pack({f"{i}.bmp": bytes(3 << 20) for i in range(3)}), limit)
    big = pack({"images/ok.jpg": GOOD, "images/a.bmp": bytes(9 << 20)})
    yield Case("large entry", big, [("images/a.bmp", "ARCHIVE_LIMIT")])
    at = good.rindex(b"PK\x01\x02", 0, good.rindex(b"PK\x01\x02"))
    for what, field, value, reason in (
        ("size one less", 24, len(GOOD) - 1, "ARCHIVE_LIMIT"),
        ("size of zero", 24, 0, "ARCHIVE_LIMIT"),
        ("size one more", 24, len(GOOD) + 1, "CORRUPT_ARCHIVE"),
        ("another checksum", 16, 1, "CORRUPT_ARCHIVE"),
        ("packed size of one", 20, 1, "CORRUPT_ARCHIVE"),
        ("entry elsewhere", 42, 7, "CORRUPT_ARCHIVE"),
        ("entry beyond the end", 42, 1 << 30, "CORRUPT_ARCHIVE"),
    ):
        data = good[: at + field] + struct.pack("<L", value) + good[at + field + 4 :]
        yield Case(f"lies: {what}", data, [("images/a.jpg", reason)])


def _end_record(data: bytes, *, count: int = -1, size: int = -1, offset: int = -1) -> bytes:
    """Changes what the end of an archive says of its table of contents."""
    at = data.rindex(b"PK\x05\x06")
    changed = bytearray(data)
    if count >= 0:
        struct.pack_into("<2H", changed, at + 8, count, count)
    if size >= 0:
        struct.pack_into("<L", changed, at + 12, size)
    if offset >= 0:
        struct.pack_into("<L", changed, at + 16, offset)
    return bytes(changed)


def images() -> Iterator[Case]:
    """Images that are none, or others than they say."""
    good = {e: encode(e, picture(*SIZE)) for e in (".jpg", ".png", ".bmp", ".webp", ".tiff")}
    endings = {**good, ".jpeg": good[".jpg"], ".tif": good[".tiff"]}

    def case(what: str, extension: str, data: bytes, reason: str) -> Case:
        files = {"images/ok.jpg": GOOD, "labels/ok.txt": ROW, f"images/bad{extension}": data}
        return Case(f"image {extension}: {what}", pack(files), [(f"images/bad{extension}", reason)])

    for extension, data in endings.items():
        yield case("empty", extension, b"", "CORRUPT_IMAGE")
        yield case("one byte", extension, data[:1], "UNSUPPORTED_IMAGE")
        yield case("header only", extension, data[:30], "CORRUPT_IMAGE")
        yield case("second half", extension, data[len(data) // 2 :], "UNSUPPORTED_IMAGE")
        yield case("text", extension, b"not an image", "UNSUPPORTED_IMAGE")
        yield case("zeros", extension, bytes(1000), "UNSUPPORTED_IMAGE")
        yield case("html", extension, b"<!DOCTYPE html><html>", "UNSUPPORTED_IMAGE")
        other = good[".png"] if data is not good[".png"] else good[".jpg"]
        yield case("of another kind", extension, other, "TYPE_MISMATCH")
    for extension in (".jpg", ".png", ".bmp", ".webp"):
        data = good[extension]
        yield case("cut in half", extension, data[: len(data) // 2], "CORRUPT_IMAGE")
    for what, data in (
        ("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("XML", b"<?xml version='1.0'?><a/>"),
        ("PDF", b"%PDF-1.7"),
        ("GIF", b"GIF89a" + bytes(20)),
        ("zip", b"PK\x03\x04" + bytes(20)),
        ("HEIC", b"\0\0\0\x18ftypheic" + bytes(20)),
        ("AVIF", b"\0\0\0\x18ftypavif" + bytes(20)),
        ("Photoshop", b"8BPS" + bytes(20)),
        ("icon", b"\0\0\1\0" + bytes(20)),
        ("JPEG 2000", b"\0\0\0\x0cjP  " + bytes(20)),
        ("JPEG XL", b"\xff\x0a" + bytes(20)),
    ):
        yield case(what, ".jpg", data, "UNSUPPORTED_IMAGE")
    for extension in (".gif", ".svg", ".pdf", ".heic", ".avif", ".jp2", ".psd", ".ico"):
        yield case("by its name", extension, b"whatever", "UNSUPPORTED_IMAGE")
    png = bytearray(good[".png"])
    bmp = bytearray(good[".bmp"])
    for what, size in (
        ("wide", (40_000, 1)),
        ("tall", (1, 40_000)),
        ("large", (20_000, 20_000)),
        ("absurd", (0x7FFFFFFF, 0x7FFFFFFF)),
    ):
        struct.pack_into(">2L", png, 16, *size)
        yield case(what, ".png", bytes(png), "IMAGE_TOO_LARGE")
        struct.pack_into("<2l", bmp, 18, *size)
        yield case(what, ".bmp", bytes(bmp), "IMAGE_TOO_LARGE")
    struct.pack_into(">2L", png, 16, 9_900, 9_900)
    struct.pack_into(">L", png, 29, zlib.crc32(png[12:29]))
    yield case("short for its size", ".png", bytes(png), "CORRUPT_IMAGE")
    for length in (1 << 20, 0x7FFFFFFF, 0xFFFFFFFF):
        chunk = good[".png"][:33] + struct.pack(">L", length) + good[".png"][37:]
        yield case(f"chunk of {length} bytes", ".png", chunk, "CORRUPT_IMAGE")
    struct.pack_into(">2L", png, 16, 0, 30)
    yield case("no width", ".png", bytes(png), "CORRUPT_IMAGE")
    start = good[".jpg"].index(b"\xff\xc0")
    frame = bytearray(good[".jpg"])
    struct.pack_into(">2H", frame, start + 5, 60_000, 60_000)
    yield case("absurd", ".jpg", bytes(frame), "IMAGE_TOO_LARGE")
    struct.pack_into(">2H", frame, start + 5, 0, 40)
    yield case("no height", ".jpg", bytes(frame), "CORRUPT_IMAGE")


def rows() -> Iterator[Case]:
    """Rows of YOLO label files."""

    def case(what: str, row: bytes, reason: str, place: str = "labels/a.txt:2") -> Case:
        files = {
            "data.yaml": b"names: [disc, square]\n",
            "images/a.jpg": GOOD,
            "labels/a.txt": ROW + row + b"\n" + ROW,
        }
        return Case(f"row {what}", pack(files), [(place, reason)])

    for row in (
        *("0 nan 0.5 0.2 0.2", "0 0.5 NaN 0.2 0.2", "0 0.5 0.5 inf 0.2", "0 0.5 0.5 0.2 -inf"),
        *("0 0.5 0.5 0 0.2", "0 0.5 0.5 0.2 0", "0 0.5 0.5 -0.1 0.2", "0 0.5 0.5 0.2 -0.1"),
        *("0 0.95 0.5 0.2 0.2", "0 0.5 0.95 0.2 0.2", "0 0.05 0.5 0.2 0.2", "0 -0.5 0.5 0.1 0.1"),
        *("0 20 15 10 10", "0 1.5 0.5 0.1 0.1", "0 1e300 0.5 0.2 0.2", "0 0.5 0.5 1e308 1e308"),
        *("0 1e999 0.5 0.2 0.2", "0 0.5 0.5 1e-400 0.2", "0 0.5 0.5 2 2", "0 0.5 0.5 0.2"),
        *("0", "0 0.5", "0 0.1 0.1 0.2 0.2 0.9", "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4"),
        *("0 0.5 0.5 0.2 wide", "0 0,5 0,5 0,2 0,2", "0, 0.5, 0.5, 0.2, 0.2", "0 0.5 0.5 0x1 0.2"),
        *("0 0.5 0.5 0.2 .", "0 0.5 0.5 0.2 --1", '0 "0.5" 0.5 0.2 0.2', "0 0.5 0.5 0.2 1/5"),
        "0 0.5 0.5 0.2 \x00",
    ):
        yield case(repr(row), row.encode(), "BAD_BOX")
    for row in (
        *("2 0.5 0.5 0.2 0.2", "-1 0.5 0.5 0.2 0.2", "1.0 0.5 0.5 0.2 0.2", "cat 0.5 0.5 0.2 0.2"),
        *("99999999999999999999 0.5 0.5 0.2 0.2", "1e0 0.5 0.5 0.2 0.2", "+1 0.5 0.5 0.2 0.2"),
        *("٣ 0.5 0.5 0.2 0.2", "² 0.5 0.5 0.2 0.2", "0x0 0.5 0.5 0.2 0.2", "nan 0.5 0.5 0.2 0.2"),
    ):
        yield case(repr(row), row.encode(), "UNKNOWN_CLASS")
    for what, data in (
        ("UTF-16", "0 0.5 0.5 0.2 0.2".encode("utf-16")),
        ("Latin-1", b"0 0.5 0.5 0.2 0.2 # caf\xe9"),
        ("JPEG", GOOD),
        ("too long", b"0 0.5 0.5 0.2 0.2\n" * 260_000),
    ):
        yield case(what, data, "CORRUPT_LABEL", "labels/a.txt")
    clipped = "0 0.98 0.5 0.06 0.2"
    yield case("half a pixel over the edge", clipped.encode(), "BOX_CLIPPED")


def data_yaml() -> Iterator[Case]:
    """Files that describe YOLO data."""

    def case(
        what: str, data: bytes, name: str = "data.yaml", reason: str = "BAD_DATA_YAML"
    ) -> Case:
        files = {"images/a.jpg": GOOD, "labels/a.txt": ROW, name: data}
        return Case(f"{name}: {what}", pack(files), [(name, reason)])

    for data in (
        *(b"!!python/object/apply:os.system ['echo']", b"names: !custom [a]", b"!!binary aGk="),
        *(b"a: &a [x]\nnames: [*a, *a]\n", b"names: &n [a]\nx: *n", b"<<: {names: [a]}\n? [a]\n"),
        *(b"names: " + b"[" * 50 + b"]" * 50, b"{" * 30, b"names: [a, b", b"names: {a: b"),
        *(b"names: []", b"names: {}", b"names:", b"names: 3", b"names: disc", b"nc: 2", b""),
        *(b"nc: 3\nnames: [a]", b"nc: two\nnames: [a]", b"nc: [1]\nnames: [a]"),
        *(b"names: [a, a]", b"names: [a, ' a ']", b"names: [a, '']", b"names: [a, '  ']"),
        *(b"names: {0: a, 2: b}", b"names: {1: a}", b"names: {a: 0, b: 1}", b"names: {-1: a}"),
        *(b"names: [[a]]", b"names: [{a: b}]", b"names: [null]", b"names: [2020-01-01]"),
        *(b"just text", b"- a\n- b", b"\xff\xfe\xfa", b"names: ['" + b"a" * 201 + b"']"),
        *(b'names: ["a\\u0007"]', b'names: ["a\\u202eb"]', b'names: ["a\\nb"]', b"names: [a\x00]"),
        *(b"names: [a]\n---\nnames: [b]", b"%YAML 9.9\n---\nnames: [a]", b"names: [a]\n\tb: c"),
        *(b"#" * (1 << 20) + b"\nnames: [a]", b"names:\n" + b"- x\n" * 10_001),
        b"? {a: b}\n: c\n",
    ):
        shown = data if len(data) < 60 else data[:20] + b"..."
        yield case(repr(shown), data)
    for name in ("classes.txt", "obj.names"):
        yield case("twice", b"a\nb\na\n", name)
        yield case("empty", b"\n\n", name)
        yield case("control", b"a\x07\n", name)
        yield case("Latin-1", b"caf\xe9\n", name, "CORRUPT_LABEL")
        yield case("too many", b"".join(b"%d\n" % i for i in range(10_001)), name)


def voc() -> Iterator[Case]:
    """Pascal VOC annotations."""

    def case(what: str, data: bytes, problems: Found) -> Case:
        files = {
            "JPEGImages/ok.jpg": GOOD,
            "Annotations/ok.xml": XML,
            "JPEGImages/a.jpg": GOOD,
            "Annotations/a.xml": data,
        }
        return Case(f"VOC: {what}", pack(files), problems)

    whole = "Annotations/a.xml"
    for data in (
        *(b"", b"hello", b"<annotation>", b"<annotation><object>", b"<a></b>", b"\x00\x01\x02"),
        *(b"<other/>", b"<html><body/></html>", b"<annotations/>", b"<annotation/><annotation/>"),
        *(b"<?xml version='1.0' encoding='nonsense'?><annotation/>", b"\xff\xfe<\x00a\x00"),
        *(b"<annotation>&undefined;</annotation>", b"<annotation a=1/>", b"{}", GOOD[:100]),
        *(b"<annotation>\xff</annotation>", b"<annotation>&#0;</annotation>"),
        b"<annotation>" + b" " * (4 << 20) + b"</annotation>",
    ):
        yield case(f"{data[:50]!r}", data, [(whole, "CORRUPT_LABEL")])
    bomb = b"<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>" + b"".join(
        b"<!ENTITY %s '%s'>" % (bytes([98 + i]), b"&%s;" % bytes([97 + i]) * 10) for i in range(8)
    )
    for data in (
        b"<!DOCTYPE annotation [<!ENTITY a 'b'>]><annotation>&a;</annotation>",
        b"<!DOCTYPE annotation SYSTEM 'http://127.0.0.1/y.dtd'><annotation/>",
        b"<!DOCTYPE annotation SYSTEM 'file:///etc/passwd'><annotation/>",
        b"<!DOCTYPE annotation PUBLIC 'a' 'b'><annotation/>",
        b"<!DOCTYPE annotation [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation>&x;</annotation>",
        b"<!DOCTYPE annotation><annotation/>",
        bomb + b"]><annotation>&i;</annotation>",
    ):
        yield case(f"{data[:70]!r}", data, [(whole, "DTD_FORBIDDEN")])
    second = [(f"{whole} object[2]", "BAD_BOX")]
    for edges in (
        *((5, 5, 5, 9), (5, 5, 9, 5), (9, 5, 5, 9), (5, 9, 9, 5), (-2, 5, 9, 9), (5, -2, 9, 9)),
        *((5, 5, 42, 9), (5, 5, 9, 32), (100, 100, 110, 110), (5, 5, "nan", 9), (5, 5, "inf", 9)),
        *(("", 5, 9, 9), ("five", 5, 9, 9), (5, 5, "9px", 9), (5, 5, "9,5", 9), (5, 5, 9, "1e999")),
        *((5, "0x5", 9, 9), (5, 5, 9, "<b/>"), (5, 5, 1e300, 9)),
    ):
        data = voc_xml(("cell", 1, 2, 10, 20), ("cell", *edges))
        yield case(f"box {edges}", data, second)
    for what, item in (
        ("no bndbox", b"<object><name>cell</name></object>"),
        ("empty bndbox", b"<object><name>cell</name><bndbox/></object>"),
        ("polygon", b"<object><name>cell</name><polygon><x1>1</x1></polygon></object>"),
    ):
        data = XML.replace(b"</annotation>", item + b"</annotation>")
        yield case(what, data, second)
    for name in ("", "   ", "x" * 201, "a\u202eb", "a\u200eb", "\u2067a"):
        data = voc_xml(("cell", 1, 2, 10, 20), (name, 5, 5, 9, 9))
        yield case(f"class {name[:10]!a}", data, [(f"{whole} object[2]", "UNKNOWN_CLASS")])
    data = voc_xml(("cell", 1, 2, 10, 20), ("cell", 5, 5, 40.5, 9))
    yield case("clipped", data, [(f"{whole} object[2]", "BOX_CLIPPED")])
    deep = b"<annotation>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</annotation>"
    yield case("deep", deep, [])


def layouts() -> Iterator[Case]:
    """Archives whose layout is unknown, mixed or contradicts itself."""
    image, voc_file = {"images/a.jpg": GOOD}, {"Annotations/a.xml": XML}
    label, coco_file = {"labels/a.txt": ROW}, {"a.json": _document()}
    archive = "archive"
    for what, files, problems in (
        ("images only", image, [(archive, "UNKNOWN_LAYOUT")]),
        ("images and notes", {**image, "notes.md": b"x"}, [(archive, "UNKNOWN_LAYOUT")]),
        ("YOLO and VOC", {**image, **label, **voc_file}, [(archive, "AMBIGUOUS_LAYOUT")]),
        ("YOLO and COCO", {**image, **label, **coco_file}, [(archive, "AMBIGUOUS_LAYOUT")]),
        ("VOC and COCO", {**image, **voc_file, **coco_file}, [(archive, "AMBIGUOUS_LAYOUT")]),
        (
            "all three",
            {**image, **label, **voc_file, **coco_file},
            [(archive, "AMBIGUOUS_LAYOUT")],
        ),
        (
            "labels without image",
            {**image, **label, "labels/b.txt": ROW, "labels/c.txt": b""},
            [("labels/b.txt", "MISSING_IMAGE"), ("labels/c.txt", "MISSING_IMAGE")],
        ),
        (
            "annotation without image",
            {**image, **voc_file, "Annotations/b.xml": XML},
            [("Annotations/b.xml", "MISSING_IMAGE")],
        ),
        (
            "two label files for an image",
            {**image, **label, "images/a.txt": ROW},
            [("images/a.txt", "AMBIGUOUS_LAYOUT")],
        ),
        (
            "two images for a label file",
            {**image, **label, "images/a.png": encode(".png", picture(*SIZE))},
            [("images/a.png", "DUPLICATE_NAME")],
        ),
        (
            "two images for an annotation",
            {**image, **voc_file, "images/a.jpeg": GOOD},
            [
                ("Annotations/a.xml", "AMBIGUOUS_LAYOUT"),
                ("images/a.jpeg", "NOT_LISTED"),
                ("images/a.jpg", "NOT_LISTED"),
            ],
        ),
        (
            "two annotations of an image",
            {
                **image,
                **voc_file,
                "Annotations/b.xml": XML.replace(
                    b"<object>", b"<filename>a.jpg</filename><object>"
                ),
            },
            [("Annotations/b.xml", "DUPLICATE_NAME")],
        ),
        (
            "two data.yaml that differ",
            {**image, **label, "data.yaml": b"names: [a]", "dataset.yaml": b"names: [b]"},
            [("dataset.yaml", "AMBIGUOUS_LAYOUT")],
        ),
        (
            "an image in two lists of VOC",
            {
                **image,
                **voc_file,
                "ImageSets/Main/train.txt": b"a\n",
                "ImageSets/Main/val.txt": b"\na\n",
            },
            [("ImageSets/Main/val.txt:2", "AMBIGUOUS_LAYOUT")],
        ),
        (
            "a list of VOC that is no text",
            {**image, **voc_file, "ImageSets/Main/train.txt": b"\xff\xfe"},
            [("ImageSets/Main/train.txt", "CORRUPT_LABEL")],
        ),
        (
            "a list of VOC with an unknown image",
            {**image, **voc_file, "ImageSets/Main/train.txt": b"a\nb\n"},
            [("ImageSets/Main/train.txt:2", "MISSING_IMAGE")],
        ),
        (
            "an image in two lists of YOLO",
            {
                "data/a.jpg": GOOD,
                "data/a.txt": ROW,
                "train.txt": b"data/a.jpg\n",
                "valid.txt": b"data/a.jpg\n",
            },
            [("valid.txt:1", "AMBIGUOUS_LAYOUT")],
        ),
        (
            "a list of YOLO with an unknown image",
            {"data/a.jpg": GOOD, "data/a.txt": ROW, "train.txt": b"data/a.jpg\n/etc/b.jpg\n"},
            [("train.txt:2", "MISSING_IMAGE")],
        ),
    ):
        yield Case(f"layout: {what}", pack(files), problems)


def _document(**changes: Any) -> bytes:
    """A COCO file of two images and two boxes, with some lists replaced."""
    return json.dumps({**_LISTS, **changes}).encode()


_LISTS: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20]},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [1, 2, 10, 20]},
    ],
    "categories": [{"id": 1, "name": "cat"}],
}
_JSON = "annotations/all.json"


def _coco(what: str, document: bytes, problems: Found, **more: bytes) -> Case:
    files = {"images/a.jpg": GOOD, "images/b.jpg": GOOD, _JSON: document}
    files.update({name.replace("__", "/") + ".json": data for name, data in more.items()})
    return Case(f"COCO: {what}", pack(files), [(f"{_JSON}{place}", r) for place, r in problems])


def coco() -> Iterator[Case]:
    """COCO files that are broken as such."""
    value: Any
    good = _document()
    unknown = "CORRUPT_LABEL"
    for what, document, problem in (
        ("empty", b"", ("", unknown)),
        ("a list", b"[]", ("", unknown)),
        ("a text", b'"images"', ("", unknown)),
        ("a number", b"1", ("", unknown)),
        ("no JSON", b"images: []", ("", unknown)),
        ("UTF-16", good.decode().encode("utf-16"), ("", unknown)),
        ("Latin-1", good.replace(b'"cat', b'"caf\xe9'), (" images[0]", unknown)),
        ("cut at the end", good[:-1], (" categories", unknown)),
        ("cut in a category", good[:-10], (" categories[0]", unknown)),
        ("cut in the images", good[:30], (" images[0]", unknown)),
        ("more after the end", good + b"{}", (" categories", unknown)),
        ("comma too many", good.replace(b'"cat"}]', b'"cat"},]'), (" categories[1]", unknown)),
        ("no comma", good.replace(b'}, {"id": 2', b'} {"id": 2', 1), (" images[0]", unknown)),
        ("single quotes", good.replace(b'"', b"'"), ("", unknown)),
        ("comment", b"{/* hello */" + good[1:], ("", unknown)),
        ("key without quotes", good.replace(b'"images"', b"images"), ("", unknown)),
        ("no colon", good.replace(b'"images":', b'"images"'), (" images", unknown)),
        ("control character", good.replace(b'"cat"', b'"c\x07t"'), (" categories[0]", unknown)),
        ("bad escape", good.replace(b'"cat"', b'"c\\qt"'), (" categories[0]", unknown)),
        ("images twice", b'{"images": [],' + good[1:], (" images", unknown)),
        ("deep value", b'{"info": ' + b"[" * 9000 + b"]" * 9000 + b"," + good[1:], ("", unknown)),
        (
            "deep image",
            good.replace(b'"a.jpg"', b"[" * 9000 + b"]" * 9000),
            (" images[0]", unknown),
        ),
        (
            "deep segmentation",
            good.replace(b'"bbox"', b'"segmentation": ' + b'{"a":' * 9000 + b'"bbox"', 1),
            (" annotations[0]", unknown),
        ),
        (
            "number of 5000 digits",
            good.replace(b"20", b"2" * 5000, 1),
            (" annotations[0]", unknown),
        ),
    ):
        place, reason = problem
        if what == "deep value":
            place = " info[0]"
        if what == "Latin-1":
            place = ""
        yield _coco(what, document, [(place, reason)])
    for key in ("images", "annotations", "categories"):
        for value in (None, {}, 3, "x", True):
            changed = {key: value}
            yield _coco(f"{key} is {value!r}", _document(**changed), [(f" {key}", unknown)])
        without = {name: value for name, value in _LISTS.items() if name != key}
        yield _coco(f"no {key}", json.dumps(without).encode(), [("", unknown)])
    yield _coco("no classes", _document(categories=[]), [(" categories", "EMPTY_DATASET")])
    masks = [{k: v for k, v in a.items() if k != "bbox"} for a in _LISTS["annotations"]]
    yield _coco("masks only", _document(annotations=masks), [(" annotations[0].bbox", "BAD_BOX")])
    other = _document(images=[], annotations=[], categories=[{"id": 1, "name": "dog"}])
    yield Case(
        "COCO: classes of two files differ",
        pack({"a.jpg": GOOD, "b.jpg": GOOD, "a.json": good, "z.json": other}),
        [("z.json categories", "AMBIGUOUS_LAYOUT")],
    )
    yield Case(
        "COCO: one of two files is broken",
        pack({"a.jpg": GOOD, "b.jpg": GOOD, "a.json": good, "z.json": good[:50]}),
        [("z.json images[1]", "CORRUPT_LABEL")],
    )
    yield Case(
        "COCO: two files describe the same images",
        pack({"a.jpg": GOOD, "b.jpg": GOOD, "a.json": good, "z.json": good}),
        [
            ("z.json images[0].file_name", "DUPLICATE_NAME"),
            ("z.json images[1].file_name", "DUPLICATE_NAME"),
        ],
    )


def coco_values() -> Iterator[Case]:
    """Values in COCO files."""
    value: Any
    wrong: Any
    box, annotation = [1, 2, 10, 20], _LISTS["annotations"][0]

    def case(what: str, problems: Found, **changes: Any) -> Case:
        return _coco(what, _document(**changes), problems)

    for value in (
        *(None, 3, "x", {}, [], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, None, 4], [1, 2, "3", 4]),
        *([1, 2, [3], 4], [1, 2, True, 4], [1, 2, 10**400, 4], [1, 2, float("nan"), 4]),
        *([1, 2, float("inf"), 4], [-float("inf"), 2, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0]),
        *([1, 2, -3, 4], [30, 2, 20, 4], [1, 20, 3, 20], [-5, 2, 10, 4], [100, 100, 5, 5]),
        *([1e308, 2, 1e308, 4], [1, 2, 1e-300, 4]),
    ):
        boxes = [{**annotation, "bbox": box}, {**annotation, "id": 5, "bbox": value}]
        yield case(
            f"bbox {str(value)[:30]}", [(" annotations[1].bbox", "BAD_BOX")], annotations=boxes
        )
    huge = 1 << 63
    for key, reason in (("image_id", "MISSING_IMAGE"), ("category_id", "UNKNOWN_CLASS")):
        for wrong in (None, "1", 1.5, True, [1], {}, huge, -huge - 1):
            yield case(
                f"{key} {wrong!r}",
                [(f" annotations[1].{key}", "CORRUPT_LABEL")],
                annotations=[annotation, {**annotation, "id": 5, key: wrong}],
            )
        for dangling in (0, 7, -1, huge - 1):
            yield case(
                f"{key} {dangling}",
                [(f" annotations[1].{key}", reason)],
                annotations=[annotation, {**annotation, "id": 5, key: dangling}],
            )
    for wrong in ("1", 1.5, True, [1]):
        yield case(
            f"annotation id {wrong!r}",
            [(" annotations[1].id", "CORRUPT_LABEL")],
            annotations=[annotation, {**annotation, "id": wrong}],
        )
    for wrong in (2, -1, "1", None, [], 0.5, float("nan")):
        yield case(
            f"iscrowd {wrong!r}",
            [(" annotations[1].iscrowd", "CORRUPT_LABEL")],
            annotations=[annotation, {**annotation, "id": 5, "iscrowd": wrong}],
        )
    for wrong in (None, 3, "x", [], [1, 2]):
        yield case(
            f"annotation {wrong!r}",
            [(" annotations[1]", "CORRUPT_LABEL")],
            annotations=[annotation, wrong],
        )
    yield case(
        "annotation id twice",
        [(" annotations[1].id", "DUPLICATE_ID"), (" annotations[2].id", "DUPLICATE_ID")],
        annotations=[annotation, annotation, annotation],
    )
    first, second = _LISTS["images"]
    for wrong in (None, 3, "x", []):
        yield case(
            f"image {wrong!r}", [(" images[2]", "CORRUPT_LABEL")], images=[first, second, wrong]
        )
    for wrong in (None, "1", 1.5, True, huge):
        yield case(
            f"image id {wrong!r}",
            [(" images[2].id", "CORRUPT_LABEL")],
            images=[first, second, {"id": wrong, "file_name": "c.jpg"}],
        )
    for wrong in (None, 3, "", [], {"a": 1}):
        yield case(
            f"file_name {wrong!r}",
            [(" images[2].file_name", "CORRUPT_LABEL")],
            images=[first, second, {"id": 3, "file_name": wrong}],
        )
    for missing in (
        *(
            "c.jpg",
            "../../etc/passwd",
            "/etc/passwd",
            "C:\\c.jpg",
            "c\x00.jpg",
            "..",
            "/",
            "한.jpg",
        ),
        *("http://127.0.0.1/c.jpg", "c" * 5000, "\ud800.jpg", "annotations/all.json"),
    ):
        yield case(
            f"file_name {missing[:20]!a}",
            [(" images[2].file_name", "MISSING_IMAGE")],
            images=[first, second, {"id": 3, "file_name": missing}],
        )
    yield case(
        "image twice",
        [(" images[2].file_name", "DUPLICATE_NAME")],
        images=[first, second, {"id": 3, "file_name": "images/a.jpg"}],
    )
    for wrong in (None, 3, "cat", [1]):
        yield case(f"category {wrong!r}", [(" categories[0]", "CORRUPT_LABEL")], categories=[wrong])
    for wrong in (None, "1", 1.5, True, huge):
        yield case(
            f"category id {wrong!r}",
            [(" categories[0].id", "CORRUPT_LABEL")],
            categories=[{"id": wrong, "name": "cat"}],
        )
    for wrong in (None, 3, "", "  ", "a\u0007", "a\u202eb", "\ud800", "x" * 201, ["cat"], "\ufffe"):
        yield case(
            f"category name {wrong!a:.30}",
            [(" categories[0].name", "UNKNOWN_CLASS")],
            categories=[{"id": 1, "name": wrong}],
        )
    cat = _LISTS["categories"][0]
    yield case(
        "category id twice",
        [(" categories[1].id", "DUPLICATE_ID")],
        categories=[cat, {"id": 1, "name": "dog"}],
    )
    yield case(
        "category name twice",
        [(" categories[1].name", "DUPLICATE_NAME")],
        categories=[cat, {"id": 2, "name": " cat "}],
    )
    yield case(
        "too many categories",
        [(" categories[10000]", "UNKNOWN_CLASS")],
        categories=[{"id": i, "name": str(i)} for i in range(10_001)],
    )
    yield Case(
        "COCO: image id twice",
        pack(
            {
                "a.jpg": GOOD,
                "b.jpg": GOOD,
                "ok.jpg": GOOD,
                "a.json": _document(
                    images=[
                        first,
                        {"id": 1, "file_name": "b.jpg"},
                        {"id": 2, "file_name": "ok.jpg"},
                    ]
                ),
            }
        ),
        [("a.json images[1].id", "DUPLICATE_ID")],
    )
    yield Case(
        "COCO: file_name that may be two images",
        pack({"x/a.jpg": GOOD, "y/a.jpg": GOOD, "b.jpg": GOOD, "z/a.json": _document()}),
        [
            ("x/a.jpg", "NOT_LISTED"),
            ("y/a.jpg", "NOT_LISTED"),
            ("z/a.json images[0].file_name", "AMBIGUOUS_LAYOUT"),
        ],
    )
    yield Case(
        "COCO: image that no file lists",
        pack({"a.jpg": GOOD, "b.jpg": GOOD, "c.jpg": GOOD, "a.json": _document()}),
        [("c.jpg", "NOT_LISTED")],
    )
