"""`detflow compare`: which model is better, on which classes and images, and whether by chance."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from detflow.cli import metric_tables, output, plots
from detflow.cli.follow import figure
from detflow.cli.intervals import Interval, drawn
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.client.metrics import EVALUATED_SPLITS
from detflow.v1 import comparison_pb2

_METRICS = {
    "map50_95": "mAP50-95",
    "map50": "mAP50",
    "map75": "mAP75",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
}
_SPLIT_WORDS = {"val": "validation", "test": "test"}
_MAX_CLASSES = 20
_MAX_IMAGES = 10
_MAX_TRAININGS = 10
_Delta = comparison_pb2.Comparison.Delta | comparison_pb2.Comparison.ClassDelta


def compare(
    context: typer.Context,
    trainings: Annotated[
        list[str],
        typer.Argument(
            metavar="TRAINING",
            help="Two or more: resource names, ids, or names of versions such as V_0 for their"
            " newest training; the others are compared with the first.",
            show_default=False,
        ),
    ],
    split: Annotated[str, typer.Option("--split", help="val or test.")] = "test",
    resamples: Annotated[
        int,
        typer.Option(
            "--resamples",
            metavar="N",
            help="How often the images are drawn anew to find the intervals; up to 10000.",
            min=1,
            max=10_000,
        ),
    ] = 1000,
    level: Annotated[
        float,
        typer.Option(
            "--level", help="What share of the draws an interval holds.", min=0.001, max=0.999
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="The same one gives the same intervals.")] = 0,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV tables, an empty line between two.")
    ] = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Compares trainings that were measured on the same images with the first of them.

    A difference is marked with * where it is more than chance: where its interval leaves out 0.
    """
    s = session(context, json, project, address)
    if split not in EVALUATED_SPLITS:
        raise typer.BadParameter(f"--split must be {' or '.join(EVALUATED_SPLITS)}, not {split!r}")
    if not 2 <= len(trainings) <= _MAX_TRAININGS:
        raise typer.BadParameter(
            f"give 2 to {_MAX_TRAININGS} trainings, not {len(trainings)}: the first is what the"
            " others are compared with"
        )
    if s.json and csv:
        raise typer.BadParameter("give --json or --csv, not both")
    names = [s.client.trainings.find(training, s.project).name for training in trainings]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise typer.BadParameter(
                f"{trainings[names.index(name)]!r} and {trainings[number]!r} are the same"
                f" training, {name}: give two different ones"
            )
    comparison = s.client.comparisons.compare(
        names, split, num_resamples=resamples, confidence_level=level, seed=seed
    )
    if s.json:
        output.say_json(comparison)
    elif csv:
        _say_csv(comparison)
    else:
        _say(s, comparison, split)


@dataclass(frozen=True, slots=True)
class _Side:
    """A training, as A, B, C in the tables."""

    letter: str
    side: comparison_pb2.Comparison.Side
    version: str


def _say(s: Session, comparison: comparison_pb2.Comparison, split: str) -> None:
    versions = {
        version.name: version.display_name
        for version in s.client.versions.list(s.project, show_deleted=True)
    }
    sides = [
        _Side(letter, side, versions.get(_version(side.training), _version(side.training)))
        for letter, side in zip(string.ascii_uppercase, comparison.sides, strict=False)
    ]
    output.say_table(
        ("", "VERSION", "MODEL", "COUNTED FROM", "TRAINING"),
        (
            (
                one.letter,
                one.version,
                one.side.model or "-",
                f"confidence {one.side.best_f1.confidence_threshold:.3f}"
                if one.side.HasField("best_f1")
                else "-",
                one.side.training,
            )
            for one in sides
        ),
        empty="",
    )
    output.say(
        f"\n{comparison.num_images} {_SPLIT_WORDS[split]} images, intervals of"
        f" {100 * comparison.confidence_level:.4g} % from {comparison.num_resamples} draws,"
        " * is more than chance"
    )
    for one in sides[1:]:
        _say_deltas(comparison, sides[0], one)
    for one in sides[1:]:
        _say_classes(comparison, sides[0], one)
    _say_parameters(comparison.parameters, sides, versions)
    _say_images(comparison.images, sides)
    output.say()
    for one in sides[1:]:
        output.say(_verdict(comparison, sides[0], one))


def _say_deltas(comparison: comparison_pb2.Comparison, first: _Side, other: _Side) -> None:
    deltas = [delta for delta in comparison.deltas if delta.training == other.side.training]
    output.say()
    output.say_table(
        _header("METRIC", first, other),
        ((_METRICS.get(delta.metric, delta.metric), *_cells(delta)) for delta in deltas),
        empty="",
    )
    _draw(
        Interval(
            name=_METRICS.get(delta.metric, delta.metric),
            value=delta.delta,
            low=delta.low,
            high=delta.high,
        )
        for delta in deltas
        if min(delta.baseline, delta.value) >= 0
    )


