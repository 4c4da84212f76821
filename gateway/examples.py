"""Examples of requests: in /openapi.json, and as a curl line of each operation at /docs."""

from __future__ import annotations

import json
import shlex
from typing import Any
from urllib.parse import quote

Json = dict[str, Any]

SERVER = "http://127.0.0.1:7100"

_IDS = {
    "project": "shapes",
    "dataset": "d1",
    "version": "v1",
    "training": "t1",
    "evaluation": "val",
    "inferenceResult": "val-7",
    "export": "e1",
    "upload": "u1",
    "weight": "w1",
    "webhook": "h1",
    "apiKey": "k1",
    "member": "m1",
}
_DATASET = "projects/shapes/datasets/d1"
_RECIPE = {
    "split": {"train": 70, "val": 20, "test": 10},
    "maxSidePx": 640,
    "augmentations": ["AUGMENTATION_FLIP_LEFT_RIGHT"],
}
_TRAININGS = [f"projects/shapes/versions/v1/trainings/{one}" for one in ("t1", "t2")]

BODIES: dict[str, Json] = {
    "CreateProject": {"displayName": "Shapes"},
    "CreateUpload": {"sizeBytes": "1048576", "requestId": "upload-1"},
    "CreateDataset": {
        "dataset": {"displayName": "shapes"},
        "upload": "projects/shapes/uploads/u1",
        "requestId": "import-1",
    },
    "CreateVersion": {"dataset": _DATASET, "recipe": _RECIPE},
    "UpdateVersion": {"displayName": "first try"},
    "PreviewVersion": {"dataset": _DATASET, "recipe": _RECIPE},
    "StartTraining": {
        "model": "yolov8n",
        "batchSize": 16,
        "epochs": 12,
        "hyperparameters": {"image_size": 128},
    },
    "UpdateTraining": {"priority": 50},
    "StopTraining": {"mode": "STOP_MODE_FINISH"},
    "CreateExport": {"format": "ONNX", "simplify": True},
    "CreateWebhook": {
        "url": "https://example.com/detflow",
        "eventTypes": ["TRAINING_COMPLETED", "TRAINING_FAILED"],
    },
    "UpdateWebhook": {"disabled": True},
    "UpdateProject": {"displayName": "Shapes", "quota": {"maxStorageBytes": "107374182400"}},
    "CreateApiKey": {"displayName": "nightly training", "role": "EDITOR"},
    "UpdateApiKey": {"role": "VIEWER"},
    "CreateMember": {"user": "kim@example.com", "role": "EDITOR"},
    "UpdateMember": {"role": "ADMIN"},
    "CreateLoginLink": {},
}
"""JSON bodies by RPC."""

_QUERIES: dict[str, Json] = {
    "CreateProject": {"projectId": "shapes"},
    "CompareTrainings": {"trainings": _TRAININGS},
    "DownloadComparisonReport": {"trainings": _TRAININGS},
    "DownloadChart": {"chart": "CONFUSION"},
    "DownloadTable": {"table": "CLASSES"},
    "ListMetricSeries": {"names": ["val/map50"]},
    "AnalyzeEvaluation": {"confidenceThreshold": 0.5},
    "UploadWeights": {"displayName": "best.pt"},
    "PredictImage": {"confidenceThreshold": 0.4},
}


def add(operation: Json) -> None:
    """Puts the examples into an operation of the document."""
    rpc = operation["operationId"]
    for parameter in operation["parameters"]:
        known = _IDS if parameter["in"] == "path" else _QUERIES.get(rpc, {})
        if parameter["in"] != "header" and parameter["name"] in known:
            parameter["example"] = known[parameter["name"]]
        elif parameter["name"] == "Upload-Offset":
            parameter["example"] = 0
    if rpc in BODIES:
        operation["requestBody"]["content"]["application/json"]["example"] = BODIES[rpc]


def curl(method: str, path: str, operation: Json) -> str:
    """Writes an operation as a line for a shell, from the examples of the document."""
    pairs = []
    headers = []
    for parameter in operation["parameters"]:
        example = parameter.get("example")
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", example)
        elif parameter["in"] == "query" and example is not None:
            values = example if isinstance(example, list) else [example]
            pairs += [f"{parameter['name']}={quote(str(one), safe='/')}" for one in values]
        elif parameter.get("required"):
            headers.append(f"{parameter['name']}: {example}")
    options = ["-s"]
    answers = operation["responses"]["200"]["content"]
    if "text/event-stream" in answers:
        options = ["-sN"]
    elif "Content-Disposition" in operation["responses"]["200"].get("headers", {}):
        options = ["-sOJ"]
    if method != "GET":
        options += ["-X", method]
    body = operation.get("requestBody", {}).get("content", {})
    if "application/json" in body:
        headers.append("Content-Type: application/json")
        data = body["application/json"].get("example", {})
        body_options = ["-d", json.dumps(data, ensure_ascii=False)]
    elif body:
        headers.append(f"Content-Type: {next(iter(body))}")
        body_options = ["-T", "FILE"]
    else:
        body_options = []
    for header in headers:
        options += ["-H", header]
    query = f"?{'&'.join(pairs)}" if pairs else ""
    rest = shlex.join([*options, f"{SERVER}{path}{query}", *body_options])
    return f'curl -H "Authorization: Bearer $DETFLOW_TOKEN" {rest}'
