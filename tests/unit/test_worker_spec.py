"""What the worker makes of its specification, and of what goes wrong."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import grpc
import obstore.exceptions
import pytest

from detflow.errors import DataLoss, DetflowError, InvalidArgument
from detflow.settings import Settings
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import TrainingProgress
from services.trainer.worker.failures import explain
from services.trainer.worker.progress import Progress
from services.trainer.worker.spec import Spec, read_spec
from tests.shapes_bundle import spec_json

MANIFEST = StoredObject(key="bundles/manifests/a.json", size_bytes=3, sha256="ab" * 32)


def read(folder: Path, text: str) -> Spec:
    path = folder / "spec.json"
    path.write_text(text)
    return read_spec(path)


def example(folder: Path, epochs: int = 4, **more: object) -> Spec:
    return read(
        folder, spec_json(MANIFEST, epochs=epochs, hyperparameters={"image_size": 64}, **more)
    )


def test_specification_is_read_with_plain_values(tmp_path: Path) -> None:
    text = spec_json(
        MANIFEST, epochs=4, hyperparameters={"lr0": 0.01, "cos_lr": True, "optimizer": "SGD"}
    )
    spec = read(tmp_path, text)
    assert spec.hyperparameters == {"lr0": 0.01, "cos_lr": True, "optimizer": "SGD"}
    assert spec.training_id == "t1" and spec.checkpoint is None and spec.epochs_done == 0
    assert spec.manifest == MANIFEST
    assert spec.folder == tmp_path
    assert spec.key("best.pt") == "trainings/t1/1/best.pt"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "spec.json"),
        (json.dumps({"training": "t", "attempt": 1}), "model, batch_size, epochs, manifest"),
        (json.dumps({"attempt": "many"}), "spec.json"),
        (json.dumps({"unknown": 1}), "unknown"),
    ],
)
def test_bad_specification_is_refused_naming_what_is_wrong(
    tmp_path: Path, text: str, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        read(tmp_path, text)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (MemoryError(), grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OUT_OF_MEMORY",
        ),
        (
            obstore.exceptions.GenericError("connection refused"),
            grpc.StatusCode.UNAVAILABLE,
            "STORE_UNAVAILABLE",
        ),
        (
            RuntimeError("CUDA error: out of memory"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OUT_OF_MEMORY",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OUT_OF_MEMORY",
        ),
        (RuntimeError("std::bad_alloc"), grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
        (
            RuntimeError("CUDA error: device-side assert triggered\nsecret text"),
            grpc.StatusCode.INTERNAL,
            "DEVICE_ASSERT",
        ),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED\nsecret text"),
            grpc.StatusCode.UNAVAILABLE,
            "DEVICE_FAILED",
        ),
        (
            RuntimeError("CUDA error: uncorrectable ECC error encountered"),
            grpc.StatusCode.UNAVAILABLE,
            "DEVICE_FAILED",
        ),
        (ValueError("CUDA error: out of memory"), grpc.StatusCode.INTERNAL, "WORKER_FAILED"),
        (OSError(errno.ENOSPC, "No space left"), grpc.StatusCode.FAILED_PRECONDITION, "DISK_FULL"),
        (OSError(errno.EDQUOT, "Over quota"), grpc.StatusCode.FAILED_PRECONDITION, "DISK_FULL"),
        (
            obstore.exceptions.GenericError("Unable to copy: No space left (os error 28)"),
            grpc.StatusCode.FAILED_PRECONDITION,
            "DISK_FULL",
        ),
        (OSError(errno.EIO, "Input/output"), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
        (
            chained(RuntimeError("outer"), DataLoss("gone", reason="OBJECT_LOST")),
            grpc.StatusCode.DATA_LOSS,
            "OBJECT_LOST",
        ),
        (ValueError("secret text"), grpc.StatusCode.INTERNAL, "WORKER_FAILED"),
    ],
)
def test_failures_say_whether_another_attempt_can_help(
    tmp_path: Path, error: Exception, code: grpc.StatusCode, reason: str
) -> None:
    explained = explain(error, example(tmp_path))
    assert isinstance(explained, DetflowError)
    assert (explained.code, explained.reason) == (code, reason)
    assert "secret" not in explained.message
    if reason == "OUT_OF_MEMORY":
        assert "batch_size=16" in explained.message and "image_size=64" in explained.message
        assert explained.metadata["field"] == "batch_size"


def test_memory_that_runs_out_after_halving_names_both_sizes(tmp_path: Path) -> None:
    explained = explain(MemoryError(), example(tmp_path, stepBatchSize=4))
    assert "batch_size=16 (4 images per step)" in explained.message


def test_torchs_own_class_for_a_gpu_without_memory_is_known(tmp_path: Path) -> None:
    import torch

    explained = explain(torch.OutOfMemoryError("tried to allocate"), example(tmp_path))
    assert explained.reason == "OUT_OF_MEMORY"


def test_full_disk_names_the_settings_and_their_room(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, store_url=f"file://{tmp_path}")
    explained = explain(OSError(errno.ENOSPC, "No space left"), example(tmp_path), settings)
    for name in ("DETFLOW_DATA_DIR", "DETFLOW_STORE_URL"):
        assert f"MiB free at {name}" in explained.message
        assert int(explained.metadata[name.lower()]) > 0


def test_progress_of_a_resumed_training_starts_at_its_checkpoint_and_never_falls(
    tmp_path: Path,
) -> None:
    said: list[TrainingProgress] = []
    spec = example(tmp_path, checkpoint={"epoch": 2})
    progress = Progress(spec, said.append)
    progress.prepare(1, 3)
    progress.begin("cpu", num_steps=2)
    for epoch in (3, 4):
        for step in (1, 2):
            progress.step(
                epoch=epoch,
                step=step,
                losses={},
                learning_rate=0.1,
                data_wait_share=0.0,
                loader_shares={"decode": 1.0},
                memory_bytes=5,
            )
    progress.predict(1, 2)
    progress.predict(2, 2)
    percents = [one.percent for one in said]
    assert percents == [49.0, 61.25, 73.5, 85.75, 98.0, 99.0, 100.0]
    assert not said[0].HasField("eta_seconds")
    assert (said[0].step, said[0].num_steps) == (1, 3)
    assert said[4].eta_seconds == 0.0
    assert (dict(said[4].loader_shares), said[4].memory_bytes) == ({"decode": 1.0}, 5)
    assert (said[4].epoch, said[4].num_epochs, said[4].step, said[4].num_steps) == (4, 4, 2, 2)
