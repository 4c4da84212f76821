"""Exported files, opened by the libraries they are for, answer as the network they were made of.

The networks have learnt nothing, but their confidences are spread; one process does all cases.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from detflow.v1.export_pb2 import Export
from tests.export_player import Case, play

REPOSITORY = Path(__file__).parent.parent.parent

YOLO = {"model": "yolov8n", "size": 128}
EFFICIENTDET = {"model": "efficientdet-d0", "size": 128}
FP16 = {"precision": Export.FP16}
# Confidences are spread less where rounding would change an untrained network too much.
CASES: dict[str, Case] = {
    "yolo pytorch": {**YOLO, "options": {"format": Export.PYTORCH}},
    "yolo onnx simplified": {**YOLO, "options": {"format": Export.ONNX, "simplify": True}},
    "yolo onnx dynamic": {**YOLO, "options": {"format": Export.ONNX, "dynamic": True}},
    "yolo onnx opset 13": {**YOLO, "options": {"format": Export.ONNX, "opset": 13}},
    "yolo openvino": {**YOLO, "options": {"format": Export.OPENVINO}},
    "efficientdet pytorch fp16": {**EFFICIENTDET, "options": {"format": Export.PYTORCH, **FP16}},
    "efficientdet onnx fp16": {**EFFICIENTDET, "options": {"format": Export.ONNX, **FP16}},
    "efficientdet openvino dynamic": {
        "model": "efficientdet-d0",
        "size": 256,
        "options": {"format": Export.OPENVINO, "dynamic": True},
    },
    "efficientdet-d6 onnx": {
        "model": "efficientdet-d6",
        "size": 128,
        "options": {"format": Export.ONNX},
    },
    "yolo v5 onnx": {"model": "yolov5n", "size": 64, "options": {"format": Export.ONNX}},
}
ROUNDED: dict[str, Case] = {
    "yolo pytorch": {**YOLO, "spread": 0.02, "options": {"format": Export.PYTORCH, **FP16}},
    "yolo onnx": {
        **YOLO,
        "spread": 0.02,
        "options": {"format": Export.ONNX, "batch_size": 3, **FP16},
    },
    "yolo openvino": {**YOLO, "spread": 0.02, "options": {"format": Export.OPENVINO, **FP16}},
    "yolo openvino int8": {
        **YOLO,
        "spread": 0.02,
        "options": {"format": Export.OPENVINO, "precision": Export.INT8},
    },
}
END_TO_END: dict[str, Case] = {
    "yolo": {**YOLO, "options": {"format": Export.ONNX, "end_to_end": True, "simplify": True}},
    "efficientdet dynamic": {
        **EFFICIENTDET,
        "options": {"format": Export.ONNX, "end_to_end": True, "dynamic": True},
    },
}
SPOILED: Case = {**YOLO, "spoil": "weights", "options": {"format": Export.ONNX}}
ALL_MODELS = (
    *(f"yolo{version}{scale}" for version in ("v5", "v8") for scale in "nsmlx"),
    *(f"efficientdet-d{scale}" for scale in range(8)),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cases = {
        **CASES,
        **{f"rounded {name}": case for name, case in ROUNDED.items()},
        **{f"end to end {name}": case for name, case in END_TO_END.items()},
        "spoiled": SPOILED,
    }
    found = play(tmp_path_factory.mktemp("exports"), [*cases.values()])
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_export_answers_as_its_network(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[name]
    assert result.get("message") is None
    assert result["num_confident"] > 0
    is_rounded = "fp16" in name
    assert result["px"] < 0.05 and result["confidence"] < (5e-3 if is_rounded else 2e-5)
    # What the resource says is what is found here.
    assert result["claimed_confidence"] == pytest.approx(result["confidence"], abs=1e-3)


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_export_is_near_its_network(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[f"rounded {name}"]
    assert result.get("message") is None
    assert 0 < result["confidence"] < (0.3 if "int8" in name else 2e-3)
    assert result["px"] < 0.05


@pytest.mark.parametrize("name", END_TO_END)
def test_end_to_end_export_finds_what_an_evaluation_finds(
    name: str, results: dict[str, dict[str, Any]]
) -> None:
    result = results[f"end to end {name}"]
    assert result.get("message") is None
    assert result["lost"] == 0


def test_smaller_numbers_make_smaller_files(results: dict[str, dict[str, Any]]) -> None:
    fp32 = results["yolo openvino"]["size_bytes"]
    fp16 = results["rounded yolo openvino"]["size_bytes"]
    int8 = results["rounded yolo openvino int8"]["size_bytes"]
    assert int8 < 0.7 * fp16 < 0.5 * fp32


def test_file_says_what_it_is(results: dict[str, dict[str, Any]]) -> None:
    about = results["yolo onnx opset 13"]["about"]
    assert about["model"] == "yolov8n" and about["opset"] == "13"
    assert json.loads(about["class_names"]) == ["circle", "square", "triangle"]
    assert (about["image_size_px"], about["stride"], about["precision"]) == ("128", "32", "FP32")
    assert about["licence"] == "AGPL-3.0"
    assert about["training"] == "projects/p/versions/v/trainings/t"
    assert results["efficientdet onnx fp16"]["about"]["licence"] == "Apache-2.0"
    assert results["efficientdet openvino dynamic"]["about"]["stride"] == "128"


def test_progress_names_its_stages_and_never_goes_back(results: dict[str, dict[str, Any]]) -> None:
    for name in ("yolo pytorch", "rounded yolo openvino int8"):
        result = results[name]
        assert result["stages"] == ["load", "convert", "check", "store"]
        assert result["percent"] == sorted(result["percent"])
        assert 0 <= result["percent"][0] and result["percent"][-1] <= 100


def test_export_that_differs_is_not_stored(results: dict[str, dict[str, Any]]) -> None:
    assert results["spoiled"]["error"] == "EXPORT_DIFFERS"
    assert "allowed" in results["spoiled"]["message"]
    assert not results["spoiled"]["stored"]


def test_examples_of_the_guide_run(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    guide = (REPOSITORY / "docs/how-to/export.md").read_text()
    examples = re.findall(r"```python name=\S+\n(.*?)```", guide, re.DOTALL)
    assert len(examples) == guide.count("```python") == 6
    files = {
        "model.onnx": "yolo onnx simplified",
        "end-to-end.onnx": "end to end yolo",
        "openvino.zip": "yolo openvino",
        "pytorch.zip": "yolo pytorch",
    }
    for name, case in files.items():
        shutil.copy(results[case]["file"], tmp_path / name)
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "picture.jpg"), picture)
    ends = "assert predictions.shape == (1, 7, 336), predictions.shape\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join([*examples, ends])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "YOLO_CONFIG_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [line.split() for line in done.stdout.splitlines()]
    found = [line for line in printed if line[0] in ("circle", "square", "triangle")]
    assert {len(line) for line in found} == {6}, "both examples print class, confidence and box"
    assert all(0.25 <= float(line[1]) <= 1 for line in found)


@pytest.mark.slow
def test_every_model_is_written_for_pytorch_and_read_back(tmp_path: Path) -> None:
    found = play(tmp_path, {"models": ALL_MODELS})
    for model, result in zip(ALL_MODELS, found, strict=True):
        assert result["apart"] == 0, model
        built, told = result["strides"]
        assert built == told, model
