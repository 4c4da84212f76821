"""`detflow compare` against a service whose answers the test writes down."""

import csv
import json
from typing import Any

import pytest
from rich.console import Console

from detflow.cli.intervals import Interval, drawn
from detflow.client import Client
from detflow.errors import InvalidArgument
from detflow.v1 import common_pb2, comparison_pb2, training_pb2
from tests.cli_rig import Rig, rig
from tests.surface_rig import TRAINING, VERSION

__all__ = ["rig"]

Comparison = comparison_pb2.Comparison
OTHER = "projects/default/versions/w/trainings/u"
THIRD = f"{VERSION}/trainings/x"


def delta(training: str, metric: str, value: float, low: float, high: float) -> Any:
    return Comparison.Delta(
        training=training,
        metric=metric,
        baseline=0.5,
        value=0.5 + value,
        delta=value,
        low=low,
        high=high,
        significant=low > 0 or high < 0,
    )


@pytest.fixture
def comparison(rig: Rig) -> Comparison:
    """Three trainings: the second is better than the first, the third may be either."""
    sides = [
        Comparison.Side(training=name, model=model)
        for name, model in ((TRAINING, "yolov8n"), (OTHER, "yolov8s"), (THIRD, ""))
    ]
    sides[0].best_f1.confidence_threshold = 0.31
    rig.fakes.trainer.trainings = [
        training_pb2.Training(name=name) for name in (TRAINING, OTHER, THIRD)
    ]
    rig.fakes.metrics.comparison = Comparison(
        split=common_pb2.SPLIT_TEST,
        sides=sides,
        deltas=[
            delta(OTHER, "map50_95", 0.031, 0.012, 0.049),
            delta(OTHER, "recall", -0.02, -0.04, -0.001),
            delta(THIRD, "map50_95", -0.002, -0.02, 0.015),
        ],
        class_deltas=[
            Comparison.ClassDelta(
                training=OTHER,
                class_name=name,
                baseline=0.5,
                value=0.5 + by,
                delta=by,
                low=by - 0.1,
                high=by + 0.1,
                num_ground_truths=boxes,
            )
            for name, by, boxes in (("사과", 0.01, 7), ("=1+1", -0.05, 9), ("empty", 0.0, 0))
        ],
        parameters=[
            Comparison.ParameterDiff(name="version", values=[VERSION, OTHER[:27], VERSION]),
            Comparison.ParameterDiff(name="momentum", values=["", "0.9", ""]),
        ],
        images=[
            Comparison.ImageDelta(
                inference_results=[f"{TRAINING}/inferenceResults/test-7"],
                image_path=f"a/{number}.jpg",
                f1s=[0.25, 1.0, 0.5],
                difference=0.75,
            )
            for number in range(12)
        ],
        num_images=200,
        num_resamples=1000,
        confidence_level=0.95,
    )
    return rig.fakes.metrics.comparison


def test_tables_and_a_sentence_say_what_is_better(rig: Rig, comparison: Comparison) -> None:
    done = rig.run("compare", TRAINING, OTHER, THIRD)
    assert (done.code, done.err) == (0, "")
    assert "200 test images, intervals of 95 % from 1000 draws, * is more than chance" in done.out
    lines = [line.split() for line in done.out.splitlines()]
    assert ["A", "V_0", "yolov8n", "confidence", "0.310", TRAINING] in lines
    assert ["mAP50-95", "0.500", "0.531", "+0.031", "+0.012", "..", "+0.049", "*"] in lines
    assert ["recall", "0.500", "0.480", "-0.020", "-0.040", "..", "-0.001", "*"] in lines
    assert ["mAP50-95", "0.500", "0.498", "-0.002", "-0.020", "..", "+0.015"] in lines
    classes = [line[0] for line in lines if line and line[-1] in ("7", "9", "0")]
    assert classes[:2] == ["=1+1", "사과"]  # the largest difference first, those without boxes not
    assert "empty" not in done.out
    assert ["version", "V_0", "projects/default/versions/w", "V_0"] in lines
    assert ["momentum", "-", "0.9", "-"] in lines
    assert ["a/0.jpg", "0.250", "1.000", "0.500", "0.750", "test-7"] in lines
    assert "and 2 more" in done.out
    assert done.out.splitlines()[-2:] == [
        "B is better than A: mAP50-95 +0.031 [0.012, 0.049]",
        "A and C: no difference that is more than chance, mAP50-95 -0.002 [-0.020, 0.015]",
    ]


