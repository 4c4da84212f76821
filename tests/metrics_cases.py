"""Ground truth and predictions for properties of evaluations, and plain Python to check them by."""

import contextlib
import io
from typing import Any

import hotcoco
import numpy as np
import pyarrow.parquet
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from services.metrics.domain import ErrorKind
from tests.metrics_fakes import Row, ground_truth

Case = tuple[dict[str, Any], list[Row]]

# On this grid boxes often coincide, IoUs are often exactly 0.5 and areas exactly 32^2 or 96^2.
_PLACES = st.sampled_from([0.0, 16.0, 32.0, 100.0])
_SIDES = st.sampled_from([0.0, 16.0, 32.0, 64.0, 96.0, 128.0])
_BOXES = st.tuples(_PLACES, _PLACES, _SIDES, _SIDES)
_CONFIDENCES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@st.composite
def cases(draw: st.DrawFn, *, crowds: bool = True) -> Case:
    """A few images, boxes and detections of a few classes; there may be none, and much is equal."""
    num_images, num_classes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    images, classes = st.integers(1, num_images), st.integers(0, num_classes - 1)
    crowd = st.sampled_from([0, 0, 1]) if crowds else st.just(0)
    boxes = draw(st.lists(st.tuples(images, classes, _BOXES, crowd), max_size=8))
    places = [box for _, _, box, _ in boxes]
    near = st.sampled_from(places) if places else _BOXES
    detections = st.tuples(images, classes, _CONFIDENCES, st.one_of(near, _BOXES))
    rows: list[Row] = [
        (image, index, confidence, x, y, x + w, y + h)
        for image, index, confidence, (x, y, w, h) in draw(st.lists(detections, max_size=12))
    ]
    truth = ground_truth(num_images, num_classes, [(i, k, list(b), c) for i, k, b, c in boxes])
    return truth, rows


def reference_rows(data: bytes) -> list[dict[str, Any]]:
    """The predictions as pycocotools takes them, coordinates widened from float32."""
    table = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    return [
        {
            "image_id": row["image_id"],
            "category_id": row["class_id"] + 1,
            "bbox": [row["x1"], row["y1"], row["x2"] - row["x1"], row["y2"] - row["y1"]],
            "score": row["confidence"],
        }
        for row in table
    ]


def run_pycocotools(truth: dict[str, Any], data: bytes) -> Any:
    """COCOeval after summarize.

    pycocotools itself cannot load an empty list of predictions; with none it is given the same
    empty annotations that `loadRes` would have made of it.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        rows = reference_rows(data)
        if rows:
            dt = gt.loadRes(rows)
        else:
            dt = COCO()
            dt.dataset = {**truth, "annotations": []}
            dt.createIndex()
        evaluation = COCOeval(gt, dt, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def plain_iou(a: list[float], b: list[float], crowd: bool = False) -> float:
    """IoU of two x, y, width, height; by the area of the first alone if the second is a crowd."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    own = a[2] * a[3]
    return w * h / (own if crowd else own + b[2] * b[3] - w * h)


def jittered(seed: int) -> Case:
    """Boxes and detections with coordinates such that no two IoUs are equal, nor exactly 0.5."""
    rng = np.random.default_rng(seed)
    boxes: list[tuple[int, int, list[float], int]] = []
    rows: list[Row] = []
    for image in range(1, 31):
        for _ in range(int(rng.integers(0, 7))):
            x, y, w, h = (rng.random(4) * [300, 300, 120, 120] + [0, 0, 8, 8]).tolist()
            boxes.append((image, int(rng.integers(4)), [x, y, w, h], 0))
            for _ in range(int(rng.integers(0, 4))):
                dx, dy, dw, dh = (rng.normal(0, 0.2, 4) * [w, h, w, h]).tolist()
                index = boxes[-1][1] if rng.random() < 0.7 else int(rng.integers(4))
                left, top = x + dx, y + dy
                right, bottom = left + max(w + dw, 1.0), top + max(h + dh, 1.0)
                rows.append((image, index, float(rng.random()), left, top, right, bottom))
        left, top = (rng.random(2) * 300 + 450).tolist()  # where there is nothing
        rows.append(
            (image, int(rng.integers(4)), float(rng.random()), left, top, left + 9, top + 9)
        )
    return ground_truth(30, 4, boxes), rows


def run_tide(truth: dict[str, Any], data: bytes) -> dict[str, Any]:
    """The errors as hotcoco tells them apart: `counts` and, as `delta_ap`, what they cost."""
    gt = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(gt, gt.load_res(reference_rows(data)), "bbox")
    evaluation.evaluate()
    found: dict[str, Any] = evaluation.tide_errors()
    return found


TIDE_NAMES = {
    ErrorKind.CLASS: "Cls",
    ErrorKind.LOCALIZATION: "Loc",
    ErrorKind.BOTH: "Both",
    ErrorKind.DUPLICATE: "Dupe",
    ErrorKind.BACKGROUND: "Bkg",
    ErrorKind.MISSED: "Miss",
}
"""How TIDE calls the kinds of errors."""
