"""`detflow datasets`: import, list, show, stats, download, problems, delete."""

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.files import check_out, file_name
from detflow.cli.session import Address, Json, Project, session
from detflow.cli.statistics import say_statistics
from detflow.client.datasets import FORMATS
from detflow.client.projects import DEFAULT_PROJECT
from detflow.client.saving import replacing
from detflow.errors import InvalidArgument
from detflow.v1 import common_pb2, dataset_pb2

app = typer.Typer(help="Labelled images, imported once.", rich_markup_mode=None)

_MAX_SHOWN = 100
_State = dataset_pb2.Dataset.State
_Name = Annotated[str, typer.Argument(metavar="DATASET", help="Name, id or resource name.")]


@app.command("import")
def import_(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH|URL",
            help="Archive (zip, tar, tar.gz), folder or address of one: https://, s3://, gs://,"
            " az://.",
        ),
    ],
    name: Annotated[
        str, typer.Option("--name", help="Name shown to people [default: that of the file].")
    ] = "",
    skip_invalid: Annotated[
        bool,
        typer.Option("--skip-invalid", help="Leave out what is invalid and list it."),
    ] = False,
    format: Annotated[
        str, typer.Option("--format", help=f"{', '.join(FORMATS)} [default: detect it].")
    ] = "",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Imports labelled images in YOLO, Pascal VOC or COCO layout.

    An upload that was interrupted goes on where it stopped when the command is given again.
    """
    _check_format(format)
    s = session(context, json, project, address)
    if s.project != DEFAULT_PROJECT:
        s.client.projects.ensure(s.project)
    stage = ""
    with s.bar() as bar:

        def show(progress: common_pb2.Progress) -> None:
            nonlocal stage
            stage = progress.stage
            bar.update(progress.stage, progress.percent, rate(progress))

        try:
            dataset = s.client.datasets.import_(
                source,
                project=s.project,
                name=name,
                skip_invalid=skip_invalid,
                format=format,
                progress=show,
            )
        except KeyboardInterrupt:
            if stage in ("hash", "upload"):
                output.complain("interrupted: the same command goes on where this one stopped")
            elif stage:
                output.complain("detflow goes on with the import: see `detflow datasets list`")
            raise
        except InvalidArgument as error:
            # The service speaks of its fields; here they are options.
            error.message = error.message.replace("skip_invalid", "--skip-invalid")
            error.message = error.message.replace("`format`", "--format")
            raise
    if s.json:
        output.say_json(dataset)
        return
    output.say(f"imported {output.printable(dataset.display_name)}")
    _say_dataset(dataset)


@app.command("list")
def list_(
    context: typer.Context, json: Json = False, project: Project = "", address: Address = ""
) -> None:
    """Lists the datasets, newest first."""
    s = session(context, json, project, address)
    datasets = s.client.datasets.list(s.project)
    if s.json:
        output.say_json({"datasets": [output.as_dict(dataset) for dataset in datasets]})
        return
    output.say_table(
        ("NAME", "STATE", "IMAGES", "BOXES", "CLASSES", "RESOURCE"),
        (
            (
                dataset.display_name,
                _State.Name(dataset.state),
                f"{dataset.num_images}",
                f"{dataset.num_boxes}",
                f"{len(dataset.class_names)}",
                dataset.name,
            )
            for dataset in datasets
        ),
        empty=f"no datasets in project {s.project}: import one with `detflow datasets import PATH`",
    )


@app.command("show")
def show(
    context: typer.Context,
    dataset: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows a dataset: images, boxes, classes, and what was left out."""
    s = session(context, json, project, address)
    found = s.client.datasets.find(dataset, s.project)
    if s.json:
        output.say_json(found)
    else:
        _say_dataset(found)