def _say_classes(comparison: comparison_pb2.Comparison, first: _Side, other: _Side) -> None:
    found = [
        delta
        for delta in comparison.class_deltas
        if delta.training == other.side.training and delta.num_ground_truths
    ]
    found.sort(key=lambda delta: -abs(delta.delta))
    output.say()
    output.say_table(
        (*_header("CLASS (AP50-95)", first, other), "BOXES"),
        (
            (delta.class_name, *_cells(delta), f"{delta.num_ground_truths}")
            for delta in found[:_MAX_CLASSES]
        ),
        empty="no class has a box in this split",
    )
    if len(found) > _MAX_CLASSES:
        output.say(f"and {len(found) - _MAX_CLASSES} classes that differ less; --csv lists all")


def _say_parameters(
    parameters: Sequence[comparison_pb2.Comparison.ParameterDiff],
    sides: Sequence[_Side],
    versions: Mapping[str, str],
) -> None:
    output.say()
    output.say_table(
        ("PARAMETER", *(one.letter for one in sides)),
        (
            (one.name, *(versions.get(value, value) or "-" for value in one.values))
            for one in parameters
        ),
        empty="all parameters are the same",
    )


def _say_images(
    images: Sequence[comparison_pb2.Comparison.ImageDelta], sides: Sequence[_Side]
) -> None:
    output.say()
    output.say_table(
        ("IMAGE (F1)", *(one.letter for one in sides), "DIFFERENCE", "RESULT"),
        (
            (
                image.image_path,
                *(figure(f1) for f1 in image.f1s),
                figure(image.difference),
                image.inference_results[0].rsplit("/", 1)[1],
            )
            for image in images[:_MAX_IMAGES]
        ),
        empty="every image has the same F1 in all of them",
    )
    if len(images) > _MAX_IMAGES:
        output.say(f"and {len(images) - _MAX_IMAGES} more; --csv lists them")


def _verdict(comparison: comparison_pb2.Comparison, first: _Side, other: _Side) -> str:
    """Says in a sentence which of two is better, by mAP50-95."""
    (delta,) = (
        one
        for one in comparison.deltas
        if one.training == other.side.training and one.metric == "map50_95"
    )
    if min(delta.baseline, delta.value) < 0:
        return "the split has no ground truth: there is nothing to compare"
    found = f"mAP50-95 {delta.delta:+.3f} [{delta.low:.3f}, {delta.high:.3f}]"
    if not delta.significant:
        return f"{first.letter} and {other.letter}: no difference that is more than chance, {found}"
    word = "better" if delta.delta > 0 else "worse"
    return f"{other.letter} is {word} than {first.letter}: {found}"


def _header(name: str, first: _Side, other: _Side) -> Sequence[str]:
    return (name, first.letter, other.letter, f"{other.letter} - {first.letter}", "INTERVAL", "")


def _cells(delta: _Delta) -> Sequence[str]:
    if min(delta.baseline, delta.value) < 0:
        return ("-", "-", "-", "-", "")
    return (
        figure(delta.baseline),
        figure(delta.value),
        f"{delta.delta:+.3f}",
        f"{delta.low:+.3f} .. {delta.high:+.3f}",
        "*" if delta.significant else "",
    )


def _draw(intervals: Iterable[Interval]) -> None:
    rows, console = list(intervals), plots.terminal()
    if rows and console is not None:
        output.say()
        console.print(drawn(rows, console.width))


def _say_csv(comparison: comparison_pb2.Comparison) -> None:
    trainings = [side.training for side in comparison.sides]
    interval = ("baseline", "value", "delta", "low", "high", "significant")

    def cells(delta: _Delta) -> Sequence[float | str]:
        numbers = (delta.baseline, delta.value, delta.delta, delta.low, delta.high)
        return (*numbers, str(delta.significant).lower())

    metric_tables.say(
        [
            metric_tables.Table(
                header=("training", "metric", *interval),
                rows=((one.training, one.metric, *cells(one)) for one in comparison.deltas),
            ),
            metric_tables.Table(
                header=("training", "class_name", *interval, "num_ground_truths"),
                rows=(
                    (one.training, one.class_name, *cells(one), one.num_ground_truths)
                    for one in comparison.class_deltas
                ),
            ),
            metric_tables.Table(
                header=("parameter", *trainings),
                rows=((one.name, *one.values) for one in comparison.parameters),
            ),
            metric_tables.Table(
                header=("image_path", "inference_result", "difference", *trainings),
                rows=(
                    (
                        one.image_path,
                        one.inference_results[0].rsplit("/", 1)[1],
                        one.difference,
                        *one.f1s,
                    )
                    for one in comparison.images
                ),
            ),
        ]
    )


def _version(training: str) -> str:
    return training.split("/trainings/")[0]
