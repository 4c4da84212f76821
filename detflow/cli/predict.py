"""`detflow predict`."""

import csv as csv_writer
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.client.saving import replacing
from detflow.errors import DetflowError, InvalidArgument, from_status
from detflow.image_headers import EXTENSIONS, extension_of
from detflow.v1 import common_pb2, prediction_pb2

_COLUMNS = (
    *("file", "width_px", "height_px", "class", "class_id", "confidence"),
    *("x1", "y1", "x2", "y2"),
)


def predict(
    context: typer.Context,
    training: Annotated[
        str,
        typer.Argument(
            metavar="TRAINING",
            help="Resource name, id, or the name of a version such as V_0 for its newest training.",
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Image files, or folders with images in them."),
    ],
    threshold: Annotated[
        float, typer.Option("--threshold", help="Least confidence.", min=0.0, max=1.0)
    ] = 0.25,
    iou: Annotated[
        float,
        typer.Option(
            "--iou",
            help="Of two boxes of a class that overlap more, the less confident one is dropped.",
            min=0.0,
            max=1.0,
        ),
    ] = 0.7,
    limit: Annotated[
        int, typer.Option("--limit", help="At most this many boxes in an image.", min=1, max=1000)
    ] = 300,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for pictures with the boxes; made if it is not there."
        ),
    ] = None,
    side: Annotated[
        int, typer.Option("--side", help="Longest side of those, in pixels.", min=32, max=4096)
    ] = 1920,
    csv: Annotated[bool, typer.Option("--csv", help="Print a line of CSV for each box.")] = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Tries a trained model on images: what is found, with class, confidence and box."""
    s = session(context, json, project, address)
    if s.json and csv:
        raise typer.BadParameter("choose one of --json and --csv")
    found = _find(images)
    if out is not None:
        _make_folder(out)
    said = _Said(s, out, csv=csv)
    name = s.client.trainings.find(training, s.project).name
    with output.Bar(silent=s.json or csv) as bar:

        def prepare(progress: common_pb2.Progress) -> None:
            bar.update("preparing the model", progress.percent, progress.stage)

        predictions = s.client.predictions.predict(
            name,
            [path for path, _ in found],
            confidence_threshold=threshold,
            nms_iou=iou,
            max_detections=limit,
            drawn_side_px=side if out else 0,
            progress=prepare,
        )
        for number, (prediction, (path, place)) in enumerate(
            zip(predictions, found, strict=True), 1
        ):
            said.say(bar, prediction, path, place)
            if sys.stdout.isatty():  # elsewhere the results themselves say so
                bar.update("predict", 100 * number / len(found), f"{number} / {len(found)} images")
    said.end()


class _Said:
    """What is printed and written of predictions, one after the other.

    Args:
        s: The session.
        out: Folder for pictures.
        csv: Print CSV.
    """

    def __init__(self, s: Session, out: Path | None, *, csv: bool) -> None:
        self._json = s.json
        self._out = out
        self._rows: Any = csv_writer.writer(sys.stdout) if csv else None
        self._kept: list[dict[str, Any]] = []
        self._written: set[Path] = set()
        self._num_images = self._num_boxes = self._num_failed = 0
        if self._rows is not None:
            self._rows.writerow(_COLUMNS)

    def say(
        self, bar: output.Bar, prediction: prediction_pb2.Prediction, path: Path, place: Path
    ) -> None:
        """Takes the next prediction.

        Args:
            bar: Where lines go.
            prediction: Of the image.
            path: The image.
            place: Where its picture goes in the folder of pictures.
        """
        self._num_images += 1
        self._num_boxes += len(prediction.detections)
        if prediction.HasField("failure"):
            self._num_failed += 1
            output.complain(f"{path}: {_why(prediction, path)}")
        picture = self._write(prediction, place)
        if self._json:
            prediction.drawn_image = b""
            self._kept.append(
                output.as_dict(prediction) | ({"picture": picture} if picture else {})
            )
        elif self._rows is not None:
            self._rows.writerows(_rows_of(prediction, path))
        elif not prediction.HasField("failure"):
            for line in _lines(prediction, path):
                bar.note(line)

    def end(self) -> None:
        """Prints what is said at the end.

        Raises:
            Exit: With 1: something failed.
        """
        if self._json:
            output.say_json({"predictions": self._kept})
        elif self._rows is None:
            text = f"{self._num_boxes} boxes in {self._num_images - self._num_failed} images"
            where = f"; pictures in {output.printable(str(self._out))}" if self._written else ""
            output.say(text + where)
        if self._num_failed:
            output.complain(f"{self._num_failed} of {self._num_images} images failed")
            raise typer.Exit(1)

    def _write(self, prediction: prediction_pb2.Prediction, place: Path) -> str:
        if self._out is None or not prediction.drawn_image:
            return ""
        path = self._out / place
        number = 1
        while path in self._written:
            number += 1
            path = (self._out / place).with_stem(f"{place.stem}-{number}")
        self._written.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(prediction.drawn_image)
        return str(path)


def _find(given: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Returns the images, those of folders by name, and where the picture of each belongs.

    Raises:
        InvalidArgument: NO_SUCH_FILE, NO_IMAGES.
    """
    found: list[tuple[Path, Path]] = []
    for path in given:
        if not path.exists():
            raise InvalidArgument(
                f"there is no {path}: give image files or folders", reason="NO_SUCH_FILE"
            )
        inside = [*_images_in(path)] if path.is_dir() else [path]
        if not inside:
            raise InvalidArgument(
                f"the folder {path} has no images ({', '.join(EXTENSIONS)})", reason="NO_IMAGES"
            )
        top = path if path.is_dir() else path.parent
        for image in inside:
            place = image.relative_to(top)
            is_jpeg = place.suffix.lower() in (".jpg", ".jpeg")
            found.append((image, place if is_jpeg else place.with_name(f"{place.name}.jpg")))
    return found


def _images_in(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if extension_of(name) in EXTENSIONS:
                yield Path(parent, name)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out {path} cannot be made ({error.strerror})") from error


def _why(prediction: prediction_pb2.Prediction, path: Path) -> str:
    error: DetflowError = from_status(prediction.failure.status)
    return error.message.removeprefix(f"{path}: ")


def _lines(prediction: prediction_pb2.Prediction, path: Path) -> Iterator[str]:
    latency = prediction.latency
    yield (
        f"{path}  {prediction.width_px}x{prediction.height_px}"
        f"  {len(prediction.detections)} found  {latency.total_seconds * 1000:.0f} ms"
    )
    width = max((len(one.class_name) for one in prediction.detections), default=0)
    for one in prediction.detections:
        box = " ".join(
            f"{value:8.1f}" for value in (one.box.x1, one.box.y1, one.box.x2, one.box.y2)
        )
        yield f"  {one.class_name:<{width}}  {one.confidence:.2f}  {box}"


def _rows_of(prediction: prediction_pb2.Prediction, path: Path) -> Iterator[Sequence[object]]:
    for one in prediction.detections:
        yield (
            *(path, prediction.width_px, prediction.height_px, one.class_name, one.class_id),
            f"{one.confidence:.4f}",
            *(f"{value:.2f}" for value in (one.box.x1, one.box.y1, one.box.x2, one.box.y2)),
        )