@app.command("stats")
def stats(
    context: typer.Context,
    dataset: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Draws what is in a dataset: classes, sizes, and what is worth a look."""
    s = session(context, json, project, address)
    found = s.client.datasets.find(dataset, s.project)
    statistics = s.client.datasets.statistics(found.name)
    if s.json:
        output.say_json(statistics)
    else:
        say_statistics(statistics)


@app.command("delete")
def delete(
    context: typer.Context,
    dataset: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Deletes a dataset that no version uses."""
    s = session(context, json, project, address)
    found = s.client.datasets.find(dataset, s.project)
    s.client.datasets.delete(found.name)
    if s.json:
        output.say_json({"name": found.name})
    else:
        output.say(f"deleted {output.printable(found.display_name)}")


@app.command("download")
def download(
    context: typer.Context,
    dataset: _Name,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="File, or folder [default: here].",
            metavar="FILE",
            show_default=False,
        ),
    ] = Path(),
    format: Annotated[
        str, typer.Option("--format", help=f"{', '.join(FORMATS)} [default: as imported].")
    ] = "",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Downloads a dataset as a zip, with the original images."""
    _check_format(format)
    check_out(out)
    s = session(context, json, project, address)
    found = s.client.datasets.find(dataset, s.project)
    if out.is_dir():
        out = out / file_name(found.display_name, ".zip")
    with s.bar() as bar:

        def show(progress: common_pb2.Progress) -> None:
            bar.update(progress.stage, progress.percent, rate(progress))

        path = s.client.datasets.download(found.name, out, format=format, progress=show)
    if s.json:
        output.say_json({"name": found.name, "path": str(path)})
        return
    output.say(f"wrote {output.printable(str(path))} ({output.size(path.stat().st_size)})")


@app.command("problems")
def problems(
    context: typer.Context,
    dataset: _Name,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="CSV file to write.", metavar="FILE")
    ] = None,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists everything that an import left out, clipped or refused."""
    if out is not None:
        check_out(out)
    s = session(context, json, project, address)
    found = s.client.datasets.problems(s.client.datasets.find(dataset, s.project).name)
    if out is None:
        for problem in found:
            if s.json:
                output.say_json(problem, one_line=True)
            else:
                output.say(_problem_line(problem))
        return
    with replacing(out) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        rows = csv.writer(text)
        rows.writerow(("place", "reason", "description"))
        rows.writerows((one.field, one.reason, one.description) for one in found)
        text.detach()  # flushed, and open until it is in its place
    if not s.json:
        output.say(f"wrote {output.printable(str(out))}")


def rate(progress: common_pb2.Progress) -> str:
    """Renders what a progress message says beside its percentage."""
    if progress.stage in ("hash", "upload", "download"):
        if not progress.num_total:
            return f"{progress.num_done / 1e6:.1f} MB"
        return f"{progress.num_done / 1e6:.1f} of {progress.num_total / 1e6:.1f} MB"
    parts = [f"{progress.num_done}"]
    if progress.num_total:
        parts = [f"{progress.num_done} of {progress.num_total}"]
    if progress.rate:
        parts.append(f"{progress.rate:.0f}/s")
    if progress.HasField("eta_seconds"):
        parts.append(f"{output.duration(progress.eta_seconds)} left")
    return ", ".join(parts)


def _say_dataset(dataset: dataset_pb2.Dataset) -> None:
    fields = {
        "dataset": dataset.name,
        "name": dataset.display_name,
        "state": _State.Name(dataset.state),
        "format": dataset_pb2.DatasetFormat.Name(dataset.format).removeprefix("DATASET_FORMAT_"),
        "images": f"{dataset.num_images} ({dataset.num_background_images} without boxes)",
        "boxes": f"{dataset.num_boxes}",
    }
    if dataset.num_crowd_boxes:
        fields["boxes"] += f" ({dataset.num_crowd_boxes} of them crowds)"
    if dataset.HasField("existing_split"):
        split = dataset.existing_split
        fields["own splits"] = f"{split.train} train, {split.val} val, {split.test} test"
    if dataset.source_url:
        fields["source"] = dataset.source_url
    if len(dataset.num_boxes_by_class) == len(dataset.class_names) > 0:
        fields["classes"] = ", ".join(
            f"{name} ({count})"
            for name, count in zip(dataset.class_names, dataset.num_boxes_by_class, strict=True)
        )
    if dataset.HasField("failure"):
        fields["failure"] = dataset.failure.status.message
    output.say_fields(fields)
    if dataset.skipped:
        output.say(f"left out or corrected ({dataset.num_skipped} left out in all):")
        for problem in dataset.skipped:
            output.say(f"  {_problem_line(problem)}")
        if len(dataset.skipped) == _MAX_SHOWN:
            output.say(f"  all of them: detflow datasets problems {dataset.name}")


def _problem_line(problem: common_pb2.Problem) -> str:
    return (
        f"{output.printable(problem.field)}: {problem.reason}:"
        f" {output.printable(problem.description)}"
    )


def _check_format(text: str) -> None:
    if text and text not in FORMATS:
        raise typer.BadParameter(f"--format must be one of {', '.join(FORMATS)}, not {text!r}")
