"""`detflow versions`: create, list, show, rename, label, delete, restore, replay."""

from pathlib import Path
from typing import Annotated, cast

import typer
from google.protobuf.timestamp_pb2 import Timestamp

from detflow.cli import output
from detflow.cli.datasets import rate
from detflow.cli.preview_page import preview_page
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.cli.statistics import say_leaks
from detflow.client.recipes import CHOICES, GROUPS, RecipeOptions, describe_recipe
from detflow.client.replays import Replay
from detflow.errors import FailedPrecondition
from detflow.v1 import common_pb2, version_pb2

app = typer.Typer(help="Datasets frozen with a split and a recipe.", rich_markup_mode=None)

_PREVIEW_SAMPLES = 6
_State = version_pb2.Version.State
_Name = Annotated[
    str, typer.Argument(metavar="VERSION", help="Name such as V_0, id, resource name.")
]
_Dataset = Annotated[
    str, typer.Option("--dataset", help="Name, id or resource name.", metavar="DATASET")
]
_OptionalDataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        help="Name, id or resource name; with --from by default the same.",
        metavar="DATASET",
    ),
]
_From = Annotated[
    str,
    typer.Option("--from", metavar="VERSION", help="Like this version, but for the options given."),
]
_Replay = Annotated[
    Path | None,
    typer.Option(
        "--replay",
        metavar="FILE",
        help="By the recipe in a file of `versions replay`; says whether the bundle is the same.",
    ),
]
_Label = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="A note; may be given several times."),
]
_Split = Annotated[
    str, typer.Option("--split", help="Percent of training, validation, test images.")
]
_KeepSplit = Annotated[
    bool,
    typer.Option("--keep-split/--no-keep-split", help="Keep the splits of the dataset's archive."),
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
    bool,
    typer.Option("--stretch/--no-stretch", help="Stretch to --size instead of adding a border."),
]
_Grayscale = Annotated[
    bool, typer.Option("--grayscale/--no-grayscale", help="Make every image gray.")
]
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
    dataset: _OptionalDataset = "",
    from_: _From = "",
    replay: _Replay = None,
    name: Annotated[
        str, typer.Option("--name", help="Name shown to people [default: the next V_n].")
    ] = "",
    label: _Label = None,
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
    given = _given(context, options)
    if replay and (from_ or given):
        other = "--from" if from_ else f"--{next(iter(given)).replace('_', '-')}"
        raise typer.BadParameter(f"--replay says what is to be done; leave out {other}")
    if not dataset and (replay or not from_):
        raise typer.BadParameter("name a --dataset, or a version to begin --from")
    labels = _labels(label or [])
    recorded = Replay.read(replay) if replay else None
    s = session(context, json, project, address)
    parent = s.client.versions.find(from_, s.project) if from_ else None
    found = s.client.datasets.find(dataset or parent.dataset if parent else dataset, s.project)
    base = parent.recipe if parent else recorded.recipe if recorded else None
    if base is not None:
        options = given
    if dry_run or preview:
        num_samples = _PREVIEW_SAMPLES if preview or s.json else 0
        seen = s.client.versions.preview(
            found.name, num_samples=num_samples, recipe=base, **options
        )
        if preview:
            preview.write_text(preview_page(found, seen), encoding="utf-8")
        if s.json:
            output.say_json(seen)
        else:
            counts = seen.num_images
            output.say(f"{counts.train}/{counts.val}/{counts.test} images (train/val/test)")
            say_leaks(seen.leak_report, found.class_names)
        return
    version = s.client.versions.create(
        found.name,
        name=name,
        labels={key: value for key, value in labels.items() if value is not None},
        parent=parent.name if parent else "",
        recipe=base,
        **options,
    )
    if not detach:
        with s.bar() as bar:

            def show(progress: common_pb2.Progress) -> None:
                bar.update(progress.stage, progress.percent, rate(progress))

            version = s.client.versions.wait(version.name, progress=show)
    if s.json:
        output.say_json(version)
    else:
        output.say(f"created {output.printable(version.display_name)}")
        _say_version(version)
    if recorded and not detach:
        _say_whether_same(s, version, recorded)


def _given(context: typer.Context, options: RecipeOptions) -> RecipeOptions:
    """Returns those of the options that stand on the command line."""
    parameters = {"max_side_px": "max_side", "exact_size": "size"}
    sources = {
        option: context.get_parameter_source(parameters.get(option, option)) for option in options
    }
    on_line = {
        option: value
        for option, value in options.items()
        if (source := sources[option]) and source.name != "DEFAULT"
    }
    return cast(RecipeOptions, on_line)


def _labels(texts: list[str]) -> dict[str, str | None]:
    """Reads KEY=VALUE, and KEY- for the removal of a label."""
    labels: dict[str, str | None] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals and not key.endswith("-"):
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE, such as site=hall-2")
        labels[key if equals else key.removesuffix("-")] = value if equals else None
    return labels


def _say_whether_same(s: Session, version: version_pb2.Version, recorded: Replay) -> None:
    """Compares a version with the one whose replay it was made by.

    Raises:
        FailedPrecondition: REPLAY_DIFFERS.
    """
    differences = recorded.differences(Replay.parse(s.client.versions.read_replay(version.name)))
    if differences:
        raise FailedPrecondition(
            f"{version.name} was made, but is not the version of the replay:"
            f" {'; '.join(differences)}",
            reason="REPLAY_DIFFERS",
        )
    if not s.json:
        output.say(f"the same bundle as in the replay: manifest {recorded.manifest_sha256}")


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
        ((v.display_name, _state(v), _counts(v), _map50(v), v.name) for v in versions),
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
    changes = _labels(labels)
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    labelled = s.client.versions.label(found.name, changes)
    if s.json:
        output.say_json(labelled)
    else:
        output.say_fields({"labels": _said_labels(labelled)})


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
            f" {_time(deleted.purge_time)}; take it out again with"
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
    if not version.HasField("delete_time"):
        return state
    return f"{state} (in the trash until {_time(version.purge_time)})"


def _time(time: Timestamp) -> str:
    return f"{time.ToDatetime():%Y-%m-%d %H:%M} UTC"


def _map50(version: version_pb2.Version) -> str:
    return f"{version.metrics.map50:.3f}" if version.HasField("metrics") else "-"


def _said_labels(version: version_pb2.Version) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(version.labels.items())) or "-"


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
    if version.HasField("metrics"):
        figures = version.metrics
        fields["figures"] = (
            f"mAP50 {figures.map50:.3f}, mAP50-95 {figures.map50_95:.3f}, precision"
            f" {figures.precision:.3f}, recall {figures.recall:.3f} (test)"
        )
    if version.labels:
        fields["labels"] = _said_labels(version)
    if version.parent_version:
        fields["made after"] = version.parent_version
    if version.HasField("failure"):
        fields["failure"] = version.failure.status.message
    output.say_fields(fields)
