"""`detflow report`, `detflow chart` and `detflow table`: what was measured as files."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.files import check_out
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.client.metrics import EVALUATED_SPLITS
from detflow.client.reports import CHARTS, FORMATS, LANGUAGES, TABLES

_Training = Annotated[
    str,
    typer.Argument(
        metavar="TRAINING",
        help="Resource name, id, or the name of a version such as V_0 for its newest training.",
    ),
]
_Split = Annotated[
    str, typer.Option("--split", help="val or test, for what is measured on a split.")
]
_Language = Annotated[str, typer.Option("--language", help="en or ko.")]
_Out = Annotated[
    Path,
    typer.Option(
        "-o",
        "--out",
        help="File, or folder [default: under its own name, here].",
        metavar="FILE",
        show_default=False,
    ),
]


def report(
    context: typer.Context,
    trainings: Annotated[
        list[str],
        typer.Argument(
            metavar="TRAINING",
            help="Resource name, id, or the name of a version such as V_0 for its newest training;"
            " with several, the others are compared with the first.",
            show_default=False,
        ),
    ],
    out: _Out = Path(),
    format: Annotated[
        str,
        typer.Option("--format", help="html: one page; zip: with its charts and tables."),
    ] = "html",
    language: _Language = "en",
    split: Annotated[
        str, typer.Option("--split", help="val or test: on which trainings are compared.")
    ] = "test",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Writes a report of a training, or of several compared, that needs nothing else to be read."""
    _check("--format", format, FORMATS)
    _check("--language", language, LANGUAGES)
    _check("--split", split, EVALUATED_SPLITS)
    check_out(out)
    s = session(context, json, project, address)
    names = [s.client.trainings.find(training, s.project).name for training in trainings]
    if len(names) == 1:
        path = s.client.reports.download(names[0], out, format=format, language=language)
    else:
        path = s.client.reports.comparison(
            names, out, split=split, format=format, language=language
        )
    _say(s, path)


def chart(
    context: typer.Context,
    training: _Training,
    chart: Annotated[str, typer.Argument(metavar="CHART", help=f"{', '.join(CHARTS)}.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="File, SVG if its name ends so and else PNG, or folder [default: under its own"
            " name, here].",
            metavar="FILE",
            show_default=False,
        ),
    ] = Path(),
    split: _Split = "test",
    language: _Language = "en",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Writes one chart of a training as a picture."""
    _check("CHART", chart, CHARTS)
    _check("--language", language, LANGUAGES)
    _check("--split", split, EVALUATED_SPLITS)
    check_out(out)
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    _say(s, s.client.reports.chart(name, chart, out, split=split, language=language))


def table(
    context: typer.Context,
    training: _Training,
    table: Annotated[str, typer.Argument(metavar="TABLE", help=f"{', '.join(TABLES)}.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="File, JSON if its name ends so and else CSV [default: prints it].",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    split: _Split = "test",
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Detections of at least this confidence count [default: that with the best F1].",
            min=0.0,
            max=1.0,
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Prints or writes one table of a training as CSV; with --json it prints JSON."""
    _check("TABLE", table, TABLES)
    _check("--split", split, EVALUATED_SPLITS)
    if out is not None:
        check_out(out)
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    if out is not None:
        path = s.client.reports.table(name, table, out, split=split, threshold=threshold)
        _say(s, path)
        return
    parts = s.client.reports.iter_table(name, table, json=s.json, split=split, threshold=threshold)
    for data in parts:
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _check(what: str, word: str, choices: Collection[str]) -> None:
    if word not in choices:
        raise typer.BadParameter(f"{what} must be one of {', '.join(choices)}, not {word!r}")


def _say(s: Session, path: Path) -> None:
    size_bytes = path.stat().st_size
    if s.json:
        output.say_json({"path": str(path), "sizeBytes": size_bytes})
    else:
        output.say(f"wrote {output.printable(str(path))} ({output.size(size_bytes)})")
