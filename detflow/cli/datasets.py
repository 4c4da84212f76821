"""`detflow datasets`: import, list, show, delete."""

from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, Project, session
from detflow.client.projects import DEFAULT_PROJECT
from detflow.errors import InvalidArgument
from detflow.v1 import common_pb2, dataset_pb2

app = typer.Typer(help="Labelled images, imported once.", rich_markup_mode=None)

_State = dataset_pb2.Dataset.State
_Name = Annotated[str, typer.Argument(metavar="DATASET", help="Name, id or resource name.")]


@app.command("import")
def import_(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="PATH|URL", help="Zip archive, folder or address of one.")
    ],
    name: Annotated[
        str, typer.Option("--name", help="Name shown to people [default: that of the file].")
    ] = "",
    skip_invalid: Annotated[
        bool,
        typer.Option("--skip-invalid", help="Leave out what is invalid and list it."),
    ] = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Imports labelled images in YOLO or Pascal VOC layout."""
    s = session(context, json, project, address)
    if s.project != DEFAULT_PROJECT:
        s.client.projects.ensure(s.project)
    with s.bar() as bar:

        def show(progress: common_pb2.Progress) -> None:
            bar.update(progress.stage, progress.percent, rate(progress))

        try:
            dataset = s.client.datasets.import_(
                source, project=s.project, name=name, skip_invalid=skip_invalid, progress=show
            )
        except InvalidArgument as error:
            # The service speaks of its field; here it is an option.
            error.message = error.message.replace("skip_invalid", "--skip-invalid")
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


def rate(progress: common_pb2.Progress) -> str:
    """Renders what a progress message says beside its percentage."""
    if progress.stage in ("upload", "download"):
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
            output.say(
                f"  {output.printable(problem.field)}: {problem.reason}:"
                f" {output.printable(problem.description)}"
            )
