"""Reports, charts and tables through a real server, made by the real child process."""

import asyncio
import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from detflow import channels
from detflow.client import Client
from detflow.errors import FailedPrecondition, InvalidArgument, NotFound
from detflow.events import Bus
from detflow.server import Service
from detflow.store import ObjectStore
from detflow.v1 import (
    metrics_pb2,
    metrics_pb2_grpc,
    report_pb2,
    report_pb2_grpc,
)
from detflow.v1.common_pb2 import SPLIT_VAL, FileInfo
from tests.metrics_fakes import FakeTraining, Row, ground_truth
from tests.metrics_rig import put_evaluation, serving

EVIL = "<img src=x onerror=alert(1)>"
FORMULA = '=HYPERLINK("http://x","y")'
KOREAN = "적혈구"
A, B = (f"projects/p/versions/v/trainings/{letter}" for letter in "ab")
_Chart = report_pb2.DownloadChartRequest
_Table = report_pb2.DownloadTableRequest


def truth() -> dict[str, Any]:
    """Four images with two classes, and a third class without boxes."""
    boxes = [(image, image % 2, [0.0, 0.0, 40.0, 40.0], 0) for image in range(1, 5)]
    made = ground_truth(4, 3, boxes)
    for category, name in zip(made["categories"], (EVIL, KOREAN, FORMULA), strict=True):
        category["name"] = name
    made["images"][0]["source"] = {"path": "=cells/<b>.jpg", "sha256": "", "augmentation": ""}
    return made


ROWS: list[Row] = [
    (1, 1, 0.9, 0, 0, 40, 40),  # right
    (2, 0, 0.8, 0, 0, 40, 40),  # right
    (3, 0, 0.7, 0, 0, 40, 40),  # of another class
    (4, 2, 0.6, 200, 200, 240, 240),  # nothing
]


@dataclass(frozen=True)
class File:
    """What a download brought."""

    info: FileInfo
    kind: str
    data: bytes


@pytest.fixture(scope="module", autouse=True)
def known_fonts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets the processes that draw list the machine's fonts once, not for every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("fonts")))
        yield


@pytest.fixture
async def service(
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    bus: Bus,
    store: ObjectStore,
    tmp_path: Path,
) -> AsyncIterator[Service]:
    async with serving(await make_database_url("metrics"), nats_url, store, tmp_path) as service:
        yield service


@pytest.fixture
async def evaluated(service: Service, store: ObjectStore) -> str:
    for split in ("val", "test"):
        await put_evaluation(service.db, store, A, truth(), ROWS, split=split)
    return A


async def download(service: Service, method: str, request: Any) -> File:
    info, data, kind = FileInfo(), b"", ""
    async with channels.channel(service.address) as channel:
        stub = report_pb2_grpc.ReportServiceStub(channel)
        with channels.translate():
            async for chunk in getattr(stub, method)(request, timeout=60):
                if not kind:
                    kind = chunk.content_type
                    assert chunk.extensions[0].Unpack(info)
                data += chunk.data
    return File(info, kind, data)


async def report(service: Service, training: str, **fields: Any) -> File:
    request = report_pb2.DownloadReportRequest(training=training, **fields)
    return await download(service, "DownloadReport", request)


async def chart(service: Service, training: str, **fields: Any) -> File:
    return await download(service, "DownloadChart", _Chart(training=training, **fields))


async def table(service: Service, training: str, **fields: Any) -> File:
    return await download(service, "DownloadTable", _Table(training=training, **fields))


def rows(file: File) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.data.decode(), newline="")))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


async def test_report_is_one_page_that_fetches_nothing_and_runs_nothing(
    service: Service, evaluated: str
) -> None:
    file = await report(service, evaluated)
    assert (file.kind, file.info.file_name) == ("text/html", "report-v-a.html")
    assert file.info.size_bytes == len(file.data)
    assert file.info.etag == hashlib.sha256(file.data).hexdigest()[:32]
    page = file.data.decode()
    parser = _Tags()
    parser.feed(page)
    assert "script" not in {tag for tag, _ in parser.tags}
    sources = [attrs["src"] for tag, attrs in parser.tags if tag == "img"]
    assert len(sources) >= 3
    assert all(source and source.startswith("data:image/") for source in sources)
    assert not any(name.startswith("on") for _, attrs in parser.tags for name in attrs)
    assert not any(attrs.get("href") for _, attrs in parser.tags)
    assert EVIL not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    style = re.search(r"<style>(.*)</style>", page, re.DOTALL)
    assert style and "url(" not in style.group(1) and "@import" not in style.group(1)
    # Two of four boxes are found, and half of what is found is right.
    assert "0.500" in page and KOREAN in page


