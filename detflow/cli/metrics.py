"""`detflow metrics`: how good a model is, why, and how it became so."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from detflow.cli import analysis, metric_tables, output
from detflow.cli.follow import say_evaluations
from detflow.cli.metrics_watch import WATCHED, watch_series
from detflow.cli.series import chosen, number, say_series
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.client.columns import Columns
from detflow.client.metrics import EVALUATED_SPLITS
from detflow.client.projects import DEFAULT_PROJECT
from detflow.v1 import analysis_pb2, metrics_pb2

_SPLIT_WORDS = {"val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """What is to be shown.

    Attributes:
        training: As the user wrote it.
        split: Of the details; "" for both in the overview.
        threshold: Confidence threshold; None for the one with the best F1.
        counts: Counts of every class.
        curves: Curves.
        classes: Classes with curves of their own.
        confusion: Confusion matrix.
        errors: Kinds of errors.
        calibration: Confidence against precision.
        series: Names or patterns of series.
        steps: Series by step.
    """

    training: str
    split: str
    threshold: float | None
    counts: bool
    curves: bool
    classes: Sequence[str]
    confusion: bool
    errors: bool
    calibration: bool
    series: Sequence[str]
    steps: bool

    @property
    def needs_analysis(self) -> bool:
        return self.counts or self.confusion or self.errors

    @property
    def needs_curves(self) -> bool:
        return self.curves or self.calibration

    @property
    def is_overview(self) -> bool:
        return not (self.needs_analysis or self.needs_curves or self.series)


def metrics(
    context: typer.Context,
    training: Annotated[
        str,
        typer.Argument(
            metavar="TRAINING",
            help="Resource name, id, or the name of a version such as V_0 for its newest training.",
        ),
    ],
    split: Annotated[
        str,
        typer.Option("--split", help="val or test [default: val; without details both]."),
    ] = "",
    threshold: Annotated[
        str,
        typer.Option(
            "--threshold",
            metavar="T",
            help="What is right, wrong and not found, class by class, if detections count from"
            " confidence T on: 0 to 1, or 'best' for the best F1.",
        ),
    ] = "",
    curves: Annotated[
        bool,
        typer.Option("--curves", help="Precision by recall, and both by confidence threshold."),
    ] = False,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="NAME",
            help="With --curves: of this class too; '*' for all; may be repeated.",
        ),
    ] = None,
    confusion: Annotated[
        bool, typer.Option("--confusion", help="Which class was taken for which.")
    ] = False,
    errors: Annotated[
        bool, typer.Option("--errors", help="What goes wrong, and what it costs.")
    ] = False,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Whether confidences can be believed.")
    ] = False,
    series: Annotated[
        str,
        typer.Option(
            "--series",
            metavar="NAME,...",
            help="Values by epoch, e.g. 'val/map50', '*_loss', '*'.",
        ),
    ] = "",
    steps: Annotated[
        bool, typer.Option("--steps", help="With --series or --watch: by step.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Follow the values (of --series) until the training ends."),
    ] = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV tables, an empty line between two.")
    ] = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows how good a training's model is, and why.

    Without further options: the figures on validation and test images, of every class, and the
    first and last values by epoch.
    """
    s = session(context, json, project, address)
    asked = _Asked(
        training=training,
        split=_split(split),
        threshold=_threshold(threshold),
        counts=bool(threshold),
        curves=curves,
        classes=classes or (),
        confusion=confusion,
        errors=errors,
        calibration=calibration,
        series=_patterns(series),
        steps=steps,
    )
    _check(asked, json=s.json, csv=csv, watch=watch)
    name = s.client.trainings.find(training, s.project).name
    if watch:
        _watch(s, name, asked)
        return
    found = _find(s, name, asked, whole=csv)
    if s.json:
        output.say_json(_document(name, asked, found))
    elif csv:
        _say_csv(asked, found)
    else:
        _say(s, asked, found)


def _split(text: str) -> str:
    if text not in ("", *EVALUATED_SPLITS):
        raise typer.BadParameter(f"--split must be {' or '.join(EVALUATED_SPLITS)}, not {text!r}")
    return text


def _threshold(text: str) -> float | None:
    if text in ("", "best"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"--threshold must be 0 to 1, or best, not {text!r}")
    return value


def _patterns(text: str) -> Sequence[str]:
    patterns = [part.strip() for part in text.split(",")] if text else []
    if not all(patterns):
        raise typer.BadParameter(f"--series must be names with commas between, not {text!r}")
    return patterns


def _check(asked: _Asked, *, json: bool, csv: bool, watch: bool) -> None:
    """Refuses options that do not go together."""
    if asked.classes and not asked.curves:
        raise typer.BadParameter("--class says of what --curves are drawn: give both")
    if asked.steps and not (asked.series or watch):
        raise typer.BadParameter("--steps goes with --series or --watch")
    if json and csv:
        raise typer.BadParameter("give --json or --csv, not both")
    if watch and (csv or asked.split or asked.needs_analysis or asked.needs_curves):
        raise typer.BadParameter("--watch goes with --series, --steps and --json only")


@dataclass(kw_only=True, slots=True)
class _Found:
    """What was asked for, as the service answered."""

    evaluations: Sequence[metrics_pb2.Evaluation] = ()
    series: Sequence[metrics_pb2.MetricSeries] = ()
    columns: Mapping[str, Columns] = field(default_factory=dict)
    curves: analysis_pb2.EvaluationCurves | None = None
    analysis: analysis_pb2.EvaluationAnalysis | None = None


