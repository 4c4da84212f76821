"""How what stands behind the figures of an evaluation is shown: counts, errors, curves."""

import shlex
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console

from detflow.cli import output, plots
from detflow.cli.follow import figure, operating_point
from detflow.v1 import analysis_pb2

_Counts = analysis_pb2.EvaluationAnalysis.Counts
_Cell = analysis_pb2.EvaluationAnalysis.ConfusionCell
_BAR_CELLS = 20
_MAX_CONFUSIONS = 20
_EVERY = 5
"""Of 101 points of a curve, those printed as numbers: 0.00, 0.05 to 1.00."""
_LIKELY = 0.05
"""Most detections are less confident, and so many that they hide what the others are like."""
_BACKGROUND = "(background)"
_NOT_FOUND = "(not found)"
_ALL = "(all)"

ERROR_KINDS = {
    analysis_pb2.ERROR_KIND_CLASS: ("class", "right place, wrong class"),
    analysis_pb2.ERROR_KIND_LOCALIZATION: ("localization", "right class, badly placed"),
    analysis_pb2.ERROR_KIND_BOTH: ("both", "wrong class and badly placed"),
    analysis_pb2.ERROR_KIND_DUPLICATE: ("duplicate", "a box that was found already"),
    analysis_pb2.ERROR_KIND_BACKGROUND: ("background", "there is nothing"),
    analysis_pb2.ERROR_KIND_MISSED: ("missed", "a box that nothing was found on"),
}


def say_counts(analysis: analysis_pb2.EvaluationAnalysis) -> None:
    """Prints how many detections are right and how many boxes were found, class by class."""
    output.say_table(
        ("CLASS", "RIGHT", "WRONG", "NOT FOUND", "PRECISION", "RECALL", "F1"),
        (_counts_row(counts) for counts in (analysis.all, *analysis.classes)),
        empty="no classes",
    )


def _counts_row(counts: _Counts) -> Sequence[str]:
    right, wrong = counts.num_true_positives, counts.num_false_positives
    boxes = right + counts.num_false_negatives
    return (
        counts.class_name or _ALL,
        f"{right}",
        f"{wrong}",
        f"{counts.num_false_negatives}",
        figure(counts.precision) if right + wrong else "-",
        figure(counts.recall) if boxes else "-",
        figure(counts.f1) if boxes else "-",
    )


def say_confusion(analysis: analysis_pb2.EvaluationAnalysis, results_command: str) -> None:
    """Prints the confusion matrix, or the largest confusions where it is too wide.

    Args:
        analysis: What a threshold makes of an evaluation.
        results_command: Command that lists images, to which `--confused ACTUAL:PREDICTED` is added.
    """
    names = [counts.class_name for counts in analysis.classes]
    count_of = {
        (cell.actual_class, cell.predicted_class): cell.count for cell in analysis.confusion
    }
    header = ["ACTUAL \\ FOUND", *(output.printable(name) for name in names), _NOT_FOUND]
    rows = []
    for actual in (*names, ""):
        cells = [count_of.get((actual, predicted), 0) for predicted in (*names, "")]
        counted = [f"{count}" if count else "." for count in cells]
        if not actual:
            counted[-1] = ""  # nothing that was found as nothing cannot be counted
        rows.append([output.printable(actual) or _BACKGROUND, *_aligned(counted, header[1:])])
    first = max(cell_len(row[0]) for row in (header, *rows))
    if first + sum(cell_len(name) + 2 for name in header[1:]) <= Console().width:
        output.say_table(header, rows, empty="")
    else:
        output.say(f"{len(names)} classes are too many for a matrix here; --csv has all of it.")
        _say_confusions(analysis.confusion)
    pairs = (f"{cell.actual_class}:{cell.predicted_class}" for cell in _wrong(analysis.confusion))
    # With more colons the option could not tell the classes apart.
    largest = next((pair for pair in pairs if pair.count(":") == 1), None)
    if largest is not None:
        quoted = shlex.quote(output.printable(largest))
        output.say(f"see them: {results_command} --confused {quoted}")


def _aligned(cells: Sequence[str], header: Sequence[str]) -> Iterable[str]:
    return (
        " " * (cell_len(name) - len(cell)) + cell for cell, name in zip(cells, header, strict=True)
    )


def _wrong(cells: Sequence[_Cell]) -> Sequence[_Cell]:
    wrong = [cell for cell in cells if cell.actual_class != cell.predicted_class]
    return sorted(wrong, key=lambda cell: -cell.count)


def _say_confusions(cells: Sequence[_Cell]) -> None:
    boxes: dict[str, int] = {}
    for cell in cells:
        boxes[cell.actual_class] = boxes.get(cell.actual_class, 0) + cell.count
    wrong = _wrong(cells)
    output.say_table(
        ("ACTUAL", "FOUND", "TIMES", "OF THE ACTUAL"),
        (
            (
                cell.actual_class or _BACKGROUND,
                cell.predicted_class or _NOT_FOUND,
                f"{cell.count}",
                f"{100 * cell.count / boxes[cell.actual_class]:.1f}%" if cell.actual_class else "-",
            )
            for cell in wrong[:_MAX_CONFUSIONS]
        ),
        empty="nothing was taken for anything else",
    )
    if len(wrong) > _MAX_CONFUSIONS:
        output.say(f"and {len(wrong) - _MAX_CONFUSIONS} more")


