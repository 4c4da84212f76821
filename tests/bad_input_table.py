"""What bad input is answered with: the rows, and for each the cases that are sent.

A row that a surface cannot express says why; every other has cases for all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests import bad_archives
from tests.bad_input_rig import CLI, SURFACES
from tests.preprocess_samples import pack, yolo_files

INVALID, EXHAUSTED = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"

PATHS = "names in archives that lead out of it"
KINDS = "entries that are no plain files, encrypted or archives themselves"
BOMBS = "archives that unpack to too much, or lie about it"
BROKEN = "archives that are cut, damaged, none at all or empty"
NAMES_INSIDE = "names in archives with control characters, or that are alike"
IMAGES = "images that are empty or cut"
DIMENSIONS = "images of absurd dimensions"
COLOURS = "images in other colours, depths and orientations"
TYPES = "files that are no images, or others than they say"
BOXES = "boxes that are no numbers, without area or outside"
CLASSES = "unknown classes, labels without image and images without labels"
COCO = "COCO files that contradict themselves"
DTD = "Pascal VOC files with a DTD"
YAML = "data.yaml with tags, aliases and nesting"
NAMES = "names that are empty, too long or not writable"
NUMBERS = "settings of trainings that make no sense"
CALLS = "page tokens, field masks, etags and names that are taken"
ORDER = "trainings of versions that are not ready, or train already"
TOKENS = "no token, a wrong one, and ids of other projects"
SIZES = "messages and bodies over the limit"
WEIGHTS = "weights that run code"
SCRIPTS = "markup in names, classes and file names"
TRICKS = "paths of resources that lead elsewhere"

ROWS = (
    *(PATHS, KINDS, BOMBS, BROKEN, NAMES_INSIDE, IMAGES, DIMENSIONS, COLOURS, TYPES, BOXES),
    *(CLASSES, COCO, DTD, YAML, NAMES, NUMBERS, CALLS, ORDER, TOKENS, SIZES, WEIGHTS, SCRIPTS),
    TRICKS,
)


@dataclass(frozen=True)
class Archive:
    """A bad archive.

    Attributes:
        row: What it is a case of.
        problem: Place and reason of one of its problems.
        code: What the import ends with.
    """

    row: str
    name: str
    data: bytes = field(repr=False)
    problem: tuple[str, str]
    code: str = INVALID


@dataclass(frozen=True, kw_only=True)
class Call:
    """A bad call.

    Attributes:
        row: What it is a case of.
        rpc: Method.
        request: In JSON; "$version" and the like stand for what there is.
        code: What it is answered with.
        reason: Of the ErrorInfo, or of the violation.
        field: Place of the violation; "" where there is none.
        command: The same on the command line; none where `without` says why.
        says: What its complaint names.
        without: Why the command line cannot express it.
    """

    row: str
    rpc: str
    request: Mapping[str, Any]
    code: str = INVALID
    reason: str = "INVALID_FIELD"
    field: str = ""
    command: tuple[str, ...] = ()
    says: str = ""
    without: str = ""

    @property
    def name(self) -> str:
        return f"{self.row}: {self.rpc} {str(dict(self.request))[:80]}"

    @property
    def surfaces(self) -> tuple[str, ...]:
        return SURFACES if self.command else tuple(one for one in SURFACES if one != CLI)


_CORPUS = {
    PATHS: ("unsafe name ../a.jpg", "unsafe name C:/a.jpg", "unsafe name /etc/passwd"),
    KINDS: ("symlink", "character device", "encrypted 1", "nested zip"),
    BOMBS: ("lies: size one less", "lies: size of zero"),
    BROKEN: (
        "archive: first half",
        "lies: another checksum",
        "archive: text",
        "archive: no entries",
    ),
    NAMES_INSIDE: ("bad name a\\x00b.jpg", "bad name a\\nb.jpg", "the same name twice"),
    IMAGES: ("image .jpg: empty", "image .png: cut in half"),
    DIMENSIONS: ("image .png: absurd", "image .jpg: absurd"),
    TYPES: ("image .jpg: of another kind", "image .jpg: SVG", "image .jpg: PDF"),
    COCO: (
        *("COCO: image_id 7", "COCO: annotation id twice", "COCO: deep value"),
        "COCO: bbox [1, 2, nan, 4]",
    ),
}
_LIMITS = ("ARCHIVE_LIMIT", "IMAGE_TOO_LARGE")


def archives() -> Iterator[Archive]:
    """The bad archives."""
    corpus = {case.name: case for case in bad_archives.all_cases()}
    for row, names in _CORPUS.items():
        for name in names:
            case = corpus[name]
            code = EXHAUSTED if case.problems[0][1] in _LIMITS else INVALID
            yield Archive(row, name, case.data, case.problems[0], code)
    backslash = corpus["unsafe name a\\b.jpg"]
    yield Archive(PATHS, backslash.name, backslash.data, backslash.problems[0])
    bomb = pack({f"images/{number}.bmp": bytes(40 << 20) for number in range(7)})
    yield Archive(BOMBS, "ratio", bomb, ("archive", "ARCHIVE_LIMIT"), EXHAUSTED)
    alike = {"images/é.jpg": bad_archives.GOOD, "images/e\u0301.JPG": bad_archives.GOOD}
    yield Archive(
        NAMES_INSIDE, "alike after NFC", pack(alike), ("images/e\u0301.JPG", "DUPLICATE_NAME")
    )
    yield from _labels()
    evil = "images/<script>alert(1)<／script>.jpg"
    scripts = {"images/ok.jpg": bad_archives.GOOD, "labels/ok.txt": bad_archives.ROW, evil: b""}
    yield Archive(SCRIPTS, "file name", pack(scripts), (evil, "CORRUPT_IMAGE"))


def _labels() -> Iterator[Archive]:
    """Archives with one bad row, annotation or description."""
    for row, reason, texts in (
        (BOXES, "BAD_BOX", ("0 nan .5 .2 .2", "0 .5 inf .2 .2", "0 .5 .5 0 .2", "0 .9 .5 .5 .2")),
        (CLASSES, "UNKNOWN_CLASS", ("7 .5 .5 .2 .2", "cat .5 .5 .2 .2")),
    ):
        for text in texts:
            files = {**yolo_files(2), "labels/001.txt": f"0 .5 .5 .2 .2\n{text}\n".encode()}
            yield Archive(row, text, pack(files), ("labels/001.txt:2", reason))
    files = {**yolo_files(2), "labels/gone.txt": bad_archives.ROW}
    yield Archive(CLASSES, "no image", pack(files), ("labels/gone.txt", "MISSING_IMAGE"))
    dtd = b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + bad_archives.XML
    files = {"JPEGImages/a.jpg": bad_archives.GOOD, "Annotations/a.xml": dtd}
    yield Archive(DTD, "entity of a file", pack(files), ("Annotations/a.xml", "DTD_FORBIDDEN"))
    for name, text in (
        ("tag", "names: !!python/object/apply:os.system ['true']"),
        ("aliases", "a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]"),
        ("nesting", "names: " + "[" * 200 + "]" * 200),
    ):
        files = {**yolo_files(2), "data.yaml": text.encode()}
        yield Archive(YAML, name, pack(files), ("data.yaml", "BAD_DATA_YAML"))


def calls() -> Iterator[Call]:
    """The bad calls."""
    yield from _names()
    yield from _numbers()
    yield from _order()


def _names() -> Iterator[Call]:
    for name, says in (
        ("x" * 64, "63"),
        ("a\x07b", "control"),
        ("a\u202eb", "bidirectional"),
        ("a\nb", "control"),
    ):
        yield Call(
            row=NAMES,
            rpc="CreateProject",
            request={"projectId": "named", "project": {"displayName": name}},
            field="project.display_name",
            command=("projects", "create", "named", "--name", name),
            says=says,
        )
        yield Call(
            row=NAMES,
            rpc="CreateVersion",
            request={
                "parent": "$project",
                "version": {"dataset": "$dataset", "displayName": name},
            },
            field="version.display_name",
            command=("versions", "create", "--dataset", "good", "--name", name),
            says=says,
        )
    yield Call(
        row=NAMES,
        rpc="CreateProject",
        request={"projectId": "No Such Id", "project": {"displayName": "x"}},
        field="project_id",
        command=("projects", "create", "No Such Id"),
        says="project_id",
    )
    yield Call(
        row=NAMES,
        rpc="CreateDataset",
        request={
            "parent": "$project",
            "dataset": {"displayName": ""},
            "upload": "$project/uploads/u",
        },
        field="dataset.display_name",
        without="the name of the file stands in for an empty one",
    )


def _training(
    command: tuple[str, ...], says: str, reason: str = "INVALID_FIELD", **settings: Any
) -> Call:
    training = {"model": "yolov8n", "batchSize": 4, "epochs": 1, **settings}
    wrong = next(iter(settings))
    return Call(
        row=NUMBERS,
        rpc="StartTraining",
        request={"parent": "$version", "training": training},
        reason=reason,
        field=f"training.{ {'batchSize': 'batch_size'}.get(wrong, wrong) }",
        command=("train", "one", "--detach", *command),
        says=says,
    )


def _numbers() -> Iterator[Call]:
    for number in (0, -1, 10**9):
        yield _training(("--batch", str(number)), "batch_size", batchSize=number)
        yield _training(("--epochs", str(number)), "epochs", epochs=number)
    for key, value, reason in (
        ("lr0", "NaN", "WRONG_TYPE"),
        ("lr0", 5, "OUT_OF_RANGE"),
        ("colour", "red", "UNKNOWN_HYPERPARAMETER"),
    ):
        yield _training(("--set", f"{key}={value}"), key, reason, hyperparameters={key: value})
    yield _training(("--model", "yolov99"), "yolov99", "UNKNOWN_MODEL", model="yolov99")


def _order() -> Iterator[Call]:
    pages = "it turns the pages itself"
    for rpc, token in (
        ("ListDatasets", "tampered"),
        ("ListVersions", "$token"),
        ("ListVersions", "AAAA$next"),
        ("ListWeights", "$next"),
    ):
        yield Call(
            row=CALLS,
            rpc=rpc,
            request={"parent": "$project", "pageToken": token},
            reason="BAD_PAGE_TOKEN",
            field="page_token",
            without=pages,
        )
    version = {"name": "$version", "displayName": "two"}
    yield Call(
        row=CALLS,
        rpc="UpdateVersion",
        request={"version": version, "updateMask": "noSuchField"},
        reason="BAD_FIELD_MASK",
        field="update_mask",
        without="it names the fields itself",
    )
    yield Call(
        row=CALLS,
        rpc="UpdateVersion",
        request={"version": {**version, "etag": "not-this-one"}, "updateMask": "displayName"},
        code="ABORTED",
        reason="ETAG_MISMATCH",
        without="it reads the etag right before it writes",
    )
    yield Call(
        row=CALLS,
        rpc="CreateProject",
        request={"projectId": "other", "project": {"displayName": "x"}},
        code="ALREADY_EXISTS",
        reason="DUPLICATE_PROJECT",
        command=("projects", "create", "other"),
        says="other",
    )
    yield Call(
        row=CALLS,
        rpc="CreateVersion",
        request={"parent": "$project", "version": {"dataset": "$dataset", "displayName": "one"}},
        code="ALREADY_EXISTS",
        reason="DUPLICATE_NAME",
        command=("versions", "create", "--dataset", "good", "--name", "one"),
        says="one",
    )
    yield Call(
        row=ORDER,
        rpc="StartTraining",
        request={
            "parent": "$failed",
            "training": {"model": "yolov8n", "batchSize": 4, "epochs": 1},
        },
        code="FAILED_PRECONDITION",
        reason="VERSION_NOT_READY",
        command=("train", "failed", "--detach"),
        says="FAILED",
    )
