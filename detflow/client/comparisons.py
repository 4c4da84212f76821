"""Comparisons: what makes one model better than another, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Sequence

from detflow.client.connection import Connection
from detflow.client.metrics import EVALUATED_SPLITS
from detflow.errors import InvalidArgument
from detflow.v1 import common_pb2, comparison_pb2, comparison_pb2_grpc

_SECONDS = 60.0


class Comparisons:
    """Calls about trainings that were measured on the same images."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = comparison_pb2_grpc.ComparisonServiceStub(connection.channel("metrics"))

    def compare(
        self,
        trainings: Sequence[str],
        split: str = "test",
        *,
        num_resamples: int = 0,
        confidence_level: float = 0.0,
        seed: int = 0,
    ) -> comparison_pb2.Comparison:
        """Compares trainings with the first of them, on the images of one split.

        Example:
            comparison = client.comparisons.compare([old.name, new.name])
            for delta in comparison.deltas:
                print(f"{delta.metric} {delta.delta:+.3f} [{delta.low:.3f}, {delta.high:.3f}]")
                if not delta.significant:
                    print("    no more than chance")

        Args:
            trainings: Resource names of 2 to 10 trainings of one project.
            split: "val" or "test".
            num_resamples: How often the images are drawn anew to find the intervals, at most
                10000; 0 means 1000.
            confidence_level: What share of the draws an interval holds; 0 means 0.95.
            seed: The same one gives the same intervals.

        Raises:
            FailedPrecondition: They were not measured on the same images and boxes, or by an
                earlier release; the message says what differs.
            NotFound: There is no such training, or it has not been measured on this split.
            InvalidArgument: Fewer than two trainings, one twice, or of several projects.
        """
        if split not in EVALUATED_SPLITS:
            raise InvalidArgument(
                f"split {split!r} must be {' or '.join(EVALUATED_SPLITS)}", reason="BAD_SPLIT"
            )
        request = comparison_pb2.CompareTrainingsRequest(
            parent=trainings[0].split("/versions/")[0] if trainings else "",
            trainings=trainings,
            split=common_pb2.Split.Value(f"SPLIT_{split.upper()}"),
            num_resamples=num_resamples,
            confidence_level=confidence_level,
            seed=seed,
        )
        return self._connection.call(self._stub.CompareTrainings, request, seconds=_SECONDS)