def say_errors(analysis: analysis_pb2.EvaluationAnalysis, results_command: str) -> None:
    """Prints how often each error is made and what it costs, with the way to its images.

    Args:
        analysis: What a threshold makes of an evaluation.
        results_command: Command that lists images, to which `--error KIND` is added.
    """
    most = max((error.map50_gain for error in analysis.errors), default=0.0)
    output.say_table(
        ("ERROR", "TIMES", "COSTS mAP50", "", "WHAT IT IS"),
        (
            (
                ERROR_KINDS[error.kind][0],
                f"{error.count}",
                figure(error.map50_gain),
                plots.bar(max(error.map50_gain, 0.0) / most, _BAR_CELLS) if most > 0 else "",
                ERROR_KINDS[error.kind][1],
            )
            for error in analysis.errors
        ),
        empty="no errors",
    )
    output.say(
        "TIMES is at this threshold; COSTS is what mAP50, which has none, would gain without it"
    )
    made = [error for error in analysis.errors if error.count]
    if made:
        most_often = max(made, key=lambda error: error.count)
        output.say(f"see them: {results_command} --error {ERROR_KINDS[most_often.kind][0]}")


def say_calibration(calibration: analysis_pb2.Calibration) -> None:
    """Prints how often detections of each confidence are right."""
    output.say_table(
        ("CONFIDENCE", "DETECTIONS", "MEAN", "RIGHT", "bar: right, |: confidence"),
        (
            (
                f"{one.min_confidence:.2f} - {one.max_confidence:.2f}",
                f"{one.num_detections}",
                figure(one.mean_confidence),
                figure(one.precision),
                _reliability(one.precision, one.mean_confidence),
            )
            for one in calibration.bins
            if one.num_detections
        ),
        empty="nothing was found",
    )
    likely = [one for one in calibration.bins if one.min_confidence >= _LIKELY]
    total = sum(one.num_detections for one in likely)
    output.say(
        f"calibration error {calibration.expected_error:.3f}, at most {calibration.max_error:.3f}"
    )
    if total:
        excess = sum(one.num_detections * (one.mean_confidence - one.precision) for one in likely)
        output.say(
            f"from {_LIKELY} on, confidences are {abs(excess) / total:.3f}"
            f" too {'high' if excess > 0 else 'low'} on average"
        )


def _reliability(precision: float, confidence: float) -> str:
    """Draws a bar for the precision with a mark at the confidence."""
    cells = plots.bar(precision, _BAR_CELLS).ljust(_BAR_CELLS)
    mark = min(round(confidence * _BAR_CELLS), _BAR_CELLS - 1)
    return f"{cells[:mark]}|{cells[mark + 1 :]}"


def say_curves(curves: analysis_pb2.EvaluationCurves) -> None:
    """Draws precision by recall and what every threshold gives; numbers where nothing is drawn."""
    console = plots.terminal()
    for plot in _plots(curves):
        output.say()
        if console is not None:
            console.print(plots.drawn(plot, console))
        else:
            _say_numbers(plot)
    output.say()
    output.say_table(
        ("CLASS", "AP50-95", "AP50", "PRECISION", "RECALL", "F1", "AT CONFIDENCE"),
        (_best_row(curve, curves.precision_recall) for curve in curves.confidence),
        empty="no curves",
    )


def _best_row(
    curve: analysis_pb2.ConfidenceCurve,
    precision_recall: Sequence[analysis_pb2.PrecisionRecallCurve],
) -> Sequence[str]:
    ap = {one.iou: one.ap for one in precision_recall if one.class_name == curve.class_name}
    return (
        curve.class_name or _ALL,
        figure(ap.get(0.0, -1.0)),
        figure(ap.get(0.5, -1.0)),
        *operating_point(curve),
    )


def _plots(curves: analysis_pb2.EvaluationCurves) -> Iterable[plots.Plot]:
    recalls, thresholds = list(curves.recalls), list(curves.thresholds)
    means = [one for one in curves.precision_recall if not one.class_name]
    of_classes = [one for one in curves.precision_recall if one.class_name and one.iou == 0.5]
    title = "precision by recall, mean over classes"
    lines = [(_iou_name(one.iou), recalls, one.precisions) for one in means]
    yield from _over_0_to_1(title, "recall", lines)
    lines = [(one.class_name, recalls, one.precisions) for one in of_classes]
    yield from _over_0_to_1("precision by recall at IoU 0.5", "recall", lines)
    pooled = [one for one in curves.confidence if not one.class_name]
    by_class = [one for one in curves.confidence if one.class_name]
    for one in pooled:
        lines = [
            ("precision", thresholds, one.precisions),
            ("recall", thresholds, one.recalls),
            ("F1", thresholds, one.f1s),
        ]
        yield from _over_0_to_1("all classes by confidence threshold", "confidence", lines)
    lines = [(one.class_name, thresholds, one.f1s) for one in by_class]
    yield from _over_0_to_1("F1 by confidence threshold", "confidence", lines)


def _over_0_to_1(
    title: str, x_label: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]
) -> Iterable[plots.Plot]:
    for start in range(0, len(lines), plots.MAX_LINES):
        yield plots.Plot(
            title=title,
            x_label=x_label,
            x_range=(0.0, 1.0),
            y_range=(0.0, 1.0),
            lines=[
                plots.Line(name=output.printable(name), xs=xs if ys else (), ys=ys)
                for name, xs, ys in lines[start : start + plots.MAX_LINES]
            ],
        )


def _iou_name(iou: float) -> str:
    return f"IoU {iou:g}" if iou else "IoU 0.5 to 0.95"


def _say_numbers(plot: plots.Plot) -> None:
    output.say(f"{plot.title}:")
    xs = max((line.xs for line in plot.lines), key=len)
    output.say_table(
        (plot.x_label.upper(), *(line.name for line in plot.lines)),
        (
            (f"{xs[at]:.2f}", *(f"{line.ys[at]:.3f}" if line.xs else "-" for line in plot.lines))
            for at in range(0, len(xs), _EVERY)
        ),
        empty="no ground truth",
    )
