"""The process that predicts: `python -m services.metrics.prediction MAX_BYTES NUM_THREADS`.

It reads tasks and images from its standard input and answers on its standard output. Images come
from strangers: should one of them crash a decoder, or take all memory, it is this process that ends
and not the service with everybody's watches; there are no credentials in it, and where the system
has a sandbox no network, other programs or writing to disk.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from detflow import errors, images, sandbox
from detflow.errors import DetflowError, FailedPrecondition, ResourceExhausted
from services.metrics.prediction import task as protocol
from services.metrics.prediction.onnx_model import OnnxModel
from services.metrics.prediction.predict import predict
from services.metrics.prediction.task import Task

_ENDED_FIRST = 1000
_WORKING_BYTES = 8 << 30
"""Memory beside the models, for the largest image and what a network makes of it."""


class Models:
    """The models in memory, least recently used first; beyond the bound the first ones go.

    Args:
        max_bytes: Memory for all; a single model may take more.
        num_threads: Threads of one call.
    """

    def __init__(self, max_bytes: int, num_threads: int) -> None:
        self._max_bytes = max_bytes
        self._num_threads = num_threads
        self._kept: OrderedDict[str, tuple[OnnxModel, int]] = OrderedDict()

    def get(self, sha256: str) -> OnnxModel | None:
        """Returns a model, if it is in memory."""
        if sha256 not in self._kept:
            return None
        self._kept.move_to_end(sha256)
        return self._kept[sha256][0]

    def load(self, sha256: str, path: Path) -> OnnxModel:
        """Reads a model; others make room for it."""
        before = _memory_bytes()
        model = OnnxModel(path, self._num_threads)
        model.warm_up()
        num_bytes = max(path.stat().st_size, _memory_bytes() - before)
        self._kept[sha256] = (model, num_bytes)
        while len(self._kept) > 1 and self._num_bytes() > self._max_bytes:
            self._kept.popitem(last=False)
            _give_memory_back()
        return model

    def _num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self._kept.values())


def serve(models: Models, source: BinaryIO, sink: BinaryIO) -> None:
    """Answers tasks until there are no more."""
    while length := source.read(protocol.FRAME_BYTES):
        task = Task.from_bytes(source.read(protocol.frame_length(length)))
        data = source.read(protocol.frame_length(source.read(protocol.FRAME_BYTES)))
        answer = _answer(models, task, data)
        sink.write(protocol.frame(answer) + answer)
        sink.flush()


def _answer(models: Models, task: Task, data: bytes) -> bytes:
    model = models.get(task.model_sha256)
    if model is None and not task.model_path:
        return protocol.MODEL_WANTED
    try:
        model = model or models.load(task.model_sha256, Path(task.model_path))
        return bytes(protocol.PREDICTED + predict(model, task, data).SerializeToString())
    except DetflowError as error:
        return _failed(error)
    except MemoryError:
        return _failed(
            ResourceExhausted(
                "there is not enough memory for this image; make it smaller",
                reason="IMAGE_TOO_LARGE",
            )
        )


def _failed(error: DetflowError) -> bytes:
    return protocol.FAILED + bytes(errors.to_status(error).SerializeToString())


def _memory_bytes() -> int:
    """Memory that this process holds, where the system says so; else 0."""
    if sys.platform != "linux":
        return 0
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _give_memory_back() -> None:
    """Has the allocator return what a model left: it would keep it for the next one."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Entry point."""
    max_bytes, num_threads = int(sys.argv[1]), int(sys.argv[2])
    # What libraries print must not come between the answers.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if sys.platform == "linux":  # when memory runs out this process can be spared first
        Path("/proc/self/oom_score_adj").write_text(str(_ENDED_FIRST))
    images.use_one_thread()
    try:
        sandbox.enter(max_bytes + _WORKING_BYTES, cpu_seconds=0)
    except FailedPrecondition as error:  # a machine for development
        print(error.message, file=sys.stderr)
    serve(Models(max_bytes, num_threads), sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