async def test_zip_holds_report_charts_and_tables(service: Service, evaluated: str) -> None:
    file = await report(service, evaluated, format=report_pb2.REPORT_FORMAT_ZIP)
    assert (file.kind, file.info.file_name, file.info.inline) == (
        "application/zip",
        "report-v-a.zip",
        False,
    )
    with zipfile.ZipFile(io.BytesIO(file.data)) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        assert {"report.html", "charts/confusion.png", "charts/classes.png"} <= names
        for name in (
            "classes-test",
            "detections-val",
            "confusion-test",
            "evaluations",
            "curves-val",
        ):
            assert {f"tables/{name}.csv", f"tables/{name}.json"} <= names
        assert archive.read("charts/errors.png").startswith(b"\x89PNG")
        as_json = json.loads(archive.read("tables/evaluations.json"))
    assert [row["split"] for row in as_json] == ["val", "test"]


async def test_charts_are_png_or_svg_and_say_when_there_is_nothing_to_draw(
    service: Service, evaluated: str
) -> None:
    png = await chart(service, evaluated, chart=_Chart.CONFUSION, split=SPLIT_VAL)
    assert (png.kind, png.info.file_name) == ("image/png", "confusion-a.png")
    assert png.data.startswith(b"\x89PNG")
    svg = await chart(service, evaluated, chart=_Chart.CLASSES, svg=True, language="ko")
    assert svg.kind == "image/svg+xml" and svg.data.lstrip().startswith(b"<?xml")
    assert EVIL.encode() not in svg.data
    with pytest.raises(FailedPrecondition, match="no epoch") as refused:
        await chart(service, evaluated, chart=_Chart.LOSSES)
    assert refused.value.reason == "NOTHING_TO_DRAW"


async def test_tables_say_what_became_of_every_detection_and_box(
    service: Service, evaluated: str
) -> None:
    file = await table(service, evaluated, table=_Table.DETECTIONS, confidence_threshold=0.65)
    assert (file.kind, file.info.file_name) == ("text/csv", "detections-test-a.csv")
    found = rows(file)
    assert [(row["image_id"], row["what"], row["match"], row["error"]) for row in found] == [
        ("1", "detection", "true_positive", ""),
        ("2", "detection", "true_positive", ""),
        ("3", "detection", "false_positive", "class"),
        ("3", "ground_truth", "false_negative", ""),
        ("4", "ground_truth", "false_negative", "missed"),
    ]
    assert found[0]["image"] == "'=cells/<b>.jpg"  # no formula for a spreadsheet
    assert (found[0]["confidence"], found[0]["x2"], found[0]["iou"]) == ("0.9", "40.0", "1.0")
    as_json = await table(
        service, evaluated, table=_Table.DETECTIONS, confidence_threshold=0.65, json=True
    )
    assert [row["match"] for row in json.loads(as_json.data)] == [row["match"] for row in found]
    assert json.loads(as_json.data)[0]["image"] == "=cells/<b>.jpg"


async def test_tables_of_figures_leave_empty_what_was_not_measured(
    service: Service, evaluated: str
) -> None:
    classes = rows(await table(service, evaluated, table=_Table.CLASSES))
    assert [row["class"] for row in classes] == [EVIL, KOREAN, "'" + FORMULA]
    assert [row["ap50_95"] for row in classes[2:]] == [""]
    assert float(classes[0]["ap50"]) == pytest.approx(0.5, abs=0.01)
    confusion = rows(
        await table(service, evaluated, table=_Table.CONFUSION, confidence_threshold=0)
    )
    assert sum(int(row["count"]) for row in confusion if row["actual_class"]) == 4
    errors = json.loads((await table(service, evaluated, table=_Table.ERRORS, json=True)).data)
    assert {row["error"] for row in errors} >= {"CLASS", "MISSED", "BACKGROUND"}
    curves = rows(await table(service, evaluated, table=_Table.CURVES))
    assert {row["curve"] for row in curves} == {"precision_recall", "confidence"}
    assert KOREAN in {row["class"] for row in curves}


