"""`detflow results`: what a model found in each image, and pictures of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.client.results import ERROR_KINDS, ORDERS, SPLITS
from detflow.v1 import inference_pb2

_Result = inference_pb2.InferenceResult
_KIND_WORDS = {kind: word for word, kind in ERROR_KINDS.items()}
_MAX_LIMIT = 200


def results(
    context: typer.Context,
    training: Annotated[
        str,
        typer.Argument(
            metavar="TRAINING",
            help="Resource name, id, or the name of a version such as V_0 for its newest training.",
        ),
    ],
    split: Annotated[str, typer.Option("--split", help="val or test.")] = "val",
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="T",
            help="Detections of at least this confidence count, 0 to 1 [default: best F1].",
            min=0.0,
            max=1.0,
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="NAME",
            help="Only images with a box or a detection of this class; may be repeated.",
        ),
    ] = None,
    error: Annotated[
        list[str] | None,
        typer.Option(
            "--error",
            metavar="KIND",
            help=f"Only images with this error: {', '.join(ERROR_KINDS)}; may be repeated.",
        ),
    ] = None,
    confused: Annotated[
        str,
        typer.Option(
            "--confused",
            metavar="ACTUAL:PREDICTED",
            help="Only images where one class was taken for another; an empty side is the"
            " background: 'cell:' not found, ':cell' on nothing.",
        ),
    ] = "",
    order: Annotated[
        str, typer.Option("--order", help=f"What comes first: {' or '.join(ORDERS)}.")
    ] = "worst",
    limit: Annotated[
        int, typer.Option("--limit", help="At most this many images.", min=1, max=_MAX_LIMIT)
    ] = 20,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="DIR",
            help="Write a picture of each, with what was found and what should be.",
        ),
    ] = None,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows what a training's model found, image by image, the worst first."""
    _check("--split", split, SPLITS)
    _check("--order", order, ORDERS)
    for kind in error or ():
        _check("--error", kind, ERROR_KINDS)
    cell = _cell(confused)
    if save is not None:
        _make_folder(save)
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    page = _collect(
        s,
        name,
        limit,
        split=split,
        threshold=threshold,
        classes=classes or (),
        error_kinds=error or (),
        confused=cell,
        order=order,
    )
    saved = _save(s, page, save) if save is not None else []
    if s.json:
        document: dict[str, Any] = output.as_dict(page)
        if save is not None:
            document["saved"] = [str(path) for path in saved]
        output.say_json(document)
        return
    _say(page, split)
    if save is not None and saved:
        output.say(f"wrote {len(saved)} pictures into {output.printable(str(save))}")


def _check(option: str, word: str, choices: Any) -> None:
    if word not in choices:
        raise typer.BadParameter(f"{option} must be one of {', '.join(choices)}, not {word!r}")


def _cell(text: str) -> tuple[str, str] | None:
    if not text:
        return None
    actual, colon, predicted = text.partition(":")
    if not colon or not (actual or predicted):
        raise typer.BadParameter(
            f"--confused must be ACTUAL:PREDICTED with a class on one side at least, not {text!r}"
        )
    return actual, predicted


def _collect(
    s: Session, name: str, limit: int, **filters: Any
) -> inference_pb2.ListInferenceResultsResponse:
    """Asks for pages until there are enough images: those with many boxes come in smaller pages."""
    found = s.client.results.page(name, size=limit, **filters)
    while found.next_page_token and len(found.inference_results) < limit:
        size = limit - len(found.inference_results)
        more = s.client.results.page(name, size=size, token=found.next_page_token, **filters)
        found.inference_results.extend(more.inference_results)
        found.next_page_token = more.next_page_token
    return found


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--save {folder}: {error.strerror}; name a folder") from error


def _save(
    s: Session, page: inference_pb2.ListInferenceResultsResponse, folder: Path
) -> Sequence[Path]:
    saved = []
    with s.bar() as bar:
        for result in page.inference_results:
            saved.append(
                s.client.results.save_image(
                    result.name,
                    folder,
                    detections=True,
                    truths=True,
                    threshold=page.confidence_threshold,
                )
            )
            num_all = len(page.inference_results)
            bar.update("save", 100 * len(saved) / num_all, f"{len(saved)}/{num_all} pictures")
    return saved


def _say(page: inference_pb2.ListInferenceResultsResponse, split: str) -> None:
    output.say_table(
        ("IMAGE", "RIGHT", "WRONG", "NOT FOUND", "WORST ERROR", "RESULT"),
        (
            (
                result.image_path,
                f"{result.num_true_positives}",
                f"{result.num_false_positives}",
                f"{result.num_false_negatives}",
                worst_error(result),
                result.name.rsplit("/", 1)[-1],
            )
            for result in page.inference_results
        ),
        empty=f"no {split} images pass these filters",
    )
    output.say()
    output.say(
        f"{len(page.inference_results)} of {page.total_size} images; detections count from"
        f" confidence {page.confidence_threshold:.3g} on"
    )


def worst_error(result: _Result) -> str:
    """Says what the most confident wrong detection is, or else what was not found."""
    for one in result.detections:
        if one.match != inference_pb2.Detection.FALSE_POSITIVE:
            continue
        text = f"{_KIND_WORDS.get(one.error_kind, 'wrong')}: {one.class_name} {one.confidence:.2f}"
        if one.HasField("ground_truth"):
            actual = result.ground_truths[one.ground_truth].class_name
            if actual != one.class_name:
                text += f" on {actual}"
        return text
    for box in result.ground_truths:
        if not box.found and not box.crowd:
            return f"missed: {box.class_name}"
    return "-"
