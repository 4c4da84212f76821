"""How far exported files are from a trained model: `python -m tests.benchmarks.export best.pt 128`.

Takes the weights object of a training on the drawn shapes and sizes in pixels; prints a table.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from detflow.errors import DetflowError
from detflow.store import ObjectStore
from detflow.v1.export_pb2 import Export
from detflow.v1.worker_pb2 import ExportJob, JobMessage
from services.trainer.export_domain import resolve
from services.trainer.worker import library
from tests.shapes_bundle import write_bundle

CASES: tuple[dict[str, Any], ...] = (
    {"format": Export.PYTORCH},
    {"format": Export.PYTORCH, "precision": Export.FP16},
    {"format": Export.ONNX, "simplify": True},
    {"format": Export.ONNX, "precision": Export.FP16},
    {"format": Export.ONNX, "dynamic": True, "end_to_end": True},
    {"format": Export.OPENVINO},
    {"format": Export.OPENVINO, "precision": Export.FP16},
    {"format": Export.OPENVINO, "precision": Export.INT8},
)


def main(weights: Path, sizes: list[int]) -> None:
    """Makes every export and prints what its check says."""
    content = weights.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        library.prepare(Path("ultralytics").resolve())
        import torch

        from services.trainer.worker import export

        model = torch.load(weights, weights_only=True)["model"]
        store = ObjectStore(f"file://{folder}/store")
        stored = store.put("best.pt", content)
        manifest = write_bundle(store, {"train": 140, "val": 2, "test": 0})
        print(
            "| model | export | px | box, px | confidence | MB | s |\n|---|---|---|---|---|---|---|"
        )
        for size in sizes:
            for case in CASES:
                options = resolve(Export(**case), model=model, image_size_px=size)
                options.name = "projects/p/versions/v/trainings/t/exports/e"
                job = ExportJob(weights=stored, export=options, manifest=manifest, key="file")
                said: list[JobMessage] = []
                began = time.monotonic()
                try:
                    export.run(job, store, said.append)
                except DetflowError as error:
                    print(f"| {model} | {_name(options)} | {size} | {error} | | | |")
                    continue
                made = said[-1].export
                print(
                    f"| {model} | {_name(options)} | {size} | {made.max_box_difference_px:.1g}"
                    f" | {made.max_confidence_difference:.1g}"
                    f" | {made.object.size_bytes / 1e6:.1f} | {time.monotonic() - began:.0f} |",
                    flush=True,
                )


def _name(options: Export) -> str:
    switches = [name for name in ("dynamic", "simplify", "end_to_end") if getattr(options, name)]
    names = [
        Export.Format.Name(options.format),
        Export.Precision.Name(options.precision),
        *(name.replace("_", "-") for name in switches),
    ]
    return " ".join(names)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), [int(size) for size in sys.argv[2:]])
