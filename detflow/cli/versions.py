"""`detflow versions`: create, list, show, rename, delete, restore."""

from pathlib import Path
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.datasets import rate
from detflow.cli.preview_page import preview_page
from detflow.cli.session import Address, Json, Project, session
from detflow.cli.statistics import say_leaks
from detflow.client.recipes import CHOICES, GROUPS, RecipeOptions, describe_recipe
from detflow.v1 import common_pb2, preprocess_pb2, version_pb2

app = typer.Typer(help="Datasets frozen with a split and a recipe.", rich_markup_mode=None)

_PREVIEW_SAMPLES = 6
_State = version_pb2.Version.State
_Name = Annotated[
    str, typer.Argument(metavar="VERSION", help="Name such as V_0, id, resource name.")
]
_Dataset = Annotated[
    str, typer.Option("--dataset", help="Name, id or resource name.", metavar="DATASET")
]
_Split = Annotated[
    str, typer.Option("--split", help="Percent of training, validation, test images.")
]
_KeepSplit = Annotated[
    bool, typer.Option("--keep-split", help="Keep the splits of the dataset's archive.")
]
_GroupBy = Annotated[
    str,
    typer.Option("--group-by", help=f"What stays on one side of the split: {', '.join(GROUPS)}."),
]
_GroupSeparator = Annotated[
    str,
    typer.Option("--group-separator", help="With prefix: what ends the group's part of a name."),
]
_Seed = Annotated[int, typer.Option("--seed", help="Seed of the split.")]
_MaxSide = Annotated[
    int, typer.Option("--max-side", help="Longest side in pixels; 0 keeps the size.")
]
_Size = Annotated[
    str, typer.Option("--size", help="Exact size, e.g. 640x640.", metavar="WIDTHxHEIGHT")
]
_Stretch = Annotated[
    bool, typer.Option("--stretch", help="Stretch to --size instead of adding a border.")
]
_Grayscale = Annotated[bool, typer.Option("--grayscale", help="Make every image gray.")]
_Augment = Annotated[
    str,
    typer.Option("--augment", help=f"Copies of every training image, comma-separated: {CHOICES}."),
]


def _percent(text: str) -> tuple[int, int, int]:
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not TRAIN/VAL/TEST in percent, such as 70/20/10")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _size(text: str) -> tuple[int, int] | None:
    width, _, height = text.partition("x")
    if text and not (width.isdigit() and height.isdigit()):
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 640x640")
    return (int(width), int(height)) if text else None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command("create")
def create(
    context: typer.Context,
    dataset: _Dataset,
    name: Annotated[
        str, typer.Option("--name", help="Name shown to people [default: the next V_n].")
    ] = "",
    split: _Split = "70/20/10",
    keep_split: _KeepSplit = False,
    group_by: _GroupBy = "looks",
    group_separator: _GroupSeparator = "",
    seed: _Seed = 0,
    max_side: _MaxSide = 0,
    size: _Size = "",
    stretch: _Stretch = False,
    grayscale: _Grayscale = False,
    augment: _Augment = "",
    detach: Annotated[
        bool, typer.Option("--detach", help="Don't wait for the preprocessing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be made, and make nothing.")
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            "--preview",
            metavar="FILE",
            help="Make nothing but an HTML page of images before and after.",
        ),
    ] = None,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Creates a version and waits until it is preprocessed, or shows what would be made."""
    options = RecipeOptions(
        split=_percent(split),
        keep_split=keep_split,
        group_by=group_by,
        group_separator=group_separator,
        seed=seed,
        max_side_px=max_side,
        exact_size=_size(size),
        stretch=stretch,
        grayscale=grayscale,
        augment=_names(augment),
    )
    s = session(context, json, project, address)
    found = s.client.datasets.find(dataset, s.project)
    if dry_run or preview:
        num_samples = _PREVIEW_SAMPLES if preview or s.json else 0
        seen = s.client.versions.preview(found.name, num_samples=num_samples, **options)
        if preview:
            preview.write_text(preview_page(found, seen), encoding="utf-8")
        if s.json:
            output.say_json(seen)
        else:
            _say_preview(seen)
        return
    version = s.client.versions.create(found.name, name=name, **options)
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


def _say_preview(seen: preprocess_pb2.PreviewVersionResponse) -> None:
    counts, leaks = seen.num_images, seen.leak_report
    output.say_fields(
        {
            "images": f"{counts.train}/{counts.val}/{counts.test} (train/val/test)",
            "copies": f"{leaks.num_augmented_copies} of those in train",
            "kept together": f"{leaks.num_grouped_images} images in {leaks.num_groups} groups",
            "leaks": f"{leaks.num_leaking_groups}",
        }
    )


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
    fields = {
        "version": version.name,
        "name": version.display_name,
        "state": _state(version),
        "dataset": version.dataset,
        "split": f"{recipe.split.train}/{recipe.split.val}/{recipe.split.test} %",
        "images": f"{_counts(version)} (train/val/test)",
        "recipe": ", ".join(describe_recipe(recipe)) or "images as they are",
        "classes": ", ".join(version.class_names) or "-",
        "training": version.training or "none yet",
    }
    if version.HasField("failure"):
        fields["failure"] = version.failure.status.message
    output.say_fields(fields)