def _find(s: Session, name: str, asked: _Asked, *, whole: bool) -> _Found:
    """Asks for it; of series by step the `whole` if so, otherwise what can be drawn."""
    found = _Found()
    client = s.client.metrics
    split = asked.split or EVALUATED_SPLITS[0]
    if asked.is_overview:
        evaluations = client.evaluations(name)
        found.evaluations = [one for one in evaluations if one.name.endswith(asked.split)]
        found.series = client.series(name)
    if asked.needs_analysis:
        found.analysis = client.analyze(name, split, asked.threshold)
    if asked.needs_curves:
        found.curves = client.curves(name, split, asked.classes)
    if asked.series:
        known = client.series(name, steps=asked.steps, max_points=1)
        names = chosen([one.name for one in known], asked.series)
        if asked.steps and whole:
            found.columns = client.columns(name, names, "step")
        else:
            found.series = client.series(name, names, steps=asked.steps)
    return found


def _document(name: str, asked: _Asked, found: _Found) -> dict[str, Any]:
    """Makes one document of all answers, each as the HTTP API gives it."""
    document: dict[str, Any] = {"training": name}
    if asked.is_overview:
        document["evaluations"] = [output.as_dict(one) for one in found.evaluations]
    if found.analysis or found.curves:
        document["split"] = asked.split or EVALUATED_SPLITS[0]
    if found.analysis:
        document["analysis"] = output.as_dict(found.analysis)
    if found.curves:
        document["curves"] = output.as_dict(found.curves)
    if asked.is_overview or asked.series:
        document["series"] = [output.as_dict(one) for one in found.series]
    return document


def _say_csv(asked: _Asked, found: _Found) -> None:
    tables = []
    if asked.is_overview:
        tables.append(metric_tables.evaluations(found.evaluations))
        tables.append(metric_tables.classes(found.evaluations))
    if found.analysis:
        if asked.counts:
            tables.append(metric_tables.counts(found.analysis))
        if asked.confusion:
            tables.append(metric_tables.confusion(found.analysis))
        if asked.errors:
            tables.append(metric_tables.errors(found.analysis))
    if found.curves:
        if asked.curves:
            tables.append(metric_tables.precision_recall(found.curves))
            tables.append(metric_tables.confidence(found.curves))
        if asked.calibration:
            tables.append(metric_tables.calibration(found.curves))
    if asked.steps:
        tables.append(metric_tables.steps(found.columns))
    elif asked.is_overview or asked.series:
        tables.append(metric_tables.epochs(found.series))
    metric_tables.say(tables)


def _say(s: Session, asked: _Asked, found: _Found) -> None:
    if asked.is_overview:
        _say_overview(found, _command(s, "metrics", asked.training))
        return
    split = asked.split or EVALUATED_SPLITS[0]
    at = [] if asked.threshold is None else ["--threshold", f"{asked.threshold}"]
    results = _command(s, "results", asked.training, "--split", split, *at)
    if found.analysis:
        best = " (the best F1)" if asked.threshold is None else ""
        output.say(
            f"{_SPLIT_WORDS[split]} images, detections of confidence"
            f" >= {found.analysis.confidence_threshold:.3f}{best}, IoU 0.5"
        )
        if asked.counts:
            output.say()
            analysis.say_counts(found.analysis)
        if asked.confusion:
            output.say()
            analysis.say_confusion(found.analysis, results)
        if asked.errors:
            output.say()
            analysis.say_errors(found.analysis, results)
    if found.curves:
        if found.analysis:
            output.say()
        output.say(f"{_SPLIT_WORDS[split]} images, all detections")
        if asked.curves:
            analysis.say_curves(found.curves)
        if asked.calibration:
            output.say()
            analysis.say_calibration(found.curves.calibration)
    if asked.series:
        if found.analysis or found.curves:
            output.say()
        say_series(found.series)


def _command(s: Session, *words: str) -> str:
    """Returns the command line for these words in the same project."""
    project = [] if s.project == DEFAULT_PROJECT else ["--project", s.project]
    return output.printable(shlex.join(["detflow", *words, *project]))


def _say_overview(found: _Found, command: str) -> None:
    say_evaluations(found.evaluations)
    output.say()
    output.say_table(
        ("EPOCH VALUE", "FIRST", "LAST", "EPOCHS"),
        (
            (
                one.name,
                number(one.name, one.values[0]),
                number(one.name, one.values[-1]),
                f"{len(one.epochs)}",
            )
            for one in found.series
            if one.values
        ),
        empty="no epoch is finished yet",
    )
    output.say()
    if found.evaluations:
        output.say(f"why: {command} --errors --confusion --curves --calibration")
        output.say(f"over time: {command} --series '*_loss,val/*'")
    else:
        output.say(f"follow it: {command} --watch")


def _watch(s: Session, name: str, asked: _Asked) -> None:
    try:
        watch_series(s, name, asked.series or WATCHED, steps=asked.steps)
    except KeyboardInterrupt:
        output.complain(f"the training goes on: see it with `detflow metrics {name} --watch`")
        raise typer.Exit(0) from None
    if not s.json:
        output.say()
        say_evaluations(s.client.metrics.evaluations(name))
