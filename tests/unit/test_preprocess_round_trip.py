"""What is downloaded in any format and imported again is the same dataset: all nine pairs."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from services.preprocess.formats import Format
from tests.preprocess_import import Imported, download, import_archive
from tests.preprocess_samples import jpeg, pack, with_orientation

_CLASSES = st.lists(
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cf", "Zl", "Zp", "Cn")),
        max_size=12,
    )
    .map(str.strip)
    .filter(bool),
    min_size=1,
    max_size=4,
    unique=True,
)
_STEMS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="/\\:"),
    min_size=1,
    max_size=8,
).filter(lambda stem: stem.strip(". ") == stem and not stem.startswith("._"))
_SIZE = (40, 30)


@st.composite
def _edges(draw: st.DrawFn, side: int) -> tuple[float, float]:
    low = draw(st.just(0.0) | st.integers(0, side - 2).map(float) | st.floats(1e-9, side - 2))
    high = draw(st.just(float(side)) | st.floats(low + 1, side))
    return low, high


@st.composite
def _datasets(draw: st.DrawFn) -> dict[str, bytes]:
    """A COCO archive with odd names, unicode classes, splits and boxes at the edges."""
    classes = draw(_CLASSES)
    stems = draw(st.lists(_STEMS, min_size=2, max_size=4, unique_by=str.casefold))
    files: dict[str, bytes] = {}
    documents: dict[str, dict[str, list[object]]] = {}
    for number, stem in enumerate(stems):
        split = draw(st.sampled_from(["train", "val", "test", "loose"]))
        data = jpeg(*_SIZE, seed=number)
        size = _SIZE
        if draw(st.booleans()):
            data, size = with_orientation(data, 6), _SIZE[::-1]
        name = f"{split}/{stem}.jpg"
        files[name] = data
        document = documents.setdefault(
            split,
            {
                "images": [],
                "annotations": [],
                "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
            },
        )
        document["images"].append({"id": number, "file_name": f"{stem}.jpg"})
        for _ in range(draw(st.integers(0, 3))):
            (x1, x2), (y1, y2) = draw(_edges(size[0])), draw(_edges(size[1]))
            document["annotations"].append(
                {
                    "image_id": number,
                    "category_id": draw(st.integers(0, len(classes) - 1)),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    for split, document in documents.items():
        files[f"annotations/instances_{split}.json"] = json.dumps(document).encode()
    return files


def content(imported: Imported) -> object:
    """What must be the same after a download and an import, whatever the names of the files."""
    images = Counter(
        (i.sha256, i.existing_split, i.class_ids, i.boxes, i.crowds, i.width, i.height)
        for i in imported.images
    )
    return imported.class_names, images


@settings(max_examples=15, deadline=None)
@given(_datasets())
def test_downloads_import_as_the_same_dataset_in_all_nine_pairs(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(3)]
        for folder in folders:
            folder.mkdir()
        original = import_archive(pack(files), folders[0])
        assert not original.problems
        assert len(original.images) == sum(path.endswith(".jpg") for path in files)
        for first in Format:
            data = download(original, folders[0], first)
            one = import_archive(data, folders[1])
            assert (one.format, one.problems) == (first, ())
            assert content(one) == content(original)
            for second in Format:
                data = download(one, folders[1], second)
                two = import_archive(data, folders[2])
                assert (two.format, two.problems) == (second, ())
                assert content(two) == content(original)
                assert download(one, folders[1], second) == data
