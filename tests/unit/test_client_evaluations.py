"""What the client asks about evaluations."""

from collections.abc import Iterator

import pytest

from detflow import errors
from detflow.client import Client
from tests.surface_rig import TRAINING, Surface, serving


@pytest.fixture
def fakes() -> Iterator[Surface]:
    with serving() as fakes:
        yield fakes


def test_analysis_has_the_threshold_that_was_given_or_none(fakes: Surface) -> None:
    with Client("127.0.0.1:1", environ=fakes.environ) as client:
        client.metrics.analyze(TRAINING, "val", threshold=0.0)
        client.metrics.analyze(TRAINING, "test")
        client.metrics.curves(TRAINING, "test", classes=["cell"])
    zero, best, curves = fakes.metrics.asked
    assert zero.name == f"{TRAINING}/evaluations/val"
    assert zero.HasField("confidence_threshold") and zero.confidence_threshold == 0
    assert best.name == f"{TRAINING}/evaluations/test"
    assert not best.HasField("confidence_threshold")
    assert curves.class_names == ["cell"]


def test_split_that_is_not_measured_is_refused_before_the_call(fakes: Surface) -> None:
    with Client("127.0.0.1:1", environ=fakes.environ) as client:
        for call in (client.metrics.evaluation, client.metrics.analyze, client.metrics.curves):
            with pytest.raises(errors.InvalidArgument, match="'train' must be val or test"):
                call(TRAINING, "train")
    assert fakes.metrics.asked == []
