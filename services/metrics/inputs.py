"""What is measured: the ground truth and the detections of a split, read from their files.

Array shapes are named by suffix: I images, N detections, M ground-truth boxes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from detflow.errors import DataLoss

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.signedinteger[Any]]
Booleans = npt.NDArray[np.bool_]

_COLUMNS = {
    "image_id": pyarrow.int32(),
    "class_id": pyarrow.int32(),
    "confidence": pyarrow.float32(),
    "x1": pyarrow.float32(),
    "y1": pyarrow.float32(),
    "x2": pyarrow.float32(),
    "y2": pyarrow.float32(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """Ground truth; boxes by image, then in the order of the file.

    Attributes:
        class_names: Name by class index.
        paths: Path of each image in its dataset.
        id_I: Id of each image, increasing.
        size_I2: Width and height in pixels.
        image_M: Image of each box: its position among the images.
        class_M: Class index.
        box_M4: x, y, width, height in pixels.
        area_M: Area in square pixels, as the file states it.
        crowd_M: It is a crowd region.
    """

    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    id_I: Integers
    size_I2: Integers
    image_M: Integers
    class_M: Integers
    box_M4: Floats
    area_M: Floats
    crowd_M: Booleans


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """Detections; by image, then most confident first, equal ones in the order of the file.

    Attributes:
        image_N: Image of each detection: its position among the images.
        class_N: Class index.
        confidence_N: 0..1.
        corner_N4: x1, y1, x2, y2 in pixels.
    """

    image_N: Integers
    class_N: Integers
    confidence_N: npt.NDArray[np.float32]
    corner_N4: npt.NDArray[np.float32]

    @property
    def box_N4(self) -> Floats:
        """x, y, width, height in pixels."""
        corner_N4 = self.corner_N4.astype(np.float64)
        return np.concatenate([corner_N4[:, :2], corner_N4[:, 2:] - corner_N4[:, :2]], axis=1)


def read_ground_truth(coco: Mapping[str, Any]) -> Truth:
    """Reads a COCO dictionary (images, annotations, categories); category ids are indexes + 1.

    Raises:
        DataLoss: BAD_GROUND_TRUTH: it is not what a bundle holds.
    """
    try:
        images = sorted(coco["images"], key=lambda image: image["id"])
        categories = sorted(coco["categories"], key=lambda category: category["id"])
        annotations = coco["annotations"]
        id_I = np.array([i["id"] for i in images], np.int64)
        id_M = np.array([a["image_id"] for a in annotations], np.int64)
        category_M = np.array([a["category_id"] for a in annotations], np.int64)
        order_M = np.argsort(id_M, kind="stable")
        truth = Truth(
            class_names=tuple(str(c["name"]) for c in categories),
            paths=tuple(_path(i) for i in images),
            id_I=id_I,
            size_I2=np.array([(i["width"], i["height"]) for i in images], np.int64).reshape(-1, 2),
            image_M=np.searchsorted(id_I, id_M[order_M]),
            class_M=category_M[order_M] - 1,
            box_M4=np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)[order_M],
            area_M=np.array([a["area"] for a in annotations], np.float64)[order_M],
            crowd_M=np.array([a.get("iscrowd", 0) for a in annotations], np.bool_)[order_M],
        )
        ids = [category["id"] for category in categories]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _bad_ground_truth(
            f"is no COCO detection dictionary ({type(error).__name__}: {error})"
        ) from error
    if ids != list(range(1, len(ids) + 1)):
        raise _bad_ground_truth(f"has category ids {ids[:5]}..., not 1 to {len(ids)}")
    if not np.isin(category_M, ids).all():
        raise _bad_ground_truth("has a box whose category_id is not among the categories")
    if (np.diff(id_I) == 0).any() or not np.isin(id_M, id_I).all():
        raise _bad_ground_truth("has an image id twice, or a box whose image_id is of no image")
    return truth


def _path(image: Mapping[str, Any]) -> str:
    """The path in the dataset; a ground truth without sources has the file names only."""
    source = image.get("source")
    return str(source["path"] if source else image["file_name"])


def read_predictions(data: bytes, truth: Truth) -> Predicted:
    """Reads predictions on the images of a ground truth.

    Args:
        data: Parquet with image_id, class_id (0-based) int32, confidence, x1, y1, x2, y2 float32.
        truth: The ground truth.

    Raises:
        DataLoss: BAD_PREDICTIONS: they are not what a worker writes.
    """
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data), columns=list(_COLUMNS))
        columns = {name: table.column(name).cast(kind) for name, kind in _COLUMNS.items()}
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise _bad_predictions(f"are no parquet of the expected columns ({error})") from error
    if any(column.null_count for column in columns.values()):
        raise _bad_predictions("have null values")
    corner_N4 = np.stack([columns[name].to_numpy() for name in ("x1", "y1", "x2", "y2")], axis=1)
    id_N, class_N = (columns[name].to_numpy() for name in ("image_id", "class_id"))
    confidence_N = columns["confidence"].to_numpy()
    _require(np.isfinite(corner_N4).all(axis=1), "have a coordinate that is not finite")
    _require(
        (corner_N4[:, 2:] >= corner_N4[:, :2]).all(axis=1), "have a box with x2 < x1 or y2 < y1"
    )
    _require((confidence_N >= 0) & (confidence_N <= 1), "have a confidence outside 0..1")
    last_class = len(truth.class_names) - 1
    _require((class_N >= 0) & (class_N <= last_class), f"have a class_id outside 0..{last_class}")
    _require(np.isin(id_N, truth.id_I), "have an image_id that is not in the split")
    order_N = np.lexsort((-confidence_N, id_N))
    return Predicted(
        image_N=np.searchsorted(truth.id_I, id_N[order_N]),
        class_N=class_N[order_N].astype(np.int64),
        confidence_N=confidence_N[order_N],
        corner_N4=corner_N4[order_N],
    )


def _require(good_N: npt.NDArray[np.bool_] | np.bool_, fault: str) -> None:
    if not good_N.all():
        raise _bad_predictions(f"{fault}, first in row {int(np.argmin(good_N))}")


def _bad_predictions(fault: str) -> DataLoss:
    return DataLoss(
        f"the predictions {fault}; resume the training to make them again", reason="BAD_PREDICTIONS"
    )


def _bad_ground_truth(fault: str) -> DataLoss:
    return DataLoss(
        f"the ground truth {fault}; preprocess the version again", reason="BAD_GROUND_TRUTH"
    )
