"""`detflow versions`: create, list, show, rename, label, delete, restore, replay."""

from pathlib import Path
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, Project, session
from detflow.cli.statistics import say_leaks
from detflow.cli.version_create import create
from detflow.cli.version_words import (
    counts_of,
    labels_of,
    map50_of,
    parse_labels,
    say_version,
    state_of,
    time_of,
)

app = typer.Typer(help="Datasets frozen with a split and a recipe.", rich_markup_mode=None)

_Name = Annotated[
    str, typer.Argument(metavar="VERSION", help="Name such as V_0, id, resource name.")
]

app.command("create")(create)


@app.command("list")
def list_(
    context: typer.Context,
    deleted: Annotated[bool, typer.Option("--deleted", help="Those in the trash too.")] = False,
    filter: Annotated[
        str,
        typer.Option(
            "--filter", help="Which ones, e.g. 'state = COMPLETED AND metrics.map50 >= 0.8'."
        ),
    ] = "",
    order_by: Annotated[
        str,
        typer.Option("--order-by", help="E.g. 'metrics.map50 desc' [default: create_time desc]."),
    ] = "",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists the versions, newest first."""
    s = session(context, json, project, address)
    versions = s.client.versions.list(
        s.project, show_deleted=deleted, filter=filter, order_by=order_by
    )
    if s.json:
        output.say_json({"versions": [output.as_dict(version) for version in versions]})
        return
    output.say_table(
        ("NAME", "STATE", "TRAIN/VAL/TEST", "MAP50", "RESOURCE"),
        ((v.display_name, state_of(v), counts_of(v), map50_of(v), v.name) for v in versions),
        empty=f"no such versions in project {s.project}"
        if filter
        else f"no versions in project {s.project}: make one with `detflow versions create`",
    )


@app.command("show")
def show(
    context: typer.Context,
    version: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows a version: state, split, recipe, newest training."""
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    if s.json:
        output.say_json(found)
    else:
        say_version(found)


@app.command("leaks")
def leaks(
    context: typer.Context,
    version: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows what the split kept together, what leaks, and each class's share of the splits."""
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    report = s.client.versions.leaks(found.name)
    if s.json:
        output.say_json(report)
    else:
        say_leaks(report, found.class_names)


@app.command("rename")
def rename(
    context: typer.Context,
    version: _Name,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new name.")],
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Changes the name shown to people."""
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    renamed = s.client.versions.rename(found.name, name, etag=found.etag)
    if s.json:
        output.say_json(renamed)
    else:
        old, new = output.printable(found.display_name), output.printable(renamed.display_name)
        output.say(f"{old} is now {new}")


@app.command("label")
def label(
    context: typer.Context,
    version: _Name,
    labels: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE", help="Notes to set; KEY- removes one."),
    ],
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Sets and removes labels: notes of your own, by which versions can be filtered."""
    changes = parse_labels(labels)
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    labelled = s.client.versions.label(found.name, changes)
    if s.json:
        output.say_json(labelled)
    else:
        output.say_fields({"labels": labels_of(labelled)})


@app.command("replay")
def replay(
    context: typer.Context,
    version: _Name,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="FILE", help="File, or folder [default: here]."),
    ] = Path(),
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Writes all that is needed to make the version again elsewhere, as JSON."""
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    path = s.client.versions.download_replay(found.name, out)
    if s.json:
        output.say_json({"path": str(path)})
    else:
        output.say(
            f"wrote {path}: make it again with `detflow versions create --replay {path} --dataset"
            " DATASET`"
        )


@app.command("delete")
def delete(
    context: typer.Context,
    version: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Moves a version to the trash; a running training is stopped."""
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    deleted = s.client.versions.delete(found.name)
    if s.json:
        output.say_json(deleted)
    else:
        output.say(
            f"moved {output.printable(found.display_name)} to the trash, where it stays until"
            f" {time_of(deleted.purge_time)}; take it out again with"
            f" `detflow versions restore {found.name}`"
        )


@app.command("restore")
def restore(
    context: typer.Context,
    version: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Takes a version out of the trash."""
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project, deleted=True)
    restored = s.client.versions.restore(found.name)
    if s.json:
        output.say_json(restored)
    else:
        output.say(f"{output.printable(restored.display_name)} is back: {state_of(restored)}")
