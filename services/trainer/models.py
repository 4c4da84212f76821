"""The catalogue of models that can be trained."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from detflow.errors import InvalidArgument, Violation

DEFAULT_MODEL = "yolov5s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that can be trained.

    Attributes:
        id: What a training names, e.g. yolov8n.
        display_name: Name shown to people.
        family: Key of the defaults in the hyper-parameter schema.
        input_size_px: Default side of the square input, in pixels.
        num_parameters: Trainable parameters with 80 classes.
        licence: SPDX licence of the model's code.
    """

    id: str
    display_name: str
    family: str
    input_size_px: int
    num_parameters: int
    licence: str


def _yolo(family: str, scale: str, size: str, num_parameters: int) -> Model:
    version = family.removeprefix("yolo")
    return Model(
        id=f"{family}{scale}",
        display_name=f"YOLO {version} {size}".rstrip(),
        family=family,
        input_size_px=640,
        num_parameters=num_parameters,
        licence="AGPL-3.0",
    )


def _efficientdet(scale: int, input_size_px: int, num_parameters: int) -> Model:
    return Model(
        id=f"efficientdet-d{scale}",
        display_name=f"EfficientDet D{scale}",
        family="efficientdet",
        input_size_px=input_size_px,
        num_parameters=num_parameters,
        licence="Apache-2.0",
    )


# The v5 models are ultralytics' anchor-free variants (yolov5nu, ...), hence not of the published
# v5 sizes. EfficientDet D6 and D7 differ in input size and anchors only.
MODELS: tuple[Model, ...] = (
    _yolo("yolov5", "n", "", 2_654_800),
    _yolo("yolov5", "s", "Small", 9_153_136),
    _yolo("yolov5", "m", "Medium", 25_111_440),
    _yolo("yolov5", "l", "Large", 53_225_008),
    _yolo("yolov5", "x", "XLarge", 97_276_432),
    _yolo("yolov8", "n", "", 3_157_184),
    _yolo("yolov8", "s", "Small", 11_166_544),
    _yolo("yolov8", "m", "Medium", 25_902_624),
    _yolo("yolov8", "l", "Large", 43_691_504),
    _yolo("yolov8", "x", "XLarge", 68_229_632),
    _efficientdet(0, 512, 3_871_913),
    _efficientdet(1, 640, 6_614_016),
    _efficientdet(2, 768, 8_081_045),
    _efficientdet(3, 896, 12_007_886),
    _efficientdet(4, 1024, 20_687_745),
    _efficientdet(5, 1280, 33_607_145),
    _efficientdet(6, 1408, 51_806_412),
    _efficientdet(7, 1536, 51_806_412),
)

FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(model.family for model in MODELS))

_BY_ID = {model.id: model for model in MODELS}


def get_model(model_id: str) -> Model:
    """Returns a model of the catalogue; the empty id means the default.

    Raises:
        InvalidArgument: UNKNOWN_MODEL; the message lists the ids there are.
    """
    try:
        return _BY_ID[model_id or DEFAULT_MODEL]
    except KeyError:
        near = difflib.get_close_matches(model_id, _BY_ID, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        problem = f"there is no model {model_id!r}; {hint}choose one of {', '.join(_BY_ID)}"
        raise InvalidArgument(
            problem,
            reason="UNKNOWN_MODEL",
            violations=[Violation("training.model", "UNKNOWN_MODEL", problem)],
        ) from None
