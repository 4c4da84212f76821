"""The InferenceService servicer: images of a split, with what should be found and what was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import orjson
from google.api.httpbody_pb2 import HttpBody

from detflow import pagination
from detflow.errors import bad_field, not_found
from detflow.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from detflow.v1.analysis_pb2 import ERROR_KIND_MISSED, ERROR_KIND_UNSPECIFIED
from detflow.v1.common_pb2 import FileInfo
from services.metrics import results
from services.metrics.analysis_service import class_indexes, no_such_class
from services.metrics.domain import ErrorKind
from services.metrics.measured import Measured, MeasuredSplits
from services.metrics.pictures import Look, Pictures
from services.metrics.results import Filter, Outcomes
from services.metrics.thresholds import BACKGROUND

_Request = inference_pb2.ListInferenceResultsRequest
_Match = inference_pb2.Detection.Match
_SPLITS = {
    common_pb2.SPLIT_UNSPECIFIED: "val",
    common_pb2.SPLIT_VAL: "val",
    common_pb2.SPLIT_TEST: "test",
}
_SPLIT_VALUES = {"val": common_pb2.SPLIT_VAL, "test": common_pb2.SPLIT_TEST}
_PAGE_SIZE = 20
_MAX_PAGE_SIZE = 200
_MAX_PAGE_BOXES = 20_000  # about 2 MB: a message of gRPC may have 4
_CHUNK_BYTES = 1 << 20


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Answers from the matches of measured splits.

    Args:
        measured: Measured splits.
        pictures: Pictures of their images.
    """

    def __init__(self, measured: MeasuredSplits, pictures: Pictures) -> None:
        self._measured = measured
        self._pictures = pictures

    async def ListInferenceResults(
        self, request: _Request, context: Any
    ) -> inference_pb2.ListInferenceResultsResponse:
        """The images of a split that pass the filters, page by page."""
        measured = await self._measured.read(request.parent, _SPLITS[request.split])
        return await asyncio.to_thread(_list, measured, request)

    async def GetInferenceResult(
        self, request: inference_pb2.GetInferenceResultRequest, context: Any
    ) -> inference_pb2.InferenceResult:
        """One image."""
        measured, image = await self._find(request.name)
        threshold = _threshold(measured, request)

        def make() -> inference_pb2.InferenceResult:
            return to_result(measured, results.at_threshold(measured.matches, threshold), image)

        return await asyncio.to_thread(make)

    async def GetInferenceImage(
        self, request: inference_pb2.GetInferenceImageRequest, context: Any
    ) -> AsyncIterator[HttpBody]:
        """The picture of one image; what it is in the first chunk."""
        measured, image = await self._find(request.name)
        picture = await self._pictures.get(
            measured,
            image,
            Look(
                threshold=_threshold(measured, request),
                max_side_px=request.max_side_px,
                detections=request.draw_detections,
                ground_truths=request.draw_ground_truths,
                png=request.png,
            ),
        )
        first = HttpBody(content_type=picture.content_type, data=picture.data[:_CHUNK_BYTES])
        info = FileInfo(
            file_name=picture.file_name,
            size_bytes=len(picture.data),
            etag=picture.etag,
            inline=True,
        )
        first.extensions.add().Pack(info)
        yield first
        for start in range(_CHUNK_BYTES, len(picture.data), _CHUNK_BYTES):
            yield HttpBody(data=picture.data[start : start + _CHUNK_BYTES])

    async def _find(self, name: str) -> tuple[Measured, int]:
        """Finds the split of an image, and its position there."""
        training, last = name.rsplit("/inferenceResults/", 1)
        split, image_id = last.split("-")
        measured = await self._measured.read(training, split)
        image = results.find_image(measured.matches, int(image_id))
        if image is None:
            raise not_found(name)
        return measured, image


def _threshold(measured: Measured, request: Any) -> float:
    """Returns the threshold that a request asks for, or the one with the best F1."""
    stated = request.HasField("confidence_threshold")
    return measured.threshold(request.confidence_threshold if stated else None)


def _list(measured: Measured, request: _Request) -> inference_pb2.ListInferenceResultsResponse:
    matches, threshold = measured.matches, _threshold(measured, request)
    wanted = _filter(matches.class_names, request)
    worst_first = request.order_by != _Request.IMAGE
    query = _query(measured, wanted, threshold, worst_first)
    start = _start(request.page_token, query)
    outcomes = results.at_threshold(matches, threshold)
    chosen = results.choose(outcomes, wanted, worst_first=worst_first)
    if start and start >= len(chosen):
        raise pagination.bad_token()
    page = chosen[start : start + min(request.page_size or _PAGE_SIZE, _MAX_PAGE_SIZE)]
    num_boxes = np.cumsum(results.count_boxes(outcomes)[page])
    page = page[: max(1, np.searchsorted(num_boxes, _MAX_PAGE_BOXES, side="right"))]
    stop = start + len(page)
    return inference_pb2.ListInferenceResultsResponse(
        inference_results=[to_result(measured, outcomes, int(image)) for image in page],
        next_page_token=pagination.encode_token(query, stop) if stop < len(chosen) else "",
        total_size=len(chosen),
        confidence_threshold=threshold,
    )


