"""What notebooks draw of answers."""

from html.parser import HTMLParser
from typing import cast

import pytest

from detflow import errors
from detflow.client.showing import Showable, shown
from detflow.v1 import (
    common_pb2,
    inference_pb2,
    metrics_pb2,
    prediction_pb2,
    training_pb2,
    version_pb2,
)

BAD = "<script>alert(1)</script>\"'&"


class Reader(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


DETECTION = inference_pb2.Detection(
    class_name=BAD, confidence=0.5, box=inference_pb2.PixelBox(x1=1, y1=2, x2=3, y2=4)
)
FAILURE = errors.failure(errors.InvalidArgument(BAD))


@pytest.mark.parametrize(
    "message",
    [
        prediction_pb2.Prediction(file_name=BAD, detections=[DETECTION], drawn_image=b"jpeg"),
        prediction_pb2.Prediction(file_name="a.jpg", failure=FAILURE),
        inference_pb2.InferenceResult(image_path=BAD, detections=[DETECTION]),
        metrics_pb2.Evaluation(
            split=common_pb2.SPLIT_VAL, classes=[metrics_pb2.ClassMetrics(class_name=BAD)]
        ),
        metrics_pb2.Evaluation(split=common_pb2.SPLIT_TEST, failure=FAILURE),
        training_pb2.Training(name="t", failure=FAILURE),
        version_pb2.Version(display_name=BAD, class_names=["cell"]),
    ],
    ids=lambda message: type(message).__name__,
)
def test_names_of_users_are_text_whatever_they_look_like(message: Showable) -> None:
    result = shown(message, b"jpeg")
    page = Reader(result._repr_html_())
    assert page.tags <= {"strong", "br", "img", "table", "tr", "th", "td"}
    assert BAD in page.texts and BAD in repr(result)
    for image in page.images:
        assert {*image} == {"alt", "src"} and image["alt"] == BAD


def test_prediction_is_shown_with_its_picture_and_detections() -> None:
    message = prediction_pb2.Prediction(
        file_name="a.jpg", width_px=64, height_px=32, detections=[DETECTION], drawn_image=b"jpeg"
    )
    page = Reader(shown(message)._repr_html_())
    assert [one["src"] for one in page.images] == ["data:image/jpeg;base64,anBlZw=="]
    assert {"64 x 32 px", "0.500", "1, 2, 3, 4"} <= {*page.texts}


def test_what_cannot_be_measured_is_a_dash() -> None:
    message = metrics_pb2.Evaluation(split=common_pb2.SPLIT_VAL, num_images=3)
    message.coco.map50 = -1.0
    result = shown(message)
    assert (result.title, result.facts["mAP50"]) == ("Evaluation on val", "-")


def test_other_answers_are_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="give a Prediction"):
        shown(cast(Showable, common_pb2.Progress()))