def test_options_reach_the_service_and_json_is_its_answer(rig: Rig, comparison: Comparison) -> None:
    done = rig.run(
        *("compare", "u", TRAINING, "--split", "val", "--resamples", "50"),
        *("--level", "0.8", "--seed", "3", "--json"),
    )
    assert done.code == 0
    assert json.loads(done.out)["deltas"][0]["metric"] == "map50_95"
    (asked,) = rig.fakes.metrics.asked
    assert asked == comparison_pb2.CompareTrainingsRequest(
        parent="projects/default",
        trainings=[OTHER, TRAINING],
        split=common_pb2.SPLIT_VAL,
        num_resamples=50,
        confidence_level=0.8,
        seed=3,
    )


def test_csv_has_all_of_it_unrounded(rig: Rig, comparison: Comparison) -> None:
    comparison.deltas[0].delta = 1 / 3
    done = rig.run("compare", TRAINING, OTHER, "--csv")
    tables = [list(csv.reader(part.splitlines())) for part in done.out.split("\n\n")]
    header = ["training", "metric", "baseline", "value", "delta", "low", "high", "significant"]
    assert tables[0][0] == header
    assert tables[0][1][4:] == [repr(1 / 3), "0.012", "0.049", "true"]
    assert [row[1] for row in tables[1][1:]] == ["사과", "'=1+1", "empty"]
    assert tables[2][0] == ["parameter", TRAINING, OTHER, THIRD]
    assert len(tables[3]) == 13


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("t",), "give 2 to 10 trainings, not 1"),
        (("t", TRAINING), "are the same training"),
        (("t", "u", "--split", "train"), "--split must be val or test"),
        (("t", "u", "--json", "--csv"), "not both"),
        (("t", "u", "--resamples", "0"), "--resamples"),
        (("t", "u", "--level", "1"), "--level"),
    ],
)
def test_bad_usage_is_one_line(
    rig: Rig, comparison: Comparison, arguments: tuple[str, ...], words: str
) -> None:
    done = rig.run("compare", *arguments)
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert words in done.err


def test_sdk_refuses_a_split_that_is_not_measured(rig: Rig) -> None:
    with Client("127.0.0.1:1", environ=rig.fakes.environ) as client:
        with pytest.raises(InvalidArgument, match="val or test"):
            client.comparisons.compare([TRAINING, OTHER], "train")


def test_intervals_are_drawn_around_a_common_zero() -> None:
    text = drawn(
        [
            Interval(name="mAP50-95", value=0.03, low=0.01, high=0.05),
            Interval(name="사과", value=-0.05, low=-0.1, high=-0.02),
            Interval(name="F1", value=0.0, low=-0.02, high=0.02),
        ],
        50,
    )
    console = Console(width=60, force_terminal=True, color_system="standard", legacy_windows=False)
    with console.capture() as captured:
        console.print(text)
    assert "\x1b[32m" in captured.get() and "\x1b[31m" in captured.get()
    rows = text.plain.splitlines()
    zero = rows[0].index("┊")
    assert rows[1].index("┊") == zero - 2  # the two letters take two cells each
    assert rows[2][zero] == "●"
    assert all(row.count("●") == 1 for row in rows[:3])
    assert rows[0].index("├") > zero
    assert rows[3].split() == ["-0.100", "0", "+0.050"]
    (same,) = drawn([Interval(name="F1", value=0, low=0, high=0)], 10).plain.splitlines()[:1]
    assert "●" in same
