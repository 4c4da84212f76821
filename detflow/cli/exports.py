"""`detflow export` and `detflow exports`: trained models as files."""

from pathlib import Path
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.datasets import rate
from detflow.cli.files import check_out
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.client.exports import FORMATS, PRECISIONS
from detflow.errors import DetflowError
from detflow.v1 import common_pb2, export_pb2

app = typer.Typer(help="Trained models as files.", rich_markup_mode=None)

_Export = export_pb2.Export
_Resource = Annotated[
    str, typer.Argument(metavar="EXPORT", help="Resource name, see `detflow exports list`.")
]
_Training = Annotated[
    str,
    typer.Argument(
        metavar="TRAINING",
        help="Resource name, id, or the name of a version such as V_0 for its newest training.",
    ),
]
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


def export(
    context: typer.Context,
    training: _Training,
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")],
    out: _Out = Path(),
    precision: Annotated[
        str, typer.Option("--precision", help=f"{', '.join(PRECISIONS)}; int8 for openvino.")
    ] = "fp32",
    image_size: Annotated[
        int, typer.Option("--image-size", help="Side of the input in pixels; 0: as trained.", min=0)
    ] = 0,
    batch: Annotated[int, typer.Option("--batch", help="Images per call.", min=1)] = 1,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Let batch size, height and width vary.")
    ] = False,
    simplify: Annotated[
        bool, typer.Option("--simplify", help="Fold constants, remove what is redundant; onnx.")
    ] = False,
    opset: Annotated[
        int, typer.Option("--opset", help="ONNX operator set; 0 means 17.", min=0)
    ] = 0,
    end_to_end: Annotated[
        bool,
        typer.Option("--end-to-end", help="Answer detections: with non-maximum suppression; onnx."),
    ] = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Makes a file of a trained model that other programs run, and downloads it."""
    for option, text, choices in (
        ("--format", format, FORMATS),
        ("--precision", precision, PRECISIONS),
    ):
        if text not in choices:
            raise typer.BadParameter(f"{option} must be one of {', '.join(choices)}, not {text!r}")
    check_out(out)
    s = session(context, json, project, address)
    made = s.client.exports.create(
        s.client.trainings.find(training, s.project).name,
        format=format,
        precision=precision,
        image_size_px=image_size,
        batch_size=batch if batch > 1 else 0,
        dynamic=dynamic,
        simplify=simplify,
        opset=opset,
        end_to_end=end_to_end,
    )
    try:
        with s.bar() as bar:

            def show(progress: common_pb2.Progress) -> None:
                bar.update(progress.stage, progress.percent, _details(progress))

            made = s.client.exports.wait(made.name, progress=show)
    except KeyboardInterrupt:
        _cancel(s, made.name)
        raise
    _download(s, made, out)


@app.command("list")
def list_(
    context: typer.Context,
    training: _Training,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists the exports of a training, newest first."""
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    exports = s.client.exports.list(name)
    if s.json:
        output.say_json({"exports": [output.as_dict(one) for one in exports]})
        return
    output.say_table(
        ("FORMAT", "PRECISION", "INPUT", "STATE", "SIZE", "DIFFERS BY", "RESOURCE"),
        (
            (
                _Export.Format.Name(one.format),
                _Export.Precision.Name(one.precision),
                _input(one),
                _Export.State.Name(one.state),
                output.size(one.object.size_bytes) if one.HasField("object") else "-",
                _difference(one) if one.HasField("object") else "-",
                one.name,
            )
            for one in exports
        ),
        empty=f"no exports: make one with `detflow export {training} --format onnx`",
    )


@app.command("download")
def download(
    context: typer.Context,
    export: _Resource,
    out: _Out = Path(),
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Downloads the file of a finished export and checks it."""
    check_out(out)
    s = session(context, json, project, address)
    _download(s, s.client.exports.get(export), out)


@app.command("delete")
def delete(
    context: typer.Context,
    export: _Resource,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Deletes an export and its file; cancels it first if it is not finished."""
    s = session(context, json, project, address)
    s.client.exports.delete(export)
    if s.json:
        output.say_json({"name": export})
    else:
        output.say(f"deleted {output.printable(export)}")


def _cancel(s: Session, name: str) -> None:
    try:
        s.client.exports.cancel(name)
    except DetflowError as error:
        output.complain(f"the export goes on ({error.message}): `detflow exports delete {name}`")
    else:
        output.complain(f"cancelled {name}")


def _download(s: Session, export: export_pb2.Export, out: Path) -> None:
    with s.bar() as bar:

        def show(progress: common_pb2.Progress) -> None:
            bar.update(progress.stage, progress.percent, _details(progress))

        path = s.client.exports.download(export.name, out, progress=show)
    if s.json:
        output.say_json(export)
        return
    output.say(f"wrote {output.printable(str(path))} ({output.size(export.object.size_bytes)})")
    output.say_fields(
        {
            "input": _input(export),
            "differs by": f"{_difference(export)} from the trained model, at most",
            "sha256": export.object.sha256,
            "export": export.name,
        }
    )


def _details(progress: common_pb2.Progress) -> str:
    return rate(progress) if progress.num_total else ""


def _input(export: export_pb2.Export) -> str:
    side = f"{export.image_size_px} px" if export.image_size_px else "as trained"
    return f"{export.batch_size or 1} x {side}{', dynamic' if export.dynamic else ''}"


def _difference(export: export_pb2.Export) -> str:
    return (
        f"{export.max_box_difference_px:.2g} px, {export.max_confidence_difference:.2g} confidence"
    )
