"""Inference results: what a model found in each image, and the images themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from detflow.client.connection import Connection, pages
from detflow.client.saving import replacing
from detflow.errors import InvalidArgument
from detflow.v1 import analysis_pb2, common_pb2, inference_pb2, inference_pb2_grpc

Value = TypeVar("Value")

SPLITS: Mapping[str, common_pb2.Split.ValueType] = {
    "val": common_pb2.SPLIT_VAL,
    "test": common_pb2.SPLIT_TEST,
}
"""Splits that have results."""

ERROR_KINDS: Mapping[str, analysis_pb2.ErrorKind.ValueType] = {
    "class": analysis_pb2.ERROR_KIND_CLASS,
    "localization": analysis_pb2.ERROR_KIND_LOCALIZATION,
    "both": analysis_pb2.ERROR_KIND_BOTH,
    "duplicate": analysis_pb2.ERROR_KIND_DUPLICATE,
    "background": analysis_pb2.ERROR_KIND_BACKGROUND,
    "missed": analysis_pb2.ERROR_KIND_MISSED,
}
"""What can be wrong."""

ORDERS: Mapping[str, inference_pb2.ListInferenceResultsRequest.Order.ValueType] = {
    "worst": inference_pb2.ListInferenceResultsRequest.WORST,
    "image": inference_pb2.ListInferenceResultsRequest.IMAGE,
}
"""What can come first."""

_IMAGE_SECONDS = 300.0  # the first one of a shard in a bucket takes as long as reading the shard
_LIST_SECONDS = 60.0
_MAX_PAGE_SIZE = 200


class Results:
    """Calls about inference results."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = inference_pb2_grpc.InferenceServiceStub(connection.channel("metrics"))

    def list(
        self,
        training: str,
        split: str = "val",
        *,
        threshold: float | None = None,
        classes: Sequence[str] = (),
        error_kinds: Sequence[str] = (),
        confused: tuple[str, str] | None = None,
        order: str = "worst",
    ) -> Iterator[inference_pb2.InferenceResult]:
        """Yields the images of a split with what was found in them; of several filters all hold.

        Example:
            for result in client.results.list(training.name, error_kinds=["missed"]):
                print(result.image_path, result.num_false_negatives)
                client.results.save_image(result.name, "missed/", detections=True, truths=True)

        Args:
            training: Resource name of the training.
            split: val or test.
            threshold: Detections of at least this confidence count, 0..1; None means the one with
                the best F1.
            classes: Only images with a box or a detection of one of these classes.
            error_kinds: Only images with one of these errors: class, localization, both, duplicate,
                background, missed.
            confused: Only images behind this cell of the confusion matrix: class of the box, class
                of the detection; "" is the background.
            order: worst (most errors first) or image (as in the split).

        Raises:
            NotFound: There is no such training, or it is not evaluated yet.
            InvalidArgument: There is no such split, class, kind or order.
            FailedPrecondition: EVALUATION_FAILED, or NO_MATCHES: an earlier release measured it.
        """

        def fetch(token: str) -> tuple[Sequence[inference_pb2.InferenceResult], str]:
            page = self.page(
                training,
                split,
                threshold=threshold,
                classes=classes,
                error_kinds=error_kinds,
                confused=confused,
                order=order,
                size=_MAX_PAGE_SIZE,
                token=token,
            )
            return page.inference_results, page.next_page_token

        return pages(fetch)

    def page(
        self,
        training: str,
        split: str = "val",
        *,
        threshold: float | None = None,
        classes: Sequence[str] = (),
        error_kinds: Sequence[str] = (),
        confused: tuple[str, str] | None = None,
        order: str = "worst",
        size: int = 20,
        token: str = "",
    ) -> inference_pb2.ListInferenceResultsResponse:
        """Returns one page of `list`, with how many images there are and the threshold applied.

        Args:
            training: As in `list`, and so the others.
            split: As in `list`.
            threshold: As in `list`.
            classes: As in `list`.
            error_kinds: As in `list`.
            confused: As in `list`.
            order: As in `list`.
            size: Images of the page, at most 200.
            token: `next_page_token` of the page before.

        Raises:
            DetflowError: As in `list`.
        """
        request = inference_pb2.ListInferenceResultsRequest(
            parent=training,
            split=_value(SPLITS, "split", split),
            confidence_threshold=threshold,
            class_names=classes,
            error_kinds=[_value(ERROR_KINDS, "error_kinds", kind) for kind in error_kinds],
            order_by=_value(ORDERS, "order", order),
            page_size=size,
            page_token=token,
        )
        if confused is not None:
            request.confusion.actual_class, request.confusion.predicted_class = confused
            request.confusion.SetInParent()
        return self._connection.call(
            self._stub.ListInferenceResults, request, seconds=_LIST_SECONDS
        )

    def get(self, name: str, *, threshold: float | None = None) -> inference_pb2.InferenceResult:
        """Returns one image's result.

        Args:
            name: Resource name of the result.
            threshold: As in `list`.

        Raises:
            NotFound: There is none.
        """
        request = inference_pb2.GetInferenceResultRequest(name=name, confidence_threshold=threshold)
        return self._connection.call(self._stub.GetInferenceResult, request)

    def image(
        self,
        name: str,
        *,
        detections: bool = False,
        truths: bool = False,
        threshold: float | None = None,
        max_side_px: int = 0,
        png: bool = False,
    ) -> bytes:
        """Returns the image of a result: a JPEG, as the model saw it, unless asked otherwise.

        Args:
            name: Resource name of the result.
            detections: Draw what was found, with class and confidence.
            truths: Draw the ground truth.
            threshold: As in `list`.
            max_side_px: Longest side, at most 4096; larger images are made smaller. 0 keeps them.
            png: PNG instead.

        Raises:
            NotFound: There is no such result.
            DataLoss: The image is gone from the object store, or damaged.
        """
        request = inference_pb2.GetInferenceImageRequest(
            name=name,
            max_side_px=max_side_px,
            draw_detections=detections,
            draw_ground_truths=truths,
            confidence_threshold=threshold,
            png=png,
        )
        parts = self._connection.download(
            self._stub.GetInferenceImage, request, seconds=_IMAGE_SECONDS
        )
        return b"".join(parts)

    def save_image(
        self,
        name: str,
        path: Path | str,
        *,
        detections: bool = False,
        truths: bool = False,
        threshold: float | None = None,
        max_side_px: int = 0,
    ) -> Path:
        """Writes the image of a result to a file, as PNG if its name says so, else as JPEG.

        Args:
            name: Resource name of the result.
            path: File, or folder for one named after the result, such as val-12.jpg.
            detections: As in `image`, and so the others.
            truths: As in `image`.
            threshold: As in `image`.
            max_side_px: As in `image`.

        Returns:
            The file.

        Raises:
            InvalidArgument: UNWRITABLE_FILE.
            DetflowError: As in `image`.
        """
        path = Path(path)
        if path.is_dir():
            path /= f"{name.rsplit('/', 1)[-1]}.jpg"
        data = self.image(
            name,
            detections=detections,
            truths=truths,
            threshold=threshold,
            max_side_px=max_side_px,
            png=path.suffix.lower() == ".png",
        )
        with replacing(path) as file:
            file.write(data)
        return path


def _value(values: Mapping[str, Value], field: str, word: str) -> Value:
    if word not in values:
        raise InvalidArgument(
            f"{field}: {word!r} must be one of {', '.join(values)}", reason="BAD_CHOICE"
        )
    return values[word]
