"""Exports models in a process of its own and opens them as their users do.

`python -m tests.export_player FOLDER` does what FOLDER/cases.json says and writes results.json.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from detflow.errors import DetflowError
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.export_pb2 import Export
from detflow.v1.worker_pb2 import ExportJob, JobMessage
from services.trainer.export_domain import resolve, stride_of
from services.trainer.worker import library
from tests.shapes_bundle import CLASS_NAMES, write_bundle

CONFIDENT = 0.25
BIAS = -1.0
Pixels: TypeAlias = NDArray[np.float32]
Predict: TypeAlias = Callable[[Pixels], Pixels]
Case: TypeAlias = Mapping[str, Any]
REPOSITORY = Path(__file__).parent.parent


def play(folder: Path, cases: object) -> list[dict[str, Any]]:
    """Has the cases done in a process of their own, which may reach no other machine."""
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        open('connections', 'a').write(f'{event} {arguments}\\n')\n"
        "        raise OSError('no network in this test')\n"
        "sys.addaudithook(refuse)\n"
    )
    paths = f"{folder}:{REPOSITORY}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.export_player", str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "connections").exists(), (folder / "connections").read_text()
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


def main(folder: Path) -> None:
    """Does all cases."""
    os.chdir(folder)
    library.prepare(folder / "ultralytics")
    import torch

    library.silence()
    library.load_nms()
    torch.set_num_threads(1)
    store = ObjectStore(f"file://{folder}/store")
    manifest = write_bundle(store, {"train": 16, "val": 2, "test": 0})
    cases = json.loads((folder / "cases.json").read_text())
    if "models" in cases:
        results = [_write_and_read(model) for model in cases["models"]]
        (folder / "results.json").write_text(json.dumps(results))
        return
    results = [_do(n, case, store, manifest) for n, case in enumerate(cases)]
    (folder / "results.json").write_text(json.dumps(results))


def _do(
    number: int, case: dict[str, Any], store: ObjectStore, manifest: StoredObject
) -> dict[str, Any]:
    from services.trainer.worker import export
    from services.trainer.worker.export.samples import read_samples

    model, size = case["model"], case["size"]
    options = resolve(Export(**case["options"]), model=model, image_size_px=size)
    options.name = "projects/p/versions/v/trainings/t/exports/e"
    samples = read_samples(store, manifest, 8, size)
    network, weights = lively(model, size, samples, store, case.get("spread", 0.5))
    if case.get("spoil"):
        _spoil(case["spoil"])
    key = f"exports/{number}/file"
    job = ExportJob(weights=weights, export=options, manifest=manifest, key=key)
    said: list[JobMessage] = []
    try:
        export.run(job, store, said.append)
    except DetflowError as error:
        return {"error": error.reason, "message": error.message, "stored": store.exists(key)}
    made = said[-1].export
    progress = [message.progress for message in said[:-1]]
    path = Path("opened")
    store.download(made.object, path)
    if options.end_to_end:
        opened = {"lost": _lost(network, path, samples, size), "about": _about(path)}
    else:
        opened = _open(network, path, options, samples)
    return {
        "claimed_px": made.max_box_difference_px,
        "claimed_confidence": made.max_confidence_difference,
        "size_bytes": made.object.size_bytes,
        "file": str(Path.cwd() / "store" / key),
        "stages": list(dict.fromkeys(one.stage for one in progress)),
        "percent": [one.percent for one in progress],
        **opened,
    }


def _write_and_read(model: str) -> dict[str, Any]:
    """Writes a model for PyTorch and reads it back, without all that is around it."""
    import torch

    from services.trainer.worker import networks
    from services.trainer.worker.export import pytorch
    from services.trainer.worker.export.weights import Weights

    size = stride_of(model)
    weights = Weights(
        model=model,
        class_names=CLASS_NAMES,
        image_size=size,
        hyperparameters={"box": 1.0, "cls": 1.0},
        state_dict={},
    )
    network = networks.build(**weights.build_arguments())
    weights = dataclasses.replace(weights, state_dict=network.state_dict())
    about = weights.describe(training="t", image_size=size, precision="FP32")
    path = pytorch.write(weights, about, half=False, folder=Path.cwd())
    pixels = torch.rand(1, 3, size, size).numpy()
    apart = np.abs(_ask(network.eval(), pixels) - pytorch.predict_with(path)(pixels))
    return {"apart": float(apart.max()), "strides": [network.stride, stride_of(model)]}


def lively(
    model: str, size: int, samples: Pixels, store: ObjectStore, spread: float
) -> tuple[Any, StoredObject]:
    """Builds a network whose confidences are not all alike, and stores its weights.

    Rounding changes more the more the little that an untrained network says is spread.
    """
    import torch

    from services.trainer.worker import networks

    torch.manual_seed(0)
    network = networks.build(
        model,
        num_classes=len(CLASS_NAMES),
        image_size=size,
        hyperparameters={"box": 1.0, "cls": 1.0},
    )
    network.eval()
    with torch.no_grad():
        for layer in _class_layers(network, model):
            layer.bias.zero_()
        logits = torch.logit(network(torch.from_numpy(samples))[0][:, 4:])
        for layer in _class_layers(network, model):
            layer.weight.mul_(spread / float(logits.std()))
            layer.bias.fill_(BIAS - float(logits.mean()) * spread / float(logits.std()))
    content = io.BytesIO()
    torch.save(
        {
            "format": "detflow-weights/1",
            "model": model,
            "class_names": list(CLASS_NAMES),
            "image_size": size,
            "epoch": 1,
            "state_dict": network.state_dict(),
        },
        content,
    )
    return network, store.put(f"weights/{model}.pt", content.getvalue())


def _class_layers(network: Any, model: str) -> list[Any]:
    """Returns the layers that logits come from."""
    if model.startswith("yolo"):
        return [stack[-1] for stack in network.class_branch()]
    return [network.net.class_net.predict.conv_pw]


def _ask(network: Any, pixels: Pixels) -> Pixels:
    import torch

    with torch.no_grad():
        return np.asarray(network(torch.from_numpy(pixels))[0].numpy(), dtype=np.float32)


def _open(network: Any, path: Path, options: Export, samples: Pixels) -> dict[str, Any]:
    """Opens an export without any of the code that made it; returns how far it is from torch."""
    folder = Path("opened-files")
    about: dict[str, Any]
    predict: Predict
    if options.format == Export.ONNX:
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes())
        about = _about(path)

        def predict(pixels: Pixels) -> Pixels:
            return np.asarray(session.run(["predictions"], {"images": pixels})[0], dtype=np.float32)
    elif options.format == Export.OPENVINO:
        import openvino

        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == ["model.xml", "model.bin"]
            archive.extractall(folder)
        core = openvino.Core()
        read = core.read_model(folder / "model.xml")
        about = {key: read.get_rt_info(["detflow", key]).astype(str) for key in ("model", "stride")}
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(read, "CPU", hint)

        def ask_openvino(pixels: Pixels) -> Pixels:
            return np.array(compiled(pixels)["predictions"], dtype=np.float32)

        predict = ask_openvino
    else:
        predict, about = _open_pytorch(path, folder)
    differences = [_differ(network, predict, samples[:1].repeat(options.batch_size, axis=0))]
    for start in range(0, len(samples) - options.batch_size + 1, options.batch_size):
        differences.append(_differ(network, predict, samples[start : start + options.batch_size]))
    if options.dynamic:
        half = options.image_size_px // 2
        wide = np.ascontiguousarray(samples[:3, :, :half, :])
        differences.append(_differ(network, predict, wide))
    return {
        "px": max(one[0] for one in differences),
        "confidence": max(one[1] for one in differences),
        "num_confident": sum(one[2] for one in differences),
        "about": about,
    }


def _open_pytorch(path: Path, folder: Path) -> tuple[Predict, dict[str, Any]]:
    import safetensors.torch
    import torch

    from services.trainer.worker import networks

    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["config.json", "model.safetensors", "model.pt"]
        archive.extractall(folder)
    about = json.loads((folder / "config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    pickled = torch.load(folder / "model.pt", weights_only=True)
    assert pickled["class_names"] == about["class_names"]
    assert tensors.keys() == pickled["state_dict"].keys()
    assert all(torch.equal(tensors[name], one) for name, one in pickled["state_dict"].items())
    network = networks.build(**about["build"])
    network.load_state_dict(tensors)
    network.eval()
    return (lambda pixels: _ask(network, pixels)), about


def _differ(network: Any, predict: Predict, pixels: Pixels) -> tuple[float, float, int]:
    """Returns the largest differences of confident boxes (px) and confidences, and their number."""
    expected: Pixels = _ask(network, pixels)
    found: Pixels = predict(pixels)
    assert expected.shape == found.shape
    images, anchors = np.nonzero(expected[:, 4:].max(axis=1) >= CONFIDENT)
    first, second = expected[images, :, anchors], found[images, :, anchors]
    apart = np.abs(first - second)
    # A corner moves by the centre and by half the size.
    px = (apart[:, :2] + apart[:, 2:4] / 2).max(initial=0.0)
    return float(px), float(apart[:, 4:].max(initial=0.0)), len(anchors)


def _lost(network: Any, path: Path, samples: Pixels, size: int) -> int:
    """Returns how many confident detections of an evaluation an end-to-end file lacks or adds."""
    import onnxruntime
    import torch

    from services.trainer.worker.evaluation import _suppress

    session = onnxruntime.InferenceSession(path.read_bytes())
    assert [output.name for output in session.get_outputs()] == ["detections"]
    num_lost = 0
    for pixels in samples:
        (rows,) = session.run(None, {"images": pixels[None]})[0]
        assert rows.shape == (300, 6) and (np.diff(rows[:, 4]) <= 0).all()
        boxes, confidences, classes = _suppress(torch.from_numpy(_ask(network, pixels[None]))[0])
        expected: NDArray[Any] = np.column_stack((boxes, confidences, classes))
        expected = expected[expected[:, 4] >= CONFIDENT]
        shown = rows[rows[:, 4] >= CONFIDENT]
        for some, others in ((expected, shown), (shown, expected)):
            apart = np.abs(some[:, None] - others[None]) / (1, 1, 1, 1, 0.1, 0.1)
            num_lost += int((apart.max(axis=2).min(axis=1, initial=np.inf) > 0.01).sum())
    return num_lost


def _about(path: Path) -> dict[str, str]:
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    about = {entry.key: entry.value for entry in model.metadata_props}
    return about | {"opset": str(model.opset_import[0].version)}


def _spoil(how: str) -> None:
    """Makes an exporter write something else than was trained."""
    import torch

    from services.trainer.worker.export import onnx_file

    right = onnx_file.write

    def wrong(network: Any, *arguments: Any) -> None:
        with torch.no_grad():
            next(network.parameters()).mul_(1.5)
        right(network, *arguments)

    assert how == "weights"
    onnx_file.write = wrong  # type: ignore[assignment]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
