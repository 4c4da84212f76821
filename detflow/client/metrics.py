"""Metrics: series over the epochs, and evaluations of the best weights."""

from collections.abc import Iterator, Sequence

from detflow.client.connection import Connection
from detflow.v1 import metrics_pb2, metrics_pb2_grpc


class Metrics:
    """Calls about what was measured."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = metrics_pb2_grpc.MetricsServiceStub(connection.channel("metrics"))

    def series(
        self, training: str, names: Sequence[str] = ()
    ) -> Sequence[metrics_pb2.MetricSeries]:
        """Returns the series of a training, sorted by name; all of them unless named."""
        request = metrics_pb2.ListMetricSeriesRequest(training=training, names=names)
        return self._connection.call(self._stub.ListMetricSeries, request).series

    def evaluations(self, training: str) -> Sequence[metrics_pb2.Evaluation]:
        """Returns the evaluations of a training: validation, then test."""
        request = metrics_pb2.ListEvaluationsRequest(parent=training)
        return self._connection.call(self._stub.ListEvaluations, request).evaluations

    def watch(
        self, training: str, *, cursor: str = ""
    ) -> Iterator[metrics_pb2.WatchMetricsResponse]:
        """Watches both: what there is, then every epoch and evaluation."""
        return self._connection.watch(
            self._stub.WatchMetrics,
            lambda at: metrics_pb2.WatchMetricsRequest(training=training, cursor=at),
            cursor=cursor,
        )