def _query(measured: Measured, wanted: Filter, threshold: float, worst_first: bool) -> str:
    """Says what a page token belongs to: also to these matches, for another attempt has others."""
    evaluation = measured.evaluation
    parts = [
        evaluation.training,
        evaluation.split,
        evaluation.attempt,
        threshold,
        sorted(wanted.classes),
        sorted(wanted.error_kinds),
        wanted.cell,
        worst_first,
    ]
    return orjson.dumps(parts).decode()


def _start(token: str, query: str) -> int:
    key = pagination.decode_token(token, query, int)
    if key is None:
        return 0
    start = int(key[0])
    if len(key) != 1 or start <= 0:
        raise pagination.bad_token()
    return start


def _filter(class_names: Sequence[str], request: _Request) -> Filter:
    """Checks what a request filters by.

    Raises:
        InvalidArgument: UNKNOWN_CLASS or EMPTY_CELL.
    """
    cell: tuple[int, int] | None = None
    if request.HasField("confusion"):
        actual, predicted = request.confusion.actual_class, request.confusion.predicted_class
        if not actual and not predicted:
            raise bad_field(
                "confusion",
                "EMPTY_CELL",
                "background taken for background is not counted; name a class on one side at least",
            )
        cell = (
            _class_id(class_names, actual, "confusion.actual_class"),
            _class_id(class_names, predicted, "confusion.predicted_class"),
        )
    return Filter(
        classes=class_indexes(class_names, request.class_names),
        error_kinds=[ErrorKind(kind) for kind in request.error_kinds],
        cell=cell,
    )


def _class_id(class_names: Sequence[str], name: str, field: str) -> int:
    """Finds the class of a side of a cell; "" is the background."""
    if not name:
        return BACKGROUND
    try:
        return class_names.index(name)
    except ValueError:
        raise bad_field(field, "UNKNOWN_CLASS", no_such_class(class_names, name)) from None


def to_result(measured: Measured, outcomes: Outcomes, image: int) -> inference_pb2.InferenceResult:
    """Makes the message of one image.

    Args:
        measured: The split.
        outcomes: The split at a threshold.
        image: Position of the image.
    """
    matches, evaluation = measured.matches, measured.evaluation
    detections, truths = outcomes.detections(image), outcomes.truths(image)
    width, height = matches.size_I2[image].tolist()
    image_id = int(matches.id_I[image])
    return inference_pb2.InferenceResult(
        name=f"{evaluation.training}/inferenceResults/{evaluation.split}-{image_id}",
        split=_SPLIT_VALUES[evaluation.split],
        image_path=matches.paths[image],
        width_px=width,
        height_px=height,
        detections=_detections(outcomes, detections, int(truths.start)),
        ground_truths=_ground_truths(outcomes, truths, int(detections.start)),
        num_true_positives=int(np.count_nonzero(outcomes.right_N[detections])),
        num_false_positives=int(np.count_nonzero(outcomes.wrong_N[detections])),
        num_false_negatives=int(np.count_nonzero(outcomes.lost_M[truths])),
    )


def _detections(outcomes: Outcomes, part: slice, first_truth: int) -> list[inference_pb2.Detection]:
    matches = outcomes.matches
    rows = zip(
        matches.class_N[part].tolist(),
        matches.confidence_N[part].tolist(),
        matches.box_N4[part].tolist(),
        outcomes.right_N[part].tolist(),
        outcomes.wrong_N[part].tolist(),
        matches.error_N[part].tolist(),
        matches.iou_N[part].tolist(),
        matches.overlap_N[part].tolist(),
        strict=True,
    )
    return [
        inference_pb2.Detection(
            class_name=matches.class_names[class_id],
            class_id=class_id,
            confidence=confidence,
            box=_box(*corners),
            match=_match(right, wrong),
            error_kind=error,
            iou=iou,
            ground_truth=overlap - first_truth if overlap >= 0 else None,
        )
        for class_id, confidence, corners, right, wrong, error, iou, overlap in rows
    ]


def _ground_truths(
    outcomes: Outcomes, part: slice, first_detection: int
) -> list[inference_pb2.GroundTruth]:
    matches = outcomes.matches
    rows = zip(
        matches.class_M[part].tolist(),
        matches.box_M4[part].tolist(),
        matches.crowd_M[part].tolist(),
        outcomes.found_M[part].tolist(),
        matches.detection_M[part].tolist(),
        outcomes.missed_M[part].tolist(),
        strict=True,
    )
    return [
        inference_pb2.GroundTruth(
            class_name=matches.class_names[class_id],
            class_id=class_id,
            box=_box(*corners),
            crowd=crowd,
            found=found,
            detection=detection - first_detection if found else None,
            error_kind=ERROR_KIND_MISSED if missed else ERROR_KIND_UNSPECIFIED,
        )
        for class_id, corners, crowd, found, detection, missed in rows
    ]


def _match(right: bool, wrong: bool) -> inference_pb2.Detection.Match.ValueType:
    if right:
        return _Match.TRUE_POSITIVE
    return _Match.FALSE_POSITIVE if wrong else _Match.IGNORED


def _box(x1: float, y1: float, x2: float, y2: float) -> inference_pb2.PixelBox:
    return inference_pb2.PixelBox(x1=x1, y1=y1, x2=x2, y2=y2)
