"""`detflow weights`: upload, list, delete."""

from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.datasets import rate
from detflow.cli.session import Address, Json, Project, session
from detflow.v1 import common_pb2, weights_pb2

app = typer.Typer(help="Files that trainings begin with.", rich_markup_mode=None)


@app.command("upload")
def upload(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Of torch.save or safetensors.")],
    name: Annotated[
        str, typer.Option("--name", help="Name shown to people [default: that of the file].")
    ] = "",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Uploads a weights file; one that holds anything but tensors is refused."""
    s = session(context, json, project, address)
    with s.bar() as bar:

        def show(progress: common_pb2.Progress) -> None:
            bar.update(progress.stage, progress.percent, rate(progress))

        weights = s.client.weights.upload(file, project=s.project, name=name, progress=show)
    if s.json:
        output.say_json(weights)
        return
    output.say(f"uploaded {output.printable(weights.display_name)}")
    _say_weights(weights)
    output.say(f"begin with them: `detflow train VERSION --warm-start {weights.name}`")


@app.command("list")
def list_(
    context: typer.Context, json: Json = False, project: Project = "", address: Address = ""
) -> None:
    """Lists the uploaded weights, newest first."""
    s = session(context, json, project, address)
    found = s.client.weights.list(s.project)
    if s.json:
        output.say_json({"weights": [output.as_dict(weights) for weights in found]})
        return
    output.say_table(
        ("NAME", "MODEL", "CLASSES", "PARAMETERS", "SIZE", "RESOURCE"),
        (
            (
                weights.display_name,
                weights.model or "-",
                f"{len(weights.class_names)}" if weights.class_names else "-",
                f"{weights.num_parameters / 1e6:.1f} M",
                output.size(weights.size_bytes),
                weights.name,
            )
            for weights in found
        ),
        empty=f"no weights in project {s.project}: upload some with `detflow weights upload FILE`",
    )


@app.command("delete")
def delete(
    context: typer.Context,
    weights: Annotated[str, typer.Argument(metavar="WEIGHTS", help="Name, id or resource name.")],
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Deletes uploaded weights; trainings that have begun keep what they took over."""
    s = session(context, json, project, address)
    found = s.client.weights.find(weights, s.project)
    s.client.weights.delete(found.name)
    if s.json:
        output.say_json({"name": found.name})
    else:
        output.say(f"deleted {output.printable(found.display_name)}")


def _say_weights(weights: weights_pb2.Weights) -> None:
    output.say_fields(
        {
            "weights": weights.name,
            "model": weights.model or "the file does not say",
            "classes": ", ".join(weights.class_names) or "the file does not say",
            "tensors": f"{weights.num_tensors} with {weights.num_parameters} numbers",
            "size": output.size(weights.size_bytes),
            "sha256": weights.sha256,
        }
    )
