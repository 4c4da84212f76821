"""What may be asked of an export, its names, and the graph of its states."""

from typing import Any

import pytest

from detflow.errors import InvalidArgument
from detflow.v1.export_pb2 import Export
from services.trainer.export_domain import (
    FINAL,
    MAX_ATTEMPTS,
    State,
    after_death,
    file_name,
    resolve,
    sources_of,
)


def test_states_are_those_of_the_contract() -> None:
    assert {state.value for state in State} | {"STATE_UNSPECIFIED"} == set(Export.State.keys())


def test_final_states_are_never_left() -> None:
    assert FINAL == {State.SUCCEEDED, State.FAILED, State.CANCELLED}
    assert not any(state in FINAL for target in State for state in sources_of(target))
    assert sources_of(State.CANCELLED) == [State.QUEUED, State.RUNNING]


def test_last_attempt_that_dies_is_the_end() -> None:
    nexts = [after_death(attempt) for attempt in range(1, MAX_ATTEMPTS + 1)]
    assert nexts == [State.QUEUED] * (MAX_ATTEMPTS - 1) + [State.FAILED]


@pytest.mark.parametrize("model", ["yolov8n", "efficientdet-d0"])
@pytest.mark.parametrize(
    "options",
    [
        {"format": Export.PYTORCH, "precision": Export.FP16, "image_size_px": 256},
        {"format": Export.ONNX, "dynamic": True, "end_to_end": True, "simplify": True},
        {"format": Export.ONNX, "opset": 20, "batch_size": 8},
        {"format": Export.OPENVINO, "precision": Export.INT8, "dynamic": True},
    ],
)
def test_options_that_fit_are_kept(model: str, options: dict[str, Any]) -> None:
    asked = Export(**options)
    found = resolve(asked, model=model, image_size_px=512)
    for name, value in options.items():
        assert getattr(found, name) == value
    assert found.precision and found.image_size_px and found.batch_size
    assert bool(found.opset) == (asked.format == Export.ONNX)


def test_what_the_server_sets_is_not_taken_from_the_user() -> None:
    asked = Export(format=Export.ONNX, state=Export.SUCCEEDED, name="x", file_name="y", revision=7)
    found = resolve(asked, model="yolov8n", image_size_px=640)
    assert (found.state, found.name, found.file_name, found.revision) == (0, "", "", 0)


def test_every_option_that_does_not_fit_is_named() -> None:
    asked = Export(
        format=Export.PYTORCH, precision=Export.INT8, image_size_px=100, opset=17, simplify=True
    )
    with pytest.raises(InvalidArgument) as caught:
        resolve(asked, model="yolov8n", image_size_px=640)
    fields = [violation.field for violation in caught.value.violations]
    assert sorted(fields) == [
        "export.image_size_px",
        "export.opset",
        "export.precision",
        "export.simplify",
    ]


def test_stride_is_that_of_the_model() -> None:
    asked = Export(format=Export.ONNX, image_size_px=416)
    assert resolve(asked, model="yolov5x", image_size_px=640).image_size_px == 416
    with pytest.raises(InvalidArgument, match="multiple of 128"):
        resolve(asked, model="efficientdet-d7", image_size_px=1536)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": Export.ONNX}, "yolov8n-t1-640.onnx"),
        (
            {"format": Export.ONNX, "precision": Export.FP16, "end_to_end": True},
            "yolov8n-t1-640-fp16-end-to-end.onnx",
        ),
        (
            {"format": Export.OPENVINO, "precision": Export.INT8},
            "yolov8n-t1-640-int8-openvino.zip",
        ),
        ({"format": Export.PYTORCH, "image_size_px": 320}, "yolov8n-t1-320-pytorch.zip"),
    ],
)
def test_file_name_says_what_is_inside(options: dict[str, Any], expected: str) -> None:
    found = resolve(Export(**options), model="yolov8n", image_size_px=640)
    assert file_name(found, model="yolov8n", training_id="t1") == expected
