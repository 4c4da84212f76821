"""`detflow versions`: create, list, show, rename, delete, restore."""

from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.datasets import rate
from detflow.cli.session import Address, Json, Project, session
from detflow.client.versions import AUGMENTATIONS
from detflow.v1 import common_pb2, version_pb2

app = typer.Typer(help="Datasets frozen with a split and a recipe.", rich_markup_mode=None)

_State = version_pb2.Version.State
_Name = Annotated[
    str, typer.Argument(metavar="VERSION", help="Name such as V_0, id, resource name.")
]


def _split(text: str) -> tuple[int, int, int]:
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not TRAIN/VAL/TEST in percent, such as 70/20/10")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _augmentations(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in AUGMENTATIONS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(AUGMENTATIONS)}")
    return names


@app.command("create")
def create(
    context: typer.Context,
    dataset: Annotated[
        str, typer.Option("--dataset", help="Name, id or resource name.", metavar="DATASET")
    ],
    name: Annotated[
        str, typer.Option("--name", help="Name shown to people [default: the next V_n].")
    ] = "",
    split: Annotated[
        str, typer.Option("--split", help="Percent of training, validation, test images.")
    ] = "70/20/10",
    augment: Annotated[
        str,
        typer.Option(
            "--augment",
            help=f"Copies of every training image: {', '.join(AUGMENTATIONS)}; comma-separated.",
        ),
    ] = "",
    grayscale: Annotated[bool, typer.Option("--grayscale", help="Make every image gray.")] = False,
    max_side: Annotated[
        int, typer.Option("--max-side", help="Longest side in pixels; 0 keeps the size.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the split.")] = 0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Don't wait for the preprocessing.")
    ] = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Creates a version and waits until it is preprocessed."""
    percent, names = _split(split), _augmentations(augment)
    s = session(context, json, project, address)
    version = s.client.versions.create(
        s.client.datasets.find(dataset, s.project).name,
        name=name,
        split=percent,
        augment=names,
        grayscale=grayscale,
        max_side_px=max_side,
        seed=seed,
    )
    if not detach:
        with s.bar() as bar:

            def show(progress: common_pb2.Progress) -> None:
                bar.update(progress.stage, progress.percent, rate(progress))

            version = s.client.versions.wait(version.name, progress=show)
    if s.json:
        output.say_json(version)
        return
    output.say(f"created {output.printable(version.display_name)}")
    _say_version(version)


@app.command("list")
def list_(
    context: typer.Context,
    deleted: Annotated[bool, typer.Option("--deleted", help="Those in the trash too.")] = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists the versions, newest first."""
    s = session(context, json, project, address)
    versions = s.client.versions.list(s.project, show_deleted=deleted)
    if s.json:
        output.say_json({"versions": [output.as_dict(version) for version in versions]})
        return
    output.say_table(
        ("NAME", "STATE", "TRAIN/VAL/TEST", "RESOURCE"),
        (
            (version.display_name, _state(version), _counts(version), version.name)
            for version in versions
        ),
        empty=f"no versions in project {s.project}: make one with `detflow versions create`",
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
        _say_version(found)


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
            f"moved {output.printable(found.display_name)} to the trash; take it out again with"
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
        output.say(f"{output.printable(restored.display_name)} is back: {_state(restored)}")


def _state(version: version_pb2.Version) -> str:
    state = _State.Name(version.state)
    return f"{state} (in the trash)" if version.HasField("delete_time") else state


def _counts(version: version_pb2.Version) -> str:
    if not version.HasField("num_images"):
        return "-"
    counts = version.num_images
    return f"{counts.train}/{counts.val}/{counts.test}"


def _say_version(version: version_pb2.Version) -> None:
    recipe = version.recipe
    short = {number: name for name, number in AUGMENTATIONS.items()}
    steps = [f"longest side {recipe.max_side_px} px"] if recipe.max_side_px else []
    steps += ["grayscale"] if recipe.grayscale else []
    steps += [short[number] for number in recipe.augmentations]
    fields = {
        "version": version.name,
        "name": version.display_name,
        "state": _state(version),
        "dataset": version.dataset,
        "split": f"{recipe.split.train}/{recipe.split.val}/{recipe.split.test} %",
        "images": f"{_counts(version)} (train/val/test)",
        "recipe": ", ".join(steps) or "images as they are",
        "classes": ", ".join(version.class_names) or "-",
        "training": version.training or "none yet",
    }
    if version.HasField("failure"):
        fields["failure"] = version.failure.status.message
    output.say_fields(fields)
