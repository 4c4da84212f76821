"""`detflow versions create`: by options, like another version, by a replay, or only to look at."""

from pathlib import Path
from typing import Annotated, cast

import typer

from detflow.cli import output
from detflow.cli.datasets import rate
from detflow.cli.preview_page import preview_page
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.cli.statistics import say_leaks
from detflow.cli.version_words import parse_labels, say_version
from detflow.client.recipes import CHOICES, GROUPS, RecipeOptions, make_recipe
from detflow.client.replays import Replay
from detflow.errors import FailedPrecondition, InvalidArgument
from detflow.v1 import common_pb2, version_pb2

_PREVIEW_SAMPLES = 6
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
    try:  # before anything is asked of the server
        make_recipe(**options)
    except InvalidArgument as error:
        raise typer.BadParameter(error.message) from error
    given = _given(context, options)
    if replay and (from_ or given):
        other = "--from" if from_ else f"--{_parameter(next(iter(given))).replace('_', '-')}"
        raise typer.BadParameter(f"--replay says what is to be done; leave out {other}")
    if not dataset and (replay or not from_):
        raise typer.BadParameter("name a --dataset, or a version to begin --from")
    labels = parse_labels(label or [])
    recorded = Replay.read(replay) if replay else None
    s = session(context, json, project, address)
    parent = s.client.versions.find(from_, s.project) if from_ else None
    found = s.client.datasets.find(dataset or (parent.dataset if parent else ""), s.project)
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
        say_version(version)
        if not detach and (found_leaks := s.client.versions.leaks(version.name).num_leaking_groups):
            output.say(
                f"images that belong together are in more than one split ({found_leaks} times): see"
                f" `detflow versions leaks {version.name}`"
            )
    if recorded and not detach:
        _say_whether_same(s, version, recorded)


def _given(context: typer.Context, options: RecipeOptions) -> RecipeOptions:
    """Returns those of the options that stand on the command line."""
    on_line = {
        option: value
        for option, value in options.items()
        if (source := context.get_parameter_source(_parameter(option))) and source.name != "DEFAULT"
    }
    return cast(RecipeOptions, on_line)


def _parameter(option: str) -> str:
    """Returns what an option of recipes is called on the command line."""
    return {"max_side_px": "max_side", "exact_size": "size"}.get(option, option)


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