async def test_training_that_runs_has_a_report_and_tables_of_what_there_is(
    service: Service, bus: Bus
) -> None:
    training = FakeTraining(bus, "t1")
    await training.run()
    await training.epoch(1, train__box_loss=3.0, val__map50=0.25)
    await training.steps(1, 1, num_steps=2, train__box_loss=[3.5, 2.5])
    await training.epoch(2, train__box_loss=float("nan"), val__map50=0.5)
    await all_applied(service, training.name)
    page = (await report(service, training.name)).data.decode()
    assert "has not been evaluated yet" in page and "Loss by epoch" in page
    epochs = rows(await table(service, training.name, table=_Table.EPOCHS))
    assert epochs == [
        {"epoch": "1", "train/box_loss": "3.0", "val/map50": "0.25"},
        {"epoch": "2", "train/box_loss": "", "val/map50": "0.5"},
    ]
    steps = rows(await table(service, training.name, table=_Table.STEPS))
    assert [(row["epoch"], row["step"], row["train/box_loss"]) for row in steps] == [
        ("1", "1", "3.5"),
        ("1", "2", "2.5"),
    ]
    png = await chart(service, training.name, chart=_Chart.QUALITY)
    assert png.data.startswith(b"\x89PNG")
    with pytest.raises(NotFound, match="evaluated when it has finished"):
        await chart(service, training.name, chart=_Chart.CONFUSION)


async def test_report_of_a_failed_evaluation_gives_the_reason(
    service: Service, bus: Bus, store: ObjectStore
) -> None:
    training = FakeTraining(bus, "t1")
    await training.run()
    gone = store.put("trainings/t1/predictions.parquet", b"no parquet")
    manifest = store.put("bundles/manifests/m.json", b"{}")
    await training.predictions(manifest, gone, gone)
    async with channels.channel(service.address) as channel:
        stub = metrics_pb2_grpc.MetricsServiceStub(channel)
        watch = stub.WatchMetrics(metrics_pb2.WatchMetricsRequest(training=training.name))
        async for _ in watch:  # it ends when both splits are measured
            pass
    page = (await report(service, training.name)).data.decode()
    assert "could not be measured" in page and "manifest" in page


async def test_comparison_report_has_intervals_and_parameters(
    service: Service, store: ObjectStore, evaluated: str
) -> None:
    await put_evaluation(service.db, store, B, truth(), ROWS[:2], split="test")
    request = report_pb2.DownloadComparisonReportRequest(parent="projects/p", trainings=[A, B])
    file = await download(service, "DownloadComparisonReport", request)
    page = file.data.decode()
    assert file.info.file_name == "comparison-a-b.html"
    assert "Comparison of trainings" in page and "mAP50-95" in page and EVIL not in page
    request.format = report_pb2.REPORT_FORMAT_ZIP
    file = await download(service, "DownloadComparisonReport", request)
    with zipfile.ZipFile(io.BytesIO(file.data)) as archive:
        assert "charts/deltas.png" in archive.namelist()
        deltas = json.loads(archive.read("tables/deltas.json"))
    assert [row["metric"] for row in deltas][:3] == ["map50_95", "map50", "map75"]


async def test_client_writes_files_named_as_asked_or_by_itself(
    service: Service, evaluated: str, tmp_path: Path
) -> None:
    def use() -> None:
        with Client(environ={"DETFLOW_METRICS_ADDRESS": service.address}) as client:
            page = client.reports.download(evaluated, tmp_path, language="ko")
            assert page == tmp_path / "report-a.html" and "학습 보고서" in page.read_text()
            svg = client.reports.chart(evaluated, "confusion", tmp_path / "c.svg", split="val")
            assert svg.read_bytes().lstrip().startswith(b"<?xml")
            table = client.reports.table(
                evaluated, "detections", tmp_path / "d.json", threshold=0.65
            )
            assert len(json.loads(table.read_text())) == 5
            parts = client.reports.iter_table(evaluated, "detections", threshold=0.65)
            assert b"".join(parts).count(b"\r\n") == 6
            with pytest.raises(InvalidArgument, match="losses, quality"):
                client.reports.chart(evaluated, "pie", tmp_path)
            with pytest.raises(NotFound):
                client.reports.download(f"{evaluated}x", tmp_path / "none.html")
            assert not (tmp_path / "none.html").exists()

    await asyncio.to_thread(use)


async def test_training_of_nobody_is_not_found(service: Service) -> None:
    nobody = "projects/p/versions/v/trainings/none"
    for call in (
        report(service, nobody),
        chart(service, nobody, chart=_Chart.LOSSES),
        table(service, nobody, table=_Table.STEPS),
        table(service, nobody, table=_Table.CLASSES),
    ):
        with pytest.raises(NotFound, match="none"):
            await call


async def all_applied(service: Service, name: str) -> None:
    """Reads the snapshot of a watch: it holds every event published before the call."""
    async with channels.channel(service.address) as channel:
        stub = metrics_pb2_grpc.MetricsServiceStub(channel)
        call = stub.WatchMetrics(metrics_pb2.WatchMetricsRequest(training=name))
        async for _ in call:
            call.cancel()
            return
