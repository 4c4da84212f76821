"""Pages, charts and tables made from messages: what is odd in them, and what must never get out."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detflow.errors import ResourceExhausted
from detflow.v1.analysis_pb2 import (
    ErrorKind,
    EvaluationAnalysis,
    EvaluationCurves,
    PrecisionRecallCurve,
)
from detflow.v1.metrics_pb2 import CocoSummary, Evaluation, OperatingPoint
from detflow.v1.report_pb2 import DownloadChartRequest
from detflow.v1.training_pb2 import Training
from services.metrics.reports import facts, renderer, tables, texts
from services.metrics.reports.content import Picture, SplitContent, TrainingContent
from services.metrics.reports.gallery import series_chart, split_chart, training_charts
from services.metrics.reports.jobs import ChartJob
from services.metrics.reports.page import training_page
from services.metrics.reports.renderer import Renderer
from services.metrics.reports.style import label, render, styled
from services.metrics.reports.tables import Table
from services.metrics.series import Series

NAME = "projects/p/versions/v/trainings/t"
EVIL = "<script>alert(1)</script>"
Chart = DownloadChartRequest.Chart


def class_names(num: int) -> list[str]:
    """Names as users give them: Korean, mathematics, markup, controls, empty space, long."""
    odd = ["적혈구", "$\\frac{1}{0$", EVIL, "a\nb\u202ec", "名前", "x" * 300, "\U0001f600"]
    return [*odd, *(f"class {k}" for k in range(num))][:num]


def split(num_classes: int, *, name: str = "test", map50_95: float = 0.5) -> SplitContent:
    """A split of which the first class was found better than the others."""
    names = class_names(num_classes)
    point = OperatingPoint(confidence_threshold=0.4, precision=0.9, recall=0.8, f1=0.85)
    evaluation = Evaluation(
        name=f"{NAME}/evaluations/{name}",
        state=Evaluation.State.SUCCEEDED,
        coco=CocoSummary(map50_95=map50_95, map50=0.9, map_small=-1),
        best_f1=point,
        num_images=200,
        num_ground_truths=60 * num_classes,
    )
    analysis = EvaluationAnalysis(confidence_threshold=0.4)
    for k, class_name in enumerate(names):
        evaluation.classes.add(
            class_name=class_name,
            ap50_95=0.8 / (k + 1),
            ap50=0.9 / (k + 1),
            num_ground_truths=60 + k,
            best_f1=point,
        )
        analysis.classes.add(class_name=class_name, num_true_positives=50 + k)
        analysis.confusion.add(actual_class=class_name, predicted_class=class_name, count=50)
        analysis.confusion.add(actual_class="", predicted_class=class_name, count=3)
    for kind in ErrorKind.values()[1:]:
        analysis.errors.add(kind=kind, count=kind, map50_gain=kind / 100)
    steps = [k / 100 for k in range(101)]
    falling = [1 - k / 100 for k in range(101)]
    curves = EvaluationCurves(
        recalls=steps,
        thresholds=steps,
        precision_recall=[
            PrecisionRecallCurve(class_name=name, iou=0.5, precisions=falling, ap=0.5)
            for name in ["", *names]
        ],
    )
    curves.confidence.add(precisions=steps, recalls=falling, f1s=steps, best_f1=point)
    curves.calibration.bins.add(
        min_confidence=0.5, max_confidence=0.55, num_detections=9, precision=0.6
    )
    return SplitContent(evaluation=evaluation, curves=curves, analysis=analysis)


def series(name: str, *values: float) -> Series:
    epochs = np.arange(1, len(values) + 1)
    return Series(
        name=name,
        epochs_N=epochs,
        positions_N=epochs.astype(np.float64),
        values_N=np.array(values, np.float64),
        num_points=len(values),
    )


def content(*splits: SplitContent, **fields: Any) -> TrainingContent:
    training = Training(name=NAME, state=Training.State.SUCCEEDED, model="yolov8n", batch_size=8)
    return TrainingContent(training=training, version=EVIL, splits=splits, **fields)


@pytest.mark.parametrize("num_classes", [7, 80])
def test_charts_of_any_class_names_are_drawn_the_same_every_time(num_classes: int) -> None:
    losses = (series("train/box_loss", 3.0, math.nan, math.inf, 1.0), series("lr", 0.1))
    drawn = [training_charts(content(split(num_classes), series=losses), "ko") for _ in range(2)]
    assert set(drawn[0]) == {
        *("losses", "learning-rate", "precision-recall", "confidence"),
        *("confusion", "calibration", "errors", "classes"),
    }
    with styled():
        first, second = ({n: render(f, svg=True) for n, f in one.items()} for one in drawn)
    assert first == second
    assert all(b"<script" not in one and b"<date" not in one for one in first.values())
    assert all(len(one) < 600_000 for one in first.values())


def test_chart_of_nothing_is_none() -> None:
    nothing = SplitContent(evaluation=Evaluation(), analysis=EvaluationAnalysis())
    for chart in Chart.values()[1:]:
        if chart in (Chart.LOSSES, Chart.QUALITY, Chart.LEARNING_RATE, Chart.PERFORMANCE):
            assert series_chart(chart, [series("other", 1.0)], "en") is None
        else:
            assert split_chart(chart, nothing, "en") is None


def test_labels_are_one_short_line_without_invisible_characters() -> None:
    assert label("a\nb\u202ec") == "a\ufffdb\ufffdc"
    assert len(label("x" * 300)) == 26 and label("x" * 300).endswith("…")


def test_page_shows_what_users_named_as_text() -> None:
    picture = Picture(
        path=EVIL,
        jpeg=b"\xff\xd8",
        num_true_positives=1,
        num_false_positives=0,
        num_false_negatives=0,
    )
    page = training_page(content(split(3), pictures=(picture,)), "en").decode()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4  # version twice, class, picture
    assert re.search(r"default-src 'none'; style-src 'sha256-[\w+/=]+'; img-src data:;", page)


def test_page_says_what_a_reader_should_know() -> None:
    found = facts.training_facts(
        content(
            split(1, name="val", map50_95=0.6),
            split(1, map50_95=0.5),
            series=(series("val/map50_95", 0.1, 0.2, 0.3),),
        ),
        "en",
    )
    cautions = " ".join(found["main"]["cautions"])
    assert "10.0 points between validation and test" in cautions
    assert "more epochs may give a better model" in cautions
    assert "finds 80, and of 100 that it reports 90 are right" in found["main"]["verdict"]
    assert found["main"]["name"] == "test"


def test_split_without_boxes_and_model_that_finds_nothing_are_told_apart() -> None:
    empty = split(1)
    empty.evaluation.ClearField("best_f1")
    assert (
        "finds none of 60 things" in facts.training_facts(content(empty), "en")["main"]["verdict"]
    )
    empty.evaluation.num_ground_truths = 0
    assert "holds no boxes" in facts.training_facts(content(empty), "en")["main"]["verdict"]
    assert not facts.training_facts(content(empty), "en")["notices"]


def test_split_that_failed_and_split_with_figures_only_are_explained() -> None:
    failed = Evaluation(name=f"{NAME}/evaluations/val", state=Evaluation.State.FAILED)
    failed.failure.status.message = "the predictions are gone"
    old = SplitContent(evaluation=split(2).evaluation)
    page = training_page(content(SplitContent(evaluation=failed), old), "en").decode()
    assert "the predictions are gone" in page and "kept the figures only" in page
    assert "0.500" in page


def test_every_text_is_there_in_both_languages() -> None:
    stored = json.loads((Path(texts.__file__).parent / "texts.json").read_text(encoding="utf-8"))
    for group in stored.values():
        for key, words in group.items():
            assert set(words) == {"en", "ko"} and all(words.values()), key
            fields = [set(re.findall(r"{(\w+)", text)) for text in words.values()]
            assert fields[0] == fields[1], key


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_text_that_is_a_formula_is_harmless_in_csv_and_whole_in_json(text: str) -> None:
    data = b"".join(tables.to_csv(Table((text, "b"), [(text, -1.5)])))
    assert list(csv.reader(io.StringIO(data.decode(), newline=""))) == [
        ["'" + text, "b"],
        ["'" + text, "-1.5"],
    ]
    assert data.count(b"\r\n") == 2
    assert json.loads(b"".join(tables.to_json(Table(("a",), [(text,)])))) == [{"a": text}]


def test_numbers_that_are_none_are_empty_and_large_tables_come_in_parts() -> None:
    rows = [(math.nan, None, 'say "hi", you\n')] * 20_000
    parts = list(tables.to_csv(Table(("a", "b", "c"), rows)))
    assert len(parts) > 1 and max(map(len, parts)) < 300_000
    read = list(csv.reader(io.StringIO(b"".join(parts).decode(), newline="")))
    assert read[1] == ["", "", 'say "hi", you\n'] and len(read) == 20_001
    assert json.loads(b"".join(tables.to_json(Table(("a", "b", "c"), rows))))[-1]["a"] is None
    assert json.loads(b"".join(tables.to_json(Table(("a",), [])))) == []


def test_series_of_unequal_epochs_are_lined_up() -> None:
    table = tables.series_table([series("a", 1.0, 2.0), series("b", 3.0)])
    assert b"".join(tables.to_csv(table)) == b"epoch,a,b\r\n1,1.0,3.0\r\n2,2.0,\r\n"
    assert list(tables.series_table([]).rows) == []


async def test_drawing_that_fails_or_has_to_wait_too_long_is_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_chart = ChartJob(chart=Chart.CHART_UNSPECIFIED, language="en", svg=False)
    with pytest.raises(ResourceExhausted, match="ended with 1") as failed:
        await Renderer(tmp_path).render(no_chart)
    assert failed.value.reason == "REPORT_FAILED"
    monkeypatch.setattr(renderer, "_MAX_WAITING", 0)
    with pytest.raises(ResourceExhausted) as busy:
        await Renderer(tmp_path).render(no_chart)
    assert (busy.value.reason, busy.value.retry_seconds) == ("BUSY", 5)
