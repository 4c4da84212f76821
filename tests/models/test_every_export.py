"""Every model of the catalogue as ONNX and OpenVINO, opened and compared with torch.

The networks have learnt nothing, but their confidences are spread. `make models` prints how far
apart the answers are: the largest difference of a corner and of a confidence, over all predictions
of eight images of which torch is at least 25 % sure.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from detflow.v1.export_pb2 import Export
from services.trainer.export_domain import stride_of
from services.trainer.models import MODELS, Model, get_model
from tests.export_player import play

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Options = dict[str, Any]
Rows = list[tuple[str, ...]]
FORMATS: dict[str, Options] = {"ONNX": {"format": Export.ONNX}}
ROUNDED: dict[str, Options] = {
    "ONNX FP16 dynamic": {"format": Export.ONNX, "precision": Export.FP16, "dynamic": True},
}
if find_spec("openvino") is not None:
    FORMATS["OpenVINO"] = {"format": Export.OPENVINO}
    ROUNDED |= {
        "OpenVINO FP16": {"format": Export.OPENVINO, "precision": Export.FP16},
        "OpenVINO INT8": {"format": Export.OPENVINO, "precision": Export.INT8},
    }


@pytest.fixture(scope="module")
def rows() -> Iterator[Rows]:
    """Takes the rows of a table, which is printed at the end."""
    taken: Rows = [
        ("model", "export", "size", "boxes", "confidences"),
        ("---",) * 5,
    ]
    yield taken
    print("", *("| " + " | ".join(row) + " |" for row in taken), sep="\n")


def differences(
    folder: Path, model: Model, exports: dict[str, Options], size: int, rows: Rows, **more: Any
) -> dict[str, tuple[float, float]]:
    """Exports a model in some ways; returns how far boxes (px) and confidences are from torch's."""
    cases = [{"model": model.id, "size": size, "options": one, **more} for one in exports.values()]
    found = {}
    for name, result in zip(exports, play(folder, cases), strict=True):
        assert result.get("message") is None
        assert result["num_confident"] > 0
        found[name] = result["px"], result["confidence"]
        cells = f"{result['px']:.1g} px", f"{result['confidence']:.1g}"
        rows.append((model.id, name, f"{size} px", *cells))
    return found


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_exports_of_model_answer_as_torch(model: Model, rows: Rows, tmp_path: Path) -> None:
    size = max(64, stride_of(model.id))
    for px, confidence in differences(tmp_path, model, FORMATS, size, rows).values():
        assert px < 0.05 and confidence < 1e-4


@pytest.mark.parametrize("model", ["yolov8n", "efficientdet-d0"])
def test_rounded_exports_of_model_are_near_torch(model: str, rows: Rows, tmp_path: Path) -> None:
    # A dynamic one is asked about half of it too. Confidences are spread less than above: rounding
    # would change an untrained network too much.
    size = 2 * stride_of(model)
    found = differences(tmp_path, get_model(model), ROUNDED, size, rows, spread=0.02)
    for name, (px, confidence) in found.items():
        # As docs/how-to/export.md says: of the image's side, and of 1.
        box, score = (0.06, 0.3) if "INT8" in name else (0.01, 0.02)
        assert px < box * size and confidence < score, name
