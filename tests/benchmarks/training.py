"""Our training worker against the `yolo train` command: same images, recipe and epochs."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detflow.local import nats as local_nats
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from tests.shapes_bundle import spec_json, write_bundle

_RECIPE: Mapping[str, float | bool | str] = {
    "image_size": 128,
    "optimizer": "AdamW",
    "lr0": 0.003,
    "warmup_epochs": 1,
    "cos_lr": True,
    "mosaic": 1,
    "close_mosaic": 2,
    "nominal_batch_size": 16,
    "momentum": 0.937,
}
_LIBRARY_RECIPE = (
    "imgsz=128 optimizer=AdamW lr0=0.003 warmup_epochs=1 cos_lr=True mosaic=1 close_mosaic=2 "
    "nbs=16 momentum=0.937 batch=16 pretrained=False device=cpu amp=False"
)
_TURN_SECONDS = 1.0


def run(quick: bool = False) -> dict[str, Any]:
    """Trains the quick recipe with both, turn about.

    Args:
        quick: Three epochs only, to see that it works.

    Returns:
        Seconds (of their turns and of CPU, everything included) and last mAP50 of both, and the
        ratios ours / theirs.
    """
    epochs = 3 if quick else 12
    with tempfile.TemporaryDirectory(prefix="detflow-training-") as name:
        folder = Path(name)
        store_url = f"file://{folder / 'store'}"
        counts = {"train": 240, "val": 40, "test": 40}
        manifest = write_bundle(ObjectStore(store_url), counts, folder / "yolo")
        with _nats(folder / "nats") as nats_url, _Records(nats_url) as records:
            theirs, ours = _take_turns(
                _library(folder, epochs), _worker(folder, manifest, epochs, nats_url, store_url)
            )
        ours["map50"], theirs["map50"] = records.last_map50, _last_map50(folder / "theirs")
    return {
        "epochs": epochs,
        "counts": counts,
        "ours": ours,
        "yolo_train": theirs,
        "wall_ratio": round(ours["wall_seconds"] / theirs["wall_seconds"], 3),
        "cpu_ratio": round(ours["cpu_seconds"] / theirs["cpu_seconds"], 3),
    }


def _library(folder: Path, epochs: int) -> subprocess.Popen[bytes]:
    settings = folder / "settings"
    settings.mkdir()
    environment = {"YOLO_CONFIG_DIR": str(settings), "YOLO_OFFLINE": "true"}
    command = [
        str(Path(sys.executable).parent / "yolo"),
        "train",
        "model=yolov8n.yaml",
        f"data={folder / 'yolo' / 'data.yaml'}",
        f"epochs={epochs}",
        f"project={folder}",
        "name=theirs",
        "plots=False",
        *_LIBRARY_RECIPE.split(),
    ]
    return _start(command, environment, folder / "theirs.log")


def _last_map50(results: Path) -> float:
    with (results / "results.csv").open() as file:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(file)]
    return float(rows[-1]["metrics/mAP50(B)"])


def _worker(
    folder: Path, manifest: StoredObject, epochs: int, nats_url: str, store_url: str
) -> subprocess.Popen[bytes]:
    work = folder / "ours"
    work.mkdir()
    spec = work / "spec.json"
    spec.write_text(spec_json(manifest, epochs=epochs, hyperparameters=_RECIPE))
    environment = {
        "DETFLOW_NATS_URL": nats_url,
        "DETFLOW_STORE_URL": store_url,
        "DETFLOW_DATA_DIR": str(folder / "data"),
    }
    command = [sys.executable, "-m", "services.trainer.worker", str(spec)]
    return _start(command, environment, folder / "ours.log")


def _start(
    command: list[str], environment: Mapping[str, str], output: Path
) -> subprocess.Popen[bytes]:
    """Starts a process, which does nothing before its first turn."""
    with output.open("wb") as file:
        return subprocess.Popen(
            ["sh", "-c", 'kill -STOP $$; exec "$@"', "sh", *command],
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _take_turns(*processes: subprocess.Popen[bytes]) -> list[dict[str, float]]:
    """Runs processes to their ends, one at a time: whatever else runs beside them, slows all alike.

    Returns:
        Seconds of each: in its turns, and of CPU with its children's.
    """
    figures: dict[int, dict[str, float]] = {}
    wall = dict.fromkeys((one.pid for one in processes), 0.0)
    try:
        while left := [one for one in processes if one.pid not in figures]:
            for process in left:
                before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
                os.killpg(process.pid, signal.SIGCONT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_TURN_SECONDS)
                wall[process.pid] += time.monotonic() - began
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGSTOP)
                    continue
                if process.returncode:
                    raise RuntimeError(f"{process.args!r} exited with {process.returncode}")
                after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of this one: it is reaped
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                figures[process.pid] = {
                    "wall_seconds": round(wall[process.pid], 2),
                    "cpu_seconds": round(cpu, 2),
                }
    finally:
        for process in processes:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [figures[process.pid] for process in processes]


@contextlib.contextmanager
def _nats(folder: Path) -> Iterator[str]:
    server = local_nats.prepare(folder)
    process = server.start(folder / "nats.log")
    try:
        yield server.url
    finally:
        process.terminate()
        process.wait()


class _Records:
    """Reads the worker's records as the trainer would, to learn its last mAP50."""

    def __init__(self, url: str) -> None:
        self.last_map50 = 0.0
        self._url = url
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Records:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import asyncio

        asyncio.run(self._read())

    async def _read(self) -> None:
        import asyncio

        import nats

        from detflow.v1.worker_pb2 import WorkerRecord

        client = await nats.connect(self._url)
        stream = client.jetstream()
        await stream.add_stream(name="DETFLOW_RECORDS", subjects=["detflow.records.>"])
        self._ready.set()
        await asyncio.to_thread(self._stop.wait)
        info = await stream.stream_info("DETFLOW_RECORDS")
        for seq in range(1, info.state.messages + 1):
            message = await stream.get_msg("DETFLOW_RECORDS", seq)
            record = WorkerRecord.FromString(message.data or b"")
            if record.HasField("epoch"):
                self.last_map50 = round(record.epoch.metrics.values["val/map50"], 4)
        await client.close()


if __name__ == "__main__":
    print(json.dumps(run(quick="--quick" in sys.argv), indent=2))
