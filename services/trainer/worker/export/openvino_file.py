"""OpenVINO exports: a zip of model.xml and model.bin, made of an ONNX file."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.trainer.worker.export import onnx_file
from services.trainer.worker.export.pytorch import pack
from services.trainer.worker.export.weights import Predict

_DFL = re.compile(r"/dfl/")
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "MatMul")


def write(
    network: Any,
    options: onnx_file.Options,
    about: Mapping[str, str],
    folder: Path,
    *,
    half: bool,
    calibration: NDArray[np.float32] | None = None,
    on_image: Callable[[int], None] = lambda done: None,
) -> Path:
    """Writes a network and returns the zip.

    Args:
        network: In evaluation mode; of no other use afterwards.
        options: Sizes and axes; of fp32.
        about: What the file says about itself.
        folder: Where to write.
        half: Store weights as fp16.
        calibration: Pictures to choose the ranges of 8-bit integers with, shape
            (n, 3, image_size, image_size); None leaves the model in floating point.
        on_image: Told how many pictures were used.
    """
    openvino = _import_openvino()
    onnx_file.write(network, options, about, folder / "model.onnx")
    model = openvino.Core().read_model(folder / "model.onnx")
    if calibration is not None:
        model = _quantize(model, calibration, options.batch_size, on_image)
    for key, value in about.items():
        model.set_rt_info(value, ["detflow", key])
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=half)
    return pack(folder, ("model.xml", "model.bin"))


def predict_with(path: Path) -> Predict:
    """Loads the model.xml beside a zip that `write` made."""
    openvino = _import_openvino()
    # In fp32 where it has fp32 weights: by default some processors compute in bf16.
    compiled = openvino.Core().compile_model(
        path.with_name("model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def predict(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(compiled(pixels)[0], dtype=np.float32)

    return predict


def _import_openvino() -> Any:
    """Imports OpenVINO without the package by which it and nncf report their use to the maker."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


def _quantize(
    model: Any, calibration: NDArray[np.float32], batch_size: int, on_image: Callable[[int], None]
) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)

    def batch(start: int) -> NDArray[np.float32]:
        on_image(min(start + batch_size, len(calibration)))
        return calibration[np.arange(start, start + batch_size) % len(calibration)]

    starts = range(0, len(calibration), batch_size)
    return nncf.quantize(
        model,
        nncf.Dataset(starts, batch),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(starts),
        ignored_scope=nncf.IgnoredScope(names=_decoding(model)),
    )


def _decoding(model: Any) -> list[str]:
    """Returns the operations behind the last convolutions: coordinates need more than 8 bits."""
    found: dict[str, None] = {}
    waiting = [output.get_node() for output in model.outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        name = node.get_friendly_name()
        if name in seen:
            continue
        seen.add(name)
        kind = node.get_type_name()
        if kind in _CONVOLUTIONS and not _DFL.search(name):
            continue
        if kind not in ("Constant", "Parameter", "Result"):
            found[name] = None
        waiting += [source.get_source_output().get_node() for source in node.inputs()]
    return [*found]
