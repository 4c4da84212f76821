"""What a request that breaks a rule of its proto is told."""

import pytest
from google.protobuf.message import Message

from detflow.errors import InvalidArgument
from detflow.interceptors import check
from detflow.v1 import common_pb2, inference_pb2, report_pb2, webhook_pb2

Listing = inference_pb2.ListInferenceResultsRequest
Create = webhook_pb2.CreateWebhookRequest
UNSPECIFIED = webhook_pb2.Webhook.EVENT_TYPE_UNSPECIFIED
TRAINING = "projects/p/versions/v/trainings/t"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Listing(parent=TRAINING, split=common_pb2.SPLIT_TRAIN),
            "split: must be one of SPLIT_UNSPECIFIED, SPLIT_VAL, SPLIT_TEST",
        ),
        (
            Listing(parent=TRAINING, order_by=9),  # type: ignore[arg-type]
            "order_by: must be one of ORDER_UNSPECIFIED, WORST, IMAGE",
        ),
        (
            Create(
                parent="projects/p",
                webhook=webhook_pb2.Webhook(event_types=[UNSPECIFIED]),
            ),
            "webhook.event_types[0]: must be one of TRAINING_COMPLETED, TRAINING_FAILED,"
            " TRAINING_STOPPED",
        ),
        (
            report_pb2.DownloadReportRequest(training=TRAINING, language="de"),
            "language: must be one of nothing, en, ko",
        ),
        (
            Listing(parent=TRAINING, page_size=-1),
            "page_size: must be greater than or equal to 0",
        ),
    ],
)
def test_broken_rule_names_the_field_and_what_it_may_be(request_: Message, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(request_)
    assert caught.value.message == message
