"""ONNX exports: one file with a graph and what it says about itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detflow.errors import FailedPrecondition
from services.trainer.export_domain import DEFAULT_OPSET
from services.trainer.worker.export.graph import EndToEnd, Graph
from services.trainer.worker.export.weights import Predict
from services.trainer.worker.networks import Network

INPUT = "images"
PREDICTIONS, DETECTIONS = "predictions", "detections"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the file shall be.

    Attributes:
        image_size: Side of the input, in pixels.
        batch_size: Images per call.
        half: Compute in fp16; input and output stay fp32.
        dynamic: Let batch size, height and width vary.
        simplify: Fold constants and remove what is redundant.
        opset: Operator set.
        end_to_end: Choose detections in the graph.
    """

    image_size: int
    batch_size: int = 1
    half: bool = False
    dynamic: bool = False
    simplify: bool = False
    opset: int = DEFAULT_OPSET
    end_to_end: bool = False


def write(network: Network, options: Options, about: Mapping[str, str], path: Path) -> None:
    """Writes a network; with `end_to_end` the predictions are a second output until `finish`.

    Args:
        network: In evaluation mode; of no other use afterwards.
        options: What the file shall be.
        about: What the file says about itself.
        path: The file.

    Raises:
        FailedPrecondition: ONNX_UNSUPPORTED: torch cannot write it with this operator set.
    """
    graph = Graph(network, half=options.half, dynamic=options.dynamic).eval()
    outputs = [DETECTIONS, PREDICTIONS] if options.end_to_end else [PREDICTIONS]
    pixels = torch.rand(options.batch_size, 3, options.image_size, options.image_size)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # That shapes become constants is intended where they are, and checked where not.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                EndToEnd(graph) if options.end_to_end else graph,
                (pixels,),
                str(path),
                dynamo=False,
                opset_version=options.opset,
                input_names=[INPUT],
                output_names=outputs,
                dynamic_axes=_dynamic_axes(outputs) if options.dynamic else None,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise FailedPrecondition(
            f"opset {options.opset} cannot express this model: {str(error).splitlines()[0]}; "
            "choose a higher one",
            reason="ONNX_UNSUPPORTED",
        ) from error
    _rewrite(path, lambda model: _describe(_slim(model) if options.simplify else model, about))


def finish(path: Path) -> None:
    """Takes the predictions out of an end-to-end file that has been checked."""

    def drop(model: Any) -> Any:
        for output in [o for o in model.graph.output if o.name == PREDICTIONS]:
            model.graph.output.remove(output)
        return model

    _rewrite(path, drop)


def run_with(path: Path) -> Callable[[NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """Loads a file into ONNX Runtime; what is returned gives the outputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        return dict(zip(names, session.run(names, {INPUT: pixels}), strict=True))

    return run


def predict_with(path: Path) -> Predict:
    """Loads a file that answers predictions."""
    run = run_with(path)
    return lambda pixels: run(pixels)[PREDICTIONS]


def _dynamic_axes(outputs: list[str]) -> dict[str, dict[int, str]]:
    axes = {
        INPUT: {0: "batch", 2: "height", 3: "width"},
        PREDICTIONS: {0: "batch", 2: "anchors"},
        DETECTIONS: {0: "batch"},
    }
    return {name: axes[name] for name in (INPUT, *outputs)}


def _slim(model: Any) -> Any:
    import onnxslim

    return onnxslim.slim(model)


def _describe(model: Any, about: Mapping[str, str]) -> Any:
    import onnx

    model.producer_name = "detflow"
    onnx.helper.set_model_props(model, dict(about))
    return model


def _rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    import onnx

    onnx.save(change(onnx.load(path)), path)
