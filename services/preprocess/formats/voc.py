"""Pascal VOC: one XML file per image.

Two layouts: `Annotations/a.xml` beside `JPEGImages/a.jpg` (or `images/`), and `a.xml` beside
`a.jpg`, both below any folder. Where the name of an annotation does not tell its image, its
<filename> does. Splits come from ImageSets/Main/*.txt, else from the names of the folders.

Box edges: `xmin, ymin, xmax, ymax` are taken as continuous edges in pixels from the left and the
top, as annotation tools write them today, and not as the 1-based inclusive pixel numbers of the
original challenge. A box with xmin == xmax therefore has no area and is BAD_BOX. The `<size>`
element is ignored: the image itself says how large it is.
"""

from __future__ import annotations

import re
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
    read_class_list,
    replace_folder,
    stem_of,
    text_lines,
)
from services.preprocess.formats.splits import split_of_folder

_ANNOTATION_FOLDERS = frozenset("annotations annotation xmls xml labels label".split())
_IMAGE_SETS = re.compile(r"(^|/)ImageSets/Main/(train|val|trainval|test)\.txt$", re.IGNORECASE)
_CLASS_LIST = "classes.txt"
_IMAGE_FOLDERS = ("JPEGImages", "images", "image", "imgs", "")
_EDGES = ("xmin", "ymin", "xmax", "ymax")


def is_there(index: PathIndex) -> bool:
    """Says whether there are XML files that look like annotations of images."""
    return any(_in_annotations(path) or _images_beside(index, path) for path in _xml_files(index))


def find_layout(index: PathIndex, read: ReadFile) -> Layout:
    """Pairs annotations with images; images of the same folders without annotation are background.

    Args:
        index: Paths of the archive.
        read: Reads a file; used for lists, and where an annotation's name does not tell its image.

    Raises:
        InvalidData: An annotation that had to be read is corrupt, or a list is wrong.
    """
    labels: dict[str, str] = {}
    problems: list[Problem] = []
    for path in _xml_files(index):
        try:
            image = _image_of(index, path, read)
        except LookupError as error:
            problems.append(
                Problem(
                    path,
                    Reason.AMBIGUOUS_LAYOUT,
                    f"it may belong to {error}; say which in <filename>, or rename one",
                )
            )
            continue
        except InvalidData as error:
            problems.append(error.problem)
            continue
        if image is None:
            if _in_annotations(path):
                problems.append(_without_image(path))
        elif image in labels:
            problems.append(
                Problem(
                    path,
                    Reason.DUPLICATE_NAME,
                    f"{image} is annotated by {labels[image]} already; delete one",
                )
            )
        else:
            labels[image] = path
    folders = {folder_of(image) for image in labels}
    images = [image for image in index.images if folder_of(image) in folders]
    listed = _image_sets(index, images, read, problems)
    samples = tuple(
        Sample(image, labels.get(image), listed.get(image) or split_of_folder(folder_of(image)))
        for image in images
    )
    return Layout(Format.VOC, samples, _class_list(index, read), tuple(problems))


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


def _images_beside(index: PathIndex, path: str) -> list[str]:
    """Returns the images of the same stem in the first folder that has any."""
    found = (index.find_images(folder, stem_of(path)) for folder in _image_folders(path))
    return next((images for images in found if images), [])


def _image_of(index: PathIndex, path: str, read: ReadFile) -> str | None:
    """Returns the image of an annotation: by its stem, else by its <filename>.

    Raises:
        LookupError: Several images could be meant; the text names two.
    """
    beside = _images_beside(index, path)
    if len(beside) == 1:
        return beside[0]
    if not beside and not _in_annotations(path):
        return None  # some other XML file
    name = (_parse(path, read(path)).findtext("filename") or "").strip()
    image = index.find_image(name, _image_folders(path))
    if not beside or image in beside:
        return image
    raise LookupError(f"{beside[0]} and {beside[1]}")


def _without_image(path: str) -> Problem:
    return Problem(
        path,
        Reason.MISSING_IMAGE,
        f"there is no image {stem_of(path)}.* for it; add the image or delete the annotation",
    )


def _class_list(index: PathIndex, read: ReadFile) -> tuple[str, ...] | None:
    """Reads classes.txt, which downloads write; the format has none, so it may be anything."""
    found = [p for p in index.paths if p.rpartition("/")[2].casefold() == _CLASS_LIST]
    try:
        return read_class_list(found[0], read(found[0])) if len(found) == 1 else None
    except InvalidData:
        return None


def _image_sets(
    index: PathIndex, images: list[str], read: ReadFile, problems: list[Problem]
) -> dict[str, str]:
    """Reads ImageSets/Main/{train,val,trainval,test}.txt: split by image.

    Images of `trainval` alone count as train. Lists of single classes (cat_train.txt) say nothing
    of the split.

    Raises:
        InvalidData: A list cannot be read, or two of them have the same image.
    """
    by_stem: dict[str, list[str]] = {}
    for image in images:
        by_stem.setdefault(stem_of(image), []).append(image)
    splits: dict[str, str] = {}
    listed_by: dict[str, str] = {}
    lists = [p for p in index.paths if _IMAGE_SETS.search(p)]
    # The lists of all training images last: they repeat what train and val say.
    for path in sorted(lists, key=lambda p: (stem_of(p).casefold() == "trainval", p)):
        name = stem_of(path).casefold()
        for number, line in enumerate(text_lines(path, read(path)), start=1):
            place = f"{path}:{number}"
            stem = line if line in by_stem else line.strip().partition(" ")[0]
            if not stem:
                continue
            if stem not in by_stem:
                problems.append(
                    Problem(
                        place,
                        Reason.MISSING_IMAGE,
                        f"there is no image {stem[:200]!r}; the line was ignored",
                        num_left_out=0,
                    )
                )
            for image in by_stem.get(stem, ()):
                if image not in splits:
                    splits[image] = "train" if name == "trainval" else name
                    listed_by[image] = path
                elif splits[image] != name and name != "trainval":
                    raise InvalidData(
                        place,
                        Reason.AMBIGUOUS_LAYOUT,
                        f"{stem[:200]!r} is in {listed_by[image]} too; keep it in one list",
                    )
    return splits
