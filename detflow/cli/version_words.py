"""Versions in the words of the command line."""

import typer
from google.protobuf.timestamp_pb2 import Timestamp

from detflow.cli import output
from detflow.client.recipes import describe_recipe
from detflow.v1 import version_pb2


def parse_labels(texts: list[str]) -> dict[str, str | None]:
    """Reads KEY=VALUE, and KEY- for the removal of a label."""
    labels: dict[str, str | None] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals and not key.endswith("-"):
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE, such as site=hall-2")
        labels[key if equals else key.removesuffix("-")] = value if equals else None
    return labels


def state_of(version: version_pb2.Version) -> str:
    """Says where a version stands, and how long it stays in the trash."""
    state = version_pb2.Version.State.Name(version.state)
    if not version.HasField("delete_time"):
        return state
    return f"{state} (in the trash until {time_of(version.purge_time)})"


def time_of(time: Timestamp) -> str:
    """Says a time to the minute."""
    return f"{time.ToDatetime():%Y-%m-%d %H:%M} UTC"


def map50_of(version: version_pb2.Version) -> str:
    """Says the mAP50 of a version's model, if it has one."""
    return f"{version.metrics.map50:.3f}" if version.HasField("metrics") else "-"


def labels_of(version: version_pb2.Version) -> str:
    """Says the labels of a version."""
    return ", ".join(f"{key}={value}" for key, value in sorted(version.labels.items())) or "-"


def counts_of(version: version_pb2.Version) -> str:
    """Says how many images the splits of a version have."""
    if not version.HasField("num_images"):
        return "-"
    counts = version.num_images
    return f"{counts.train}/{counts.val}/{counts.test}"


def say_version(version: version_pb2.Version) -> None:
    """Prints what there is to say of a version."""
    recipe = version.recipe
    fields = {
        "version": version.name,
        "name": version.display_name,
        "state": state_of(version),
        "dataset": version.dataset,
        "split": f"{recipe.split.train}/{recipe.split.val}/{recipe.split.test} %",
        "images": f"{counts_of(version)} (train/val/test)",
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
        fields["labels"] = labels_of(version)
    if version.parent_version:
        fields["made after"] = version.parent_version
    if version.HasField("failure"):
        fields["failure"] = version.failure.status.message
    output.say_fields(fields)
