"""All that is measured, asked for as a user does: command line, HTTP and SDK give the same."""

import asyncio
import contextlib
import csv
import inspect
import io
import json
import os
import pty
import re
import signal
import subprocess
import textwrap
import zipfile
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.json_format import MessageToDict

from detflow.client import Client
from detflow.client.metrics import Metrics
from detflow.local.demo_data import write_dataset
from tests.stack_rig import Done, Stack, command, end, environment, free_base_port, start
from tests.webhook_rig import receiving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
# Little, but enough to find something and to be wrong about some of it.
LITTLE = (
    *("--model", "yolov8n", "--batch", "4", "--set", "image_size=96", "--set", "mosaic=0"),
    *("--set", "optimizer=AdamW", "--set", "lr0=0.003", "--set", "warmup_epochs=1"),
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A stack with a training that has finished.

    Attributes:
        stack: The stack.
        images: Folder of the images, with the paths that the dataset has.
        name: Resource name of the training.
        threshold: Confidence from which it is right about some boxes of the validation split and
            wrong about others; of no detection exactly.
        http: Of the gateway.
        client: Of the services.
    """

    stack: Stack
    images: Path
    name: str
    threshold: float
    http: httpx.Client
    client: Client

    def detflow(self, *arguments: str) -> Done:
        done = self.stack.detflow(*arguments, seconds=280.0)
        assert done.code == 0, done.err
        return done

    def get(self, path: str, **query: Any) -> Any:
        answer = self.http.get(f"/v1/{path}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, **request: Any) -> Any:
        answer = self.http.post(f"/v1/{path}", **request)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("images") / "shapes"
    write_dataset(folder, 80)
    settings = {"DETFLOW_WEBHOOK_HOSTS": "loopback"}
    stack = start(tmp_path_factory.mktemp("data"), free_base_port(), settings)
    try:
        assert stack.detflow("datasets", "import", str(folder)).code == 0
        for _ in range(2):
            assert stack.detflow("versions", "create", "--dataset", "shapes").code == 0
        done = stack.detflow("train", "V_0", *LITTLE, "--epochs", "6", "--json", seconds=280.0)
        assert done.code == 0, done.err
        with (
            httpx.Client(base_url=stack.url, headers=stack.headers, timeout=60) as http,
            stack.client() as client,
        ):
            best = done.json["evaluations"][0]["bestF1"]["confidenceThreshold"]
            yield Trained(
                stack=stack,
                images=folder,
                name=done.json["training"]["name"],
                threshold=round(0.9 * best, 4),
                http=http,
                client=client,
            )
    finally:
        end(stack, signal.SIGTERM)


def as_dict(message: Any) -> Any:
    return MessageToDict(message, always_print_fields_with_no_presence=True)


def test_command_line_http_and_sdk_give_the_same_figures(trained: Trained) -> None:
    overview = trained.detflow("metrics", "V_0", "--json").json
    assert overview["training"] == trained.name
    evaluations = trained.get(f"{trained.name}/evaluations")["evaluations"]
    assert overview["evaluations"] == evaluations
    assert evaluations[1] == trained.get(f"{trained.name}/evaluations/test")
    assert evaluations[1] == as_dict(trained.client.metrics.evaluation(trained.name, "test"))
    assert 0 < evaluations[0]["coco"]["map50"] < 1
    assert overview["series"] == trained.get(f"{trained.name}/metrics")["series"]

    options = (
        "--errors",
        "--threshold",
        f"{trained.threshold}",
        "--curves",
        "--class",
        "*",
        "--json",
    )
    details = trained.detflow("metrics", "V_0", *options).json
    val = f"{trained.name}/evaluations/val"
    assert details["analysis"] == trained.get(
        f"{val}:analyze", confidenceThreshold=trained.threshold
    )
    assert details["curves"] == trained.get(f"{val}:curves", classNames="*")
    metrics = trained.client.metrics
    assert details["analysis"] == as_dict(
        metrics.analyze(trained.name, "val", threshold=trained.threshold)
    )
    assert details["curves"] == as_dict(metrics.curves(trained.name, "val", classes=["*"]))

    # What the evaluation says at its best F1 is what its threshold makes of it.
    best = evaluations[0]["bestF1"]
    at_best = trained.get(f"{val}:analyze")
    assert at_best["confidenceThreshold"] == best["confidenceThreshold"]
    for figure in ("precision", "recall", "f1"):
        assert at_best["all"][figure] == pytest.approx(best[figure])


def test_series_are_the_same_by_epoch_and_by_step(trained: Trained) -> None:
    by_step = trained.get(f"{trained.name}/metrics", resolution="RESOLUTION_STEP")["series"]
    [loss] = [one for one in by_step if one["name"] == "train/box_loss"]
    columns = trained.client.metrics.columns(trained.name, ["train/box_loss"])["train/box_loss"]
    assert loss["values"] == list(columns.values)
    assert loss["positions"] == list(columns.positions)
    assert loss["positions"][-1] == 6.0

    watched = trained.http.get(f"/v1/{trained.name}/metrics:watch", params={"withSteps": True})
    [data] = [line for line in watched.text.splitlines() if line.startswith('data: {"cursor')]
    snapshot = json.loads(data.removeprefix("data: "))["snapshot"]
    assert snapshot["stepSeries"] == by_step
    assert snapshot["series"] == trained.get(f"{trained.name}/metrics")["series"]

    options = ("--series", "train/box_loss", "--csv")
    text = trained.detflow("metrics", "V_0", *options, "--steps").out
    steps = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["train/box_loss"]) for row in steps] == loss["values"]
    [by_epoch] = trained.get(f"{trained.name}/metrics", names="train/box_loss")["series"]
    text = trained.detflow("metrics", "V_0", *options).out
    epochs = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["train/box_loss"]) for row in epochs] == by_epoch["values"]


def test_examples_of_the_documentation_run(trained: Trained) -> None:
    with_names = {"client": trained.client, "training": trained.client.trainings.find("V_0")}
    for method in (Metrics.evaluation, Metrics.curves, Metrics.analyze):
        assert method.__doc__ is not None
        _, example = inspect.cleandoc(method.__doc__).split("Example:\n")
        exec(textwrap.dedent(example.split("\n\n")[0]), dict(with_names))
    page = (ROOT / "docs" / "how-to" / "metrics.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    here = f'Client("{trained.client.address}", token="{trained.stack.token}")'
    exec(example.replace("Client()", here), {})


def test_counts_are_those_of_the_images_behind_them(trained: Trained) -> None:
    at = {"confidenceThreshold": trained.threshold}
    analysis = trained.get(f"{trained.name}/evaluations/val:analyze", **at)
    evaluation = trained.get(f"{trained.name}/evaluations/val")
    images = _results(trained, **at)
    assert len(images) == int(evaluation["numImages"])
    for outcome in ("TruePositives", "FalsePositives", "FalseNegatives"):
        counted = sum(one[f"num{outcome}"] for one in images)
        assert counted == int(analysis["all"][f"num{outcome}"]) > 0
        assert counted == sum(int(one[f"num{outcome}"]) for one in analysis["classes"])

    cells = {
        (one["actualClass"], one["predictedClass"]): int(one["count"])
        for one in analysis["confusion"]
    }
    for row in evaluation["classes"]:
        of_class = sum(n for (actual, _), n in cells.items() if actual == row["className"])
        assert of_class == int(row["numGroundTruths"])
    for counts in analysis["classes"]:
        found = sum(n for (_, found), n in cells.items() if found == counts["className"])
        assert found == int(counts["numTruePositives"]) + int(counts["numFalsePositives"])

    for error in analysis["errors"]:
        behind = _results(trained, **at, errorKinds=error["kind"])
        boxes = [box for one in behind for box in (*one["detections"], *one["groundTruths"])]
        assert sum(box["errorKind"] == error["kind"] for box in boxes) == int(error["count"])

    missed = trained.detflow(
        *("results", "V_0", "--threshold", f"{trained.threshold}", "--error", "missed", "--json")
    ).json
    assert missed == trained.get(
        f"{trained.name}/inferenceResults", **at, errorKinds="ERROR_KIND_MISSED"
    )


def _results(trained: Trained, **query: Any) -> list[dict[str, Any]]:
    """Turns the pages of the inference results."""
    found: list[dict[str, Any]] = []
    token = ""
    while True:
        query = {**query, "pageSize": 7, "pageToken": token}
        page = trained.get(f"{trained.name}/inferenceResults", **query)
        found += page["inferenceResults"]
        token = page["nextPageToken"]
        if not token:
            assert len(found) == int(page["totalSize"])
            return found


def test_image_is_shown_as_it_is_and_with_its_boxes(trained: Trained) -> None:
    name = f"{trained.name}/inferenceResults/val-1"
    result = trained.get(name)
    plain = trained.http.get(f"/v1/{name}:image")
    assert plain.status_code == 200 and plain.headers["content-type"] == "image/jpeg"
    drawn = trained.http.get(f"/v1/{name}:image", params={"drawGroundTruths": True, "png": True})
    assert drawn.content.startswith(b"\x89PNG") and result["widthPx"] > 0


def test_image_of_the_split_is_predicted_as_it_was_measured(trained: Trained) -> None:
    results = _results(trained, confidenceThreshold=trained.threshold)
    result = max(results, key=lambda one: len(one["detections"]))
    path = trained.images / result["imagePath"]
    prediction = trained.post(
        f"{trained.name}:predict",
        params={"confidenceThreshold": trained.threshold, "fileName": path.name},
        content=path.read_bytes(),
        headers={"Content-Type": "image/jpeg"},
    )
    assert len(prediction["detections"]) == len(result["detections"]) > 0
    for now, then in zip(prediction["detections"], result["detections"], strict=True):
        assert now["className"] == then["className"]
        assert now["confidence"] == pytest.approx(then["confidence"], abs=1e-3)
        assert now["box"] == pytest.approx(then["box"], abs=0.1)
    options = ("predict", "V_0", str(path), "--threshold", f"{trained.threshold}", "--csv")
    rows = list(csv.DictReader(io.StringIO(trained.detflow(*options).out)))
    assert len(rows) == len(prediction["detections"])


async def test_second_training_is_told_of_and_compared_with_the_first(trained: Trained) -> None:
    def detflow(*arguments: str) -> Awaitable[Done]:
        return asyncio.to_thread(trained.detflow, *arguments)

    async with receiving() as receiver:
        webhook = (await detflow("webhooks", "create", receiver.url, "--json")).json
        tested = await asyncio.to_thread(trained.post, f"{webhook['name']}:test", json={})
        assert tested["state"] == "DELIVERED"
        assert (await receiver.next()).is_signed_by(webhook["secret"])
        await detflow("train", "V_1", *LITTLE, "--epochs", "1")
        told = await receiver.next()
        assert told.is_signed_by(webhook["secret"])
        second = told.json["data"]["training"]
    deliveries = trained.get(f"{webhook['name']}/deliveries")["deliveries"]
    assert [(one["training"], one["eventType"]) for one in deliveries if not one["test"]] == [
        (second, "TRAINING_COMPLETED")
    ]

    options = ("compare", "V_0", "V_1", "--split", "val", "--resamples", "100", "--json")
    compared = trained.detflow(*options).json
    query = {"trainings": [trained.name, second], "split": "SPLIT_VAL", "numResamples": 100}
    assert compared == trained.get("projects/default:compareTrainings", **query)
    [map50] = [one for one in compared["deltas"] if one["metric"] == "map50"]
    for figure, training in (("baseline", trained.name), ("value", second)):
        evaluation = trained.client.metrics.evaluation(training, "val")
        assert map50[figure] == pytest.approx(evaluation.coco.map50)
    assert map50["low"] <= map50["delta"] <= map50["high"]
    parameters = {one["name"]: one["values"] for one in compared["parameters"]}
    assert parameters["epochs"] == ["6", "1"]


def test_report_and_tables_say_what_the_calls_say(trained: Trained) -> None:
    report = trained.http.get(
        f"/v1/{trained.name}:report", params={"format": "REPORT_FORMAT_ZIP", "language": "ko"}
    )
    assert report.status_code == 200, report.text
    map50 = trained.client.metrics.evaluation(trained.name, "test").coco.map50
    with zipfile.ZipFile(io.BytesIO(report.content)) as files:
        page = files.read("report.html").decode()
        in_archive = files.read("tables/confusion-val.csv").decode()
    assert f"{map50:.3f}" in page and "혼동 행렬" in page

    table = f"/v1/{trained.name}:table"
    query = {"table": "CONFUSION", "split": "SPLIT_VAL"}
    confusion = trained.http.get(table, params=query).text
    assert confusion == in_archive
    printed = trained.detflow("metrics", "V_0", "--confusion", "--csv").out
    assert _rows(confusion) == _rows(printed)
    epochs = trained.http.get(table, params={"table": "EPOCHS"}).text
    assert _rows(epochs) == _rows(trained.detflow("metrics", "V_0", "--series", "*", "--csv").out)
    detections = trained.http.get(table, params={"table": "DETECTIONS", "split": "SPLIT_VAL"}).text
    analysis = trained.get(f"{trained.name}/evaluations/val:analyze")
    outcomes = [row["match"] for row in csv.DictReader(io.StringIO(detections))]
    assert outcomes.count("true_positive") == int(analysis["all"]["numTruePositives"])
    chart = trained.http.get(f"/v1/{trained.name}:chart", params={"chart": "CONFUSION"})
    assert chart.content.startswith(b"\x89PNG")


def _rows(text: str) -> list[list[str]]:
    """Reads CSV; numbers are written alike however their last digits are rounded."""
    rows = csv.reader(io.StringIO(text))
    return [[f"{float(cell):.9g}" if _is_number(cell) else cell for cell in row] for row in rows]


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-?[0-9.]+(e[-+][0-9]+)?", cell))


def test_every_part_is_drawn_on_a_terminal_of_80_columns(trained: Trained) -> None:
    screen = _on_terminal(
        trained.stack,
        *("metrics", "V_0", "--curves", "--confusion", "--errors", "--calibration"),
        *("--threshold", "best", "--series", "*_loss,val/*"),
    )
    for part in ("precision by recall", "ACTUAL \\ FOUND", "COSTS mAP50", "calibration error"):
        assert part in screen
    assert "box_loss" in screen and "└" in screen and "\x1b[" in screen
    watched = trained.detflow("metrics", "V_0", "--watch").out
    assert watched.startswith("after epoch 6") and "mAP50-95" in watched


def _on_terminal(stack: Stack, *arguments: str) -> str:
    """Runs a command on a terminal of 80 columns and returns what it wrote."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        env={**environment(stack.data_dir), "COLUMNS": "80", "TERM": "xterm-256color"},
        stdout=terminal,
        stderr=terminal,
        stdin=subprocess.DEVNULL,
    )
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal whose last writer is gone
        while part := os.read(controller, 1 << 16):
            written += part
    os.close(controller)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode()
