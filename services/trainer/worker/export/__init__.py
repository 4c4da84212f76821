"""Exports a trained model: load, convert, check, store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import Progress, StoredObject
from detflow.v1.export_pb2 import Export
from detflow.v1.worker_pb2 import ExportJob, JobMessage
from services.trainer.export_domain import DEFAULT_OPSET, check_installed
from services.trainer.worker import library
from services.trainer.worker.export import check, onnx_file, openvino_file, pytorch
from services.trainer.worker.export.check import Difference
from services.trainer.worker.export.graph import suppress
from services.trainer.worker.export.samples import read_samples, samples_or_drawings
from services.trainer.worker.export.weights import Weights, load_weights, torch_predict

NUM_CHECKED = 8
"""Pictures that original and export are compared on."""

NUM_CALIBRATING = 128
"""Pictures that the ranges of 8-bit integers are chosen with."""

_STAGES = {"load": 0.0, "convert": 10.0, "check": 70.0, "store": 95.0}


class _Reporter:
    """Says how far the job is."""

    def __init__(self, emit: Callable[[JobMessage], None]) -> None:
        self._emit = emit
        self._began = time.monotonic()
        self._stage = ""

    def enter(self, stage: str) -> None:
        """Enters a stage."""
        self._stage = stage
        self._say(0, 0, _STAGES[stage])

    def advance(self, done: int, total: int) -> None:
        """Says how far the stage is."""
        following = [*_STAGES.values(), 100.0]
        begin = _STAGES[self._stage]
        end = following[following.index(begin) + 1]
        self._say(done, total, begin + (end - begin) * done / total)

    def _say(self, done: int, total: int, percent: float) -> None:
        self._emit(
            JobMessage(
                progress=Progress(
                    stage=self._stage,
                    num_done=done,
                    num_total=total,
                    percent=percent,
                    elapsed_seconds=time.monotonic() - self._began,
                )
            )
        )


def run(job: ExportJob, store: ObjectStore, emit: Callable[[JobMessage], None]) -> None:
    """Makes the exported model in the working directory and stores it.

    Args:
        job: What to export and how; every option has its value in force.
        store: The object store.
        emit: Takes progress, and at the end the export with object and differences.

    Raises:
        DataLoss: The weights, or the images that INT8 needs, are gone or damaged.
        FailedPrecondition: OPENVINO_MISSING; ONNX_UNSUPPORTED; EXPORT_DIFFERS: the exported model
            is not the one that was trained.
    """
    library.silence()
    library.load_nms()
    library.tune_cpu()
    # Not as in training: tiny values and their gradients matter to nobody here, equality does.
    torch.set_flush_denormal(False)
    check_installed(job.export)
    report, folder = _Reporter(emit), Path.cwd()
    report.enter("load")
    weights = load_weights(store, job.weights, folder)
    image_size = job.export.image_size_px
    samples = samples_or_drawings(store, job.manifest, NUM_CHECKED, image_size)
    report.enter("convert")
    path = _convert(job, weights, store, folder, report)
    report.enter("check")
    difference = _check(job.export, weights, path, samples)
    report.enter("store")
    export = Export()
    export.CopyFrom(job.export)
    export.object.CopyFrom(_store(store, job.key, path))
    export.max_box_difference_px = difference.box_px
    export.max_confidence_difference = difference.confidence
    emit(JobMessage(export=export))


def _convert(
    job: ExportJob, weights: Weights, store: ObjectStore, folder: Path, report: _Reporter
) -> Path:
    export = job.export
    half = export.precision == Export.FP16
    about = weights.describe(
        training=export.name.split("/exports/")[0],
        image_size=export.image_size_px,
        precision=Export.Precision.Name(export.precision),
    )
    if export.format == Export.PYTORCH:
        return pytorch.write(weights, about, half=half, folder=folder)
    network = weights.build()
    if export.format == Export.ONNX:
        path = folder / "model.onnx"
        onnx_file.write(network, _onnx_options(export, half=half), about, path)
        return path
    calibration = None
    if export.precision == Export.INT8:
        calibration = read_samples(store, job.manifest, NUM_CALIBRATING, export.image_size_px)
        total = len(calibration)
    return openvino_file.write(
        network,
        _onnx_options(export, half=False),
        about,
        folder,
        half=half,
        calibration=calibration,
        on_image=lambda done: report.advance(done, total),
    )


def _onnx_options(export: Export, *, half: bool) -> onnx_file.Options:
    return onnx_file.Options(
        image_size=export.image_size_px,
        batch_size=export.batch_size,
        half=half,
        dynamic=export.dynamic,
        simplify=export.simplify,
        opset=export.opset or DEFAULT_OPSET,
        end_to_end=export.end_to_end,
    )


def _check(
    export: Export, weights: Weights, path: Path, samples: NDArray[np.float32]
) -> Difference:
    """Compares the exported file with torch; a dynamic one also with other sizes."""
    if export.format == Export.PYTORCH:
        exported = pytorch.predict_with(path)
    elif export.format == Export.ONNX:
        exported = onnx_file.predict_with(path)
    else:
        exported = openvino_file.predict_with(path)
    network = weights.build()
    original = torch_predict(network)
    size, stride = export.image_size_px, network.stride
    difference = check.compare_on(
        samples, original, exported, batch_size=export.batch_size, precision=export.precision
    )
    if export.dynamic:
        smaller = np.ascontiguousarray(samples[:2, :, : max(stride, size - stride)])
        height, width = smaller.shape[2:]
        other = check.compare(
            original(smaller), exported(smaller), export.precision, (height, width)
        )
        difference = difference.worst(other)
    check.require(difference, export.precision)
    if export.end_to_end:
        outputs = onnx_file.run_with(path)(samples[np.arange(export.batch_size) % len(samples)])
        expected = suppress(torch.from_numpy(outputs[onnx_file.PREDICTIONS])).numpy()
        check.require_same_detections(expected, outputs[onnx_file.DETECTIONS], size)
        onnx_file.finish(path)
    return difference


def _store(store: ObjectStore, key: str, path: Path) -> StoredObject:
    return store.put(key, path)
