"""Pascal VOC: one XML file per image.

Two layouts: `Annotations/a.xml` beside `JPEGImages/a.jpg` (or `images/`), and `a.xml` beside
`a.jpg`.

Box edges: `xmin, ymin, xmax, ymax` are taken as continuous edges in pixels from the left and the
top, as annotation tools write them today, and not as the 1-based inclusive pixel numbers of the
original challenge. A box with xmin == xmax therefore has no area and is BAD_BOX. The `<size>`
element is ignored: the image itself says how large it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree.ElementTree import Element, ParseError

import defusedxml
import defusedxml.ElementTree

from services.preprocess.domain import InvalidData, Problem, Reason
from services.preprocess.formats.layout import (
    MAX_LABEL_BYTES,
    Format,
    Labels,
    LabelsBuilder,
    Layout,
    PathIndex,
    ReadFile,
    Sample,
    class_name_problem,
    folder_of,
    replace_folder,
    stem_of,
)
from services.preprocess.formats.splits import split_of_folder

_ANNOTATION_FOLDERS = frozenset({"annotations", "annotation"})
_IMAGE_FOLDERS = ("JPEGImages", "images", "image", "imgs", "")
_EDGES = ("xmin", "ymin", "xmax", "ymax")


def is_there(index: PathIndex) -> bool:
    """Says whether there are XML files that look like annotations of images."""
    return any(_in_annotations(path) or _image_beside(index, path) for path in _xml_files(index))


def find_layout(index: PathIndex, read: ReadFile) -> Layout:
    """Pairs annotations with images; images of the same folders without annotation are background.

    Args:
        index: Paths of the archive.
        read: Reads a file; used where an annotation's name does not match an image.

    Raises:
        InvalidData: An annotation that had to be read is corrupt.
    """
    labels: dict[str, str] = {}
    problems = []
    for path in _xml_files(index):
        image = _image_beside(index, path)
        if image is None and _in_annotations(path):
            image = _image_by_filename(index, path, read)
            if image is None:
                problems.append(
                    Problem(
                        path,
                        Reason.MISSING_IMAGE,
                        f"there is no image {stem_of(path)}.* for it; add the image or delete the"
                        " annotation",
                    )
                )
        if image is None:
            continue
        if image in labels:
            problems.append(
                Problem(
                    path,
                    Reason.DUPLICATE_NAME,
                    f"{image} is annotated by {labels[image]} already; delete one",
                )
            )
            continue
        labels[image] = path
    folders = {folder_of(image) for image in labels}
    samples = tuple(
        Sample(image, labels.get(image), split_of_folder(folder_of(image)))
        for image in index.images
        if folder_of(image) in folders
    )
    return Layout(Format.VOC, samples, None, tuple(problems))


def parse_labels(path: str, data: bytes, size: tuple[int, int]) -> Labels:
    """Reads the objects of an annotation; `object[n]` in messages counts from 1, as XPath does.

    Args:
        path: Path of the file, for messages.
        data: Its content.
        size: Width and height of the upright image in pixels.

    Raises:
        InvalidData: CORRUPT_LABEL or DTD_FORBIDDEN.
    """
    builder = LabelsBuilder(*size)
    for number, element in enumerate(_parse(path, data).findall("object"), start=1):
        where = f"{path} object[{number}]"
        name = (element.findtext("name") or "").strip()
        if problem := class_name_problem(name):
            builder.refuse(Problem(where, Reason.UNKNOWN_CLASS, f"{problem}; name the class"))
            continue
        try:
            x1, y1, x2, y2 = (_edge(element, edge) for edge in _EDGES)
        except ValueError as error:
            builder.refuse(Problem(where, Reason.BAD_BOX, f"{error}; correct it"))
            continue
        builder.add(where, name, (x1, y1, x2, y2))
    return builder.build()


def _edge(element: Element, edge: str) -> float:
    text = (element.findtext(f"bndbox/{edge}") or "").strip()
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"bndbox/{edge} is {text[:40]!r}, not a number") from None


def _parse(path: str, data: bytes) -> Element:
    if len(data) > MAX_LABEL_BYTES:
        raise InvalidData(
            path, Reason.CORRUPT_LABEL, f"annotations above {MAX_LABEL_BYTES} bytes are not read"
        )
    try:
        root: Element = defusedxml.ElementTree.fromstring(data, forbid_dtd=True)
    except defusedxml.DefusedXmlException as error:
        raise InvalidData(
            path, Reason.DTD_FORBIDDEN, "it declares a DTD or entities; remove the DOCTYPE"
        ) from error
    except (ParseError, ValueError, LookupError) as error:
        raise InvalidData(
            path, Reason.CORRUPT_LABEL, f"not readable XML ({error}); export it again"
        ) from error
    if root.tag != "annotation":
        raise InvalidData(
            path,
            Reason.CORRUPT_LABEL,
            f"the root element is <{root.tag[:40]}>, not <annotation>; export it as Pascal VOC",
        )
    return root


def _xml_files(index: PathIndex) -> Iterator[str]:
    return (path for path in index.paths if path.casefold().endswith(".xml"))


def _in_annotations(path: str) -> bool:
    return replace_folder(folder_of(path), _ANNOTATION_FOLDERS, "") is not None


def _image_folders(path: str) -> list[str]:
    folder = folder_of(path)
    replaced = (replace_folder(folder, _ANNOTATION_FOLDERS, name) for name in _IMAGE_FOLDERS)
    return [folder, *(other for other in replaced if other is not None)]


def _image_beside(index: PathIndex, path: str) -> str | None:
    stem = stem_of(path)
    found = (index.find_image(folder, stem) for folder in _image_folders(path))
    return next((image for image in found if image is not None), None)


def _image_by_filename(index: PathIndex, path: str, read: ReadFile) -> str | None:
    """Follows <filename>, of which only the last part counts."""
    name = (_parse(path, read(path)).findtext("filename") or "").strip()
    last = name.replace("\\", "/").rpartition("/")[2]
    found = (index.find(f"{folder}/{last}".lstrip("/")) for folder in _image_folders(path))
    return next((image for image in found if image is not None), None) if last else None
