"""What `detflow metrics` asks for and what its answers look like."""

import csv
import io
import json
from collections.abc import Sequence

import pytest
from rich.cells import cell_len
from rich.console import Console

from detflow.cli.metrics_watch import Growing
from detflow.cli.plots import Line, Plot, drawn
from detflow.v1 import analysis_pb2, common_pb2, metrics_pb2, training_pb2
from tests.cli_rig import Rig, rig
from tests.surface_rig import TRAINING

__all__ = ["rig"]

Analysis = analysis_pb2.EvaluationAnalysis
Watched = metrics_pb2.WatchMetricsResponse
CLASSES = ("세포", "red\x1b[31m cell")
SHOWN = ("세포", "red\ufffd[31m cell")


@pytest.fixture(autouse=True)
def measured(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of two classes that was measured, and a screen of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    rig.fakes.trainer.trainings = [training_pb2.Training(name=TRAINING)]
    best = metrics_pb2.OperatingPoint(
        confidence_threshold=0.3, precision=0.75, recall=0.6, f1=0.6667
    )
    rig.fakes.metrics.evaluations = [
        metrics_pb2.Evaluation(
            name=f"{TRAINING}/evaluations/{name}",
            state=metrics_pb2.Evaluation.SUCCEEDED,
            split=split,
            coco=metrics_pb2.CocoSummary(map50=0.5, map50_95=0.25, map_small=-1),
            best_f1=best,
            classes=[
                metrics_pb2.ClassMetrics(
                    class_name=CLASSES[0], ap50=0.5, num_ground_truths=5, best_f1=best
                ),
                metrics_pb2.ClassMetrics(class_name=CLASSES[1], ap50=-1, ap50_95=-1),
            ],
            num_images=4,
        )
        for name, split in (("val", common_pb2.SPLIT_VAL), ("test", common_pb2.SPLIT_TEST))
    ]
    rig.fakes.metrics.series = [
        metrics_pb2.MetricSeries(name="train/box_loss", epochs=[1, 2, 3], values=[3, 2, 1.5]),
        metrics_pb2.MetricSeries(name="val/box_loss", epochs=[1, 3], values=[3, float("nan")]),
        metrics_pb2.MetricSeries(name="val/map50", epochs=[1, 2, 3], values=[0.1, 0.3, 0.5]),
    ]
    rig.fakes.metrics.step_series = [
        metrics_pb2.MetricSeries(name="train/box_loss", positions=[0.5, 1], values=[4, 3])
    ]
    rig.fakes.metrics.analysis = Analysis(
        confidence_threshold=0.3,
        all=Analysis.Counts(
            num_true_positives=3,
            num_false_positives=1,
            num_false_negatives=2,
            precision=0.75,
            recall=0.6,
            f1=0.6667,
        ),
        classes=[
            Analysis.Counts(
                class_name=CLASSES[0],
                num_true_positives=3,
                num_false_negatives=2,
                precision=1,
                recall=0.6,
                f1=0.75,
            ),
            Analysis.Counts(class_name=CLASSES[1], num_false_positives=1),
        ],
        confusion=[
            Analysis.ConfusionCell(actual_class=CLASSES[0], predicted_class=CLASSES[0], count=3),
            Analysis.ConfusionCell(actual_class=CLASSES[0], predicted_class=CLASSES[1], count=1),
            Analysis.ConfusionCell(actual_class=CLASSES[0], count=1),
            Analysis.ConfusionCell(predicted_class=CLASSES[1], count=7),
        ],
        errors=[
            Analysis.ErrorImpact(kind=analysis_pb2.ERROR_KIND_CLASS, count=1, map50_gain=0.1),
            Analysis.ErrorImpact(kind=analysis_pb2.ERROR_KIND_MISSED, count=2, map50_gain=0.2),
        ],
    )
    axis = [number / 100 for number in range(101)]
    Bin = analysis_pb2.Calibration.Bin
    rig.fakes.metrics.curves = analysis_pb2.EvaluationCurves(
        recalls=axis,
        thresholds=axis,
        precision_recall=[
            analysis_pb2.PrecisionRecallCurve(iou=0.5, precisions=axis[::-1], ap=0.5),
            analysis_pb2.PrecisionRecallCurve(precisions=axis[::-1], ap=0.25),
            analysis_pb2.PrecisionRecallCurve(class_name=CLASSES[1], iou=0.5, ap=-1),
        ],
        confidence=[
            analysis_pb2.ConfidenceCurve(
                precisions=axis, recalls=axis[::-1], f1s=axis, best_f1=best
            ),
            analysis_pb2.ConfidenceCurve(class_name=CLASSES[1], precisions=axis),
        ],
        calibration=analysis_pb2.Calibration(
            bins=[
                Bin(min_confidence=0.3, max_confidence=0.35),
                Bin(
                    min_confidence=0.9,
                    max_confidence=0.95,
                    num_detections=4,
                    mean_confidence=0.92,
                    precision=0.75,
                ),
            ],
            expected_error=0.17,
            max_error=0.17,
        ),
    )


def row(out: str, name: str) -> Sequence[str]:
    """Returns the cells behind a name of the last line that begins with it."""
    line = [line for line in out.splitlines() if line.startswith(name)][-1]
    return line.removeprefix(name).replace(">= ", "").split()


def test_overview_has_both_splits_every_class_and_leads_on(rig: Rig) -> None:
    out = rig.run("metrics", TRAINING).out
    assert "val    0.250     0.500" in out and "test   0.250" in out
    assert row(out, SHOWN[0]) == ["0.000", "0.500", "0.750", "0.600", "0.667", "0.300", "5"]
    assert row(out, SHOWN[1]) == ["-", "-", "-", "-", "-", "-", "0"]
    assert "val/box_loss    3      -" in out
    assert f"detflow metrics {TRAINING} --errors --confusion" in out
    only = rig.run("metrics", TRAINING, "--split", "test").out
    assert "CLASS (test)" in only and "val    0.250" not in only


def test_training_that_is_not_measured_yet_is_to_be_followed(rig: Rig) -> None:
    rig.fakes.metrics.evaluations = []
    rig.fakes.metrics.series = []
    out = rig.run("metrics", TRAINING).out
    assert "not measured yet" in out and "no epoch is finished yet" in out
    assert out.endswith(f"follow it: detflow metrics {TRAINING} --watch\n")
    none = rig.run("metrics", TRAINING, "--series", "val/map50")
    assert none.code == 1 and "nothing is measured yet" in none.err


def test_json_is_one_document_of_what_was_asked_for(rig: Rig) -> None:
    overview = rig.run("metrics", TRAINING, "--json").json
    assert set(overview) == {"training", "evaluations", "series"}
    asked = ("--errors", "--calibration", "--series", "val/*", "--json", "--split", "test")
    document = rig.run("metrics", TRAINING, *asked).json
    assert set(document) == {"training", "split", "analysis", "curves", "series"}
    assert document["split"] == "test"
    assert document["analysis"]["all"]["numTruePositives"] == "3"
    assert [one["name"] for one in document["series"]] == ["val/box_loss", "val/map50"]


def test_threshold_goes_to_the_service_and_counts_are_shown_class_by_class(rig: Rig) -> None:
    out = rig.run("metrics", TRAINING, "--threshold", "0.3").out
    [request] = rig.fakes.metrics.asked
    assert request.name == f"{TRAINING}/evaluations/val"
    assert request.confidence_threshold == pytest.approx(0.3)
    assert "confidence >= 0.300, IoU 0.5" in out
    assert row(out, "(all)") == ["3", "1", "2", "0.750", "0.600", "0.667"]
    # Nothing to find, so nothing that could have been found: dashes, not zeros.
    assert row(out, SHOWN[1]) == ["0", "1", "0", "0.000", "-", "-"]
    rig.run("metrics", TRAINING, "--threshold", "best")
    assert not rig.fakes.metrics.asked[1].HasField("confidence_threshold")


def test_confusion_is_a_matrix_with_straight_columns_or_a_list_where_it_is_too_wide(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = rig.run("metrics", TRAINING, "--confusion").out
    header, *rows, hint = out.splitlines()[2:]
    assert hint.endswith(f"--confused ':{SHOWN[1]}'")
    assert header.split("  ")[0] == "ACTUAL \\ FOUND"
    first, second, background = rows
    assert first.split() == [SHOWN[0], "3", "1", "1"]
    assert second.split() == ["red\ufffd[31m", "cell", ".", ".", "."]
    assert background.split() == ["(background)", ".", "7"]
    assert cell_len(first) == cell_len(header)  # a wide name moves nothing

    monkeypatch.setenv("COLUMNS", "40")
    narrow = rig.run("metrics", TRAINING, "--confusion").out.splitlines()[3:-1]
    cells = [line.split("  ") for line in narrow]
    assert [one[0] for one in cells] == ["ACTUAL", "(background)", SHOWN[0], SHOWN[0]]
    assert narrow[1].split()[-2:] == ["7", "-"]
    assert narrow[2].split()[-2:] == ["1", "20.0%"]


def test_errors_lead_to_the_images_of_the_most_frequent(rig: Rig) -> None:
    asked = ("--errors", "--threshold", "0.3", "--project", "lab")
    lines = rig.run("metrics", TRAINING, *asked).out.splitlines()
    assert any(line.startswith("class   1      0.100        ██████████") for line in lines)
    assert lines[-1] == (
        f"see them: detflow results {TRAINING} --split val --threshold 0.3 --project lab"
        " --error missed"
    )


def test_calibration_shows_bins_that_hold_something(rig: Rig) -> None:
    out = rig.run("metrics", TRAINING, "--calibration").out
    assert "0.30 - 0.35" not in out
    assert "0.90 - 0.95  4           0.920  0.750  ███████████████   |" in out
    assert "calibration error 0.170" in out
    assert "from 0.05 on, confidences are 0.170 too high" in out


def test_curves_are_numbers_in_a_pipe_and_lines_on_a_terminal(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = rig.run("metrics", TRAINING, "--curves", "--class", CLASSES[1]).out
    assert rig.fakes.metrics.asked[0].class_names == [CLASSES[1]]
    assert "0.25    0.750    0.750" in out
    assert row(out, "(all)") == ["0.250", "0.500", "0.750", "0.600", "0.667", "0.300"]
    assert "⠒" not in out and "\x1b" not in out

    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    drawn = rig.run("metrics", TRAINING, "--curves").out
    assert "⠒" in drawn or "⠉" in drawn
    assert "\x1b[" in drawn and "0.25    0.750" not in drawn
    monkeypatch.setenv("NO_COLOR", "1")
    plain = rig.run("metrics", TRAINING, "--curves").out
    assert "\x1b[3" not in plain and "ooo" in plain
    assert max(cell_len(line) for line in plain.splitlines()) <= 80


def test_series_are_chosen_by_pattern_and_drawn_by_what_they_measure(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = rig.run("metrics", TRAINING, "--series", "val/map50,*/box_loss").out.splitlines()
    assert out[0].split() == ["EPOCH", "train/box_loss", "val/box_loss", "val/map50"]
    assert out[2].split() == ["2", "2", "-", "0.3"]
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    drawn = rig.run("metrics", TRAINING, "--series", "*").out
    assert drawn.index("quality") < drawn.index("box_loss")
    assert drawn.count("└") == 2
    steps = rig.run("metrics", TRAINING, "--series", "train/*", "--steps").out
    assert "epochs done" in steps
    assert rig.fakes.metrics.asked[-1].resolution == metrics_pb2.RESOLUTION_STEP

    unknown = rig.run("metrics", TRAINING, "--series", "val/mAP")
    assert unknown.code == 1
    assert "no series 'val/mAP'; there are train/box_loss, val/box_loss, val/map50" in unknown.err


def test_csv_has_every_number_unrounded(rig: Rig) -> None:
    asked = ("--confusion", "--errors", "--calibration", "--series", "*", "--csv")
    tables = rig.run("metrics", TRAINING, *asked).out.split("\n\n")
    confusion, errors, bins, epochs = (list(csv.DictReader(io.StringIO(one))) for one in tables)
    assert confusion[2] == {"actual_class": CLASSES[0], "predicted_class": "", "count": "1"}
    assert errors[1] == {"error": "missed", "count": "2", "map50_gain": "0.2"}
    assert float(bins[1]["mean_confidence"]) == 0.92
    assert epochs[1] == {
        "epoch": "2",
        "train/box_loss": "2.0",
        "val/box_loss": "",
        "val/map50": "0.3",
    }
    assert epochs[2]["val/box_loss"] == ""  # it is NaN
    overview = rig.run("metrics", TRAINING, "--csv").out.split("\n\n")
    splits, classes, _ = (list(csv.DictReader(io.StringIO(one))) for one in overview)
    named = ("split", "map50", "f1", "confidence_threshold")
    assert [[one[name] for name in named] for one in splits] == [
        ["val", "0.5", "0.6667", "0.3"],
        ["test", "0.5", "0.6667", "0.3"],
    ]
    assert classes[1]["precision"] == classes[1]["ap50"] == ""
    curves = rig.run("metrics", TRAINING, "--curves", "--csv").out.split("\n\n")
    assert [one.count("\n") for one in curves] == [202, 203]  # without the last line end
    steps = rig.run("metrics", TRAINING, "--series", "*", "--steps", "--csv").out
    assert steps.splitlines() == [
        "epoch,step,epochs_done,train/box_loss",
        "1,1,0.5,4.0",
        "1,2,1.0,3.0",
    ]


def test_values_that_are_none_are_left_out_of_a_plot() -> None:
    console = Console(force_terminal=True, no_color=True, width=60, file=io.StringIO())
    nan, infinite = float("nan"), float("inf")
    line = Line(name="loss", xs=[1, 2, 3, 4], ys=[nan, 1.0, infinite, 2.0])
    nothing = Line(name="none", xs=[1], ys=[nan])
    plot = Plot(title="loss", x_label="epoch", lines=[line, nothing], whole_x=True)
    with console.capture() as captured:
        console.print(drawn(plot, console))
    rows = captured.get().splitlines()
    assert rows[0] == "loss   * loss   o none (nothing measured)"
    assert rows[-2].split() == ["2", "3", "4"]
    assert rows[2].endswith("*│") and "o" not in "".join(rows[1:-1])


def test_name_that_looks_like_a_formula_is_no_formula_in_csv(rig: Rig) -> None:
    name = "=HYPERLINK(1)"
    rig.fakes.metrics.analysis.confusion.append(Analysis.ConfusionCell(actual_class=name, count=1))
    out = rig.run("metrics", TRAINING, "--confusion", "--csv").out
    assert out.splitlines()[-1] == f"'{name},,1"


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("--threshold", "2"), "--threshold must be 0 to 1"),
        (("--threshold", "nan"), "--threshold must be 0 to 1"),
        (("--threshold", "half"), "--threshold must be 0 to 1"),
        (("--split", "train"), "--split must be val or test"),
        (("--series", "a,,b"), "--series must be names"),
        (("--steps",), "--steps goes with"),
        (("--class", "a"), "--class says of what"),
        (("--json", "--csv"), "not both"),
        (("--watch", "--errors"), "--watch goes with"),
    ],
)
def test_options_that_make_no_sense_are_bad_usage(
    rig: Rig, options: Sequence[str], wrong: str
) -> None:
    done = rig.run("metrics", TRAINING, *options)
    assert done.code == 2 and wrong in done.err and len(done.err.splitlines()) == 1


def points(epoch: int, attempt: int, **values: float) -> Watched:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return Watched(
        cursor=f"{epoch}-{attempt}",
        points=metrics_pb2.MetricPoints(epoch=epoch, attempt=attempt, values=named),
    )


def test_watch_says_every_epoch_and_ends_with_the_figures(rig: Rig) -> None:
    rig.fakes.metrics.watched = [
        Watched(
            cursor="1",
            snapshot=metrics_pb2.MetricsSnapshot(series=rig.fakes.metrics.series[:1]),
        ),
        points(4, 1, train__box_loss=1.2, lr=0.1),
        Watched(cursor="9", evaluation=rig.fakes.metrics.evaluations[0]),
    ]
    lines = rig.run("metrics", TRAINING, "--watch").out.splitlines()
    assert lines[:3] == [
        "after epoch 3, train/box_loss 1.5",
        "epoch 4, train/box_loss 1.2",
        "measured val",
    ]
    assert any(line.startswith("SPLIT") for line in lines)
    messages = rig.run("metrics", TRAINING, "--watch", "--json").out.splitlines()
    assert len([json.loads(line) for line in messages]) == 3


def test_watch_on_a_terminal_leaves_plots_of_what_was_asked_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    rig.fakes.metrics.watched = [
        Watched(cursor="1", snapshot=metrics_pb2.MetricsSnapshot()),
        points(1, 1, train__box_loss=3.0, lr=700.0),
        points(2, 1, train__box_loss=2.0),
    ]
    out = rig.run("metrics", TRAINING, "--watch").out
    last = out.rpartition("box_loss   *")[2]
    assert "train/box_loss" in last and "┤" in last and "700" not in last


def test_what_a_later_attempt_makes_void_is_forgotten() -> None:
    growing = Growing(["train/*"])
    growing.on_snapshot(
        [metrics_pb2.MetricSeries(name="train/loss", epochs=[1, 2, 3], values=[9, 8, 7])]
    )
    growing.on_points(points(4, 1, train__loss=6).points)
    growing.on_points(points(3, 2, train__loss=5, lr=0.1).points)
    assert growing.points() == {"train/loss": ([1, 2, 3], [9, 8, 5])}

    def steps(attempt: int, first: int, *values: float) -> training_pb2.StepMetrics:
        column = training_pb2.StepMetrics.Column(name="train/loss", values=values)
        return training_pb2.StepMetrics(
            attempt=attempt, epoch=2, first_step=first, num_steps=4, columns=[column]
        )

    growing = Growing(["*"])
    assert growing.on_steps(steps(1, 1, 4, 3, 2)) == {"train/loss": 2}
    assert growing.points() == {"train/loss": ([1.25, 1.5, 1.75], [4, 3, 2])}
    growing.on_steps(steps(2, 2, 5))
    assert growing.points() == {"train/loss": ([1.25, 1.5], [4, 5])}


def test_series_that_grows_for_long_keeps_its_peaks() -> None:
    growing = Growing(["*"])
    for epoch in range(1, 5001):
        growing.on_points(points(epoch, 1, loss=100.0 if epoch == 777 else epoch % 7).points)
    [(positions, values)] = growing.points().values()
    assert len(positions) <= 4000 and positions == sorted(positions)
    assert values[positions.index(777)] == 100 and positions[-1] == 5000


def test_watch_by_step_takes_over_where_the_snapshot_ends(rig: Rig) -> None:
    Column = training_pb2.StepMetrics.Column
    rig.fakes.metrics.watched = [
        Watched(
            cursor="1",
            snapshot=metrics_pb2.MetricsSnapshot(step_series=rig.fakes.metrics.step_series),
        ),
        Watched(
            cursor="2",
            steps=training_pb2.StepMetrics(
                attempt=1,
                epoch=2,
                first_step=3,
                num_steps=8,
                columns=[Column(name="train/box_loss", values=[2.5, 2.25])],
            ),
        ),
    ]
    lines = rig.run("metrics", TRAINING, "--watch", "--steps").out.splitlines()
    assert rig.fakes.metrics.asked[0].with_steps
    assert lines[1] == "epoch 2, step 4/8, train/box_loss 2.25"
