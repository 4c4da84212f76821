"""Metrics: series over the epochs, and evaluations of the best weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from detflow.client import cancelling
from detflow.client.columns import Columns, join
from detflow.client.connection import Connection
from detflow.errors import InvalidArgument
from detflow.v1 import analysis_pb2, analysis_pb2_grpc, metrics_pb2, metrics_pb2_grpc

EVALUATED_SPLITS = ("val", "test")
_ANALYSIS_SECONDS = 60.0
_COLUMNS_SECONDS = 60.0
_RESOLUTIONS: Mapping[str, metrics_pb2.Resolution.ValueType] = {
    "epoch": metrics_pb2.RESOLUTION_EPOCH,
    "step": metrics_pb2.RESOLUTION_STEP,
}


class Metrics:
    """Calls about what was measured."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = metrics_pb2_grpc.MetricsServiceStub(connection.channel("metrics"))
        self._analysis = analysis_pb2_grpc.AnalysisServiceStub(connection.channel("metrics"))

    def series(
        self,
        training: str,
        names: Sequence[str] = (),
        *,
        steps: bool = False,
        max_points: int = 0,
    ) -> Sequence[metrics_pb2.MetricSeries]:
        """Returns the series of a training, sorted by name; all of them unless named.

        Args:
            training: Resource name.
            names: Only these.
            steps: By step instead of by epoch.
            max_points: At most this many values of each: lowest and highest of equal stretches. 0
                means all by epoch, and 1000 by step.

        Raises:
            NotFound: There is no such training.
        """
        request = metrics_pb2.ListMetricSeriesRequest(
            training=training,
            names=names,
            resolution=metrics_pb2.RESOLUTION_STEP if steps else metrics_pb2.RESOLUTION_EPOCH,
            max_points=max_points,
        )
        return self._connection.call(self._stub.ListMetricSeries, request).series

    def columns(
        self,
        training: str,
        names: Sequence[str] = (),
        resolution: Literal["epoch", "step"] = "step",
    ) -> Mapping[str, Columns]:
        """Returns whole series, nothing thinned out; a million values take less than a second.

        Example:
            loss = client.metrics.columns(training.name, ["train/box_loss"])["train/box_loss"]
            plt.plot(numpy.asarray(loss.positions), numpy.asarray(loss.values))

        Args:
            training: Resource name.
            names: Only these; all of them unless named.
            resolution: epoch or step: one value for each.

        Raises:
            NotFound: There is no such training.
            InvalidArgument: There is no such resolution.
        """
        if resolution not in _RESOLUTIONS:
            raise InvalidArgument(
                f"resolution {resolution!r} must be {' or '.join(_RESOLUTIONS)}",
                reason="BAD_RESOLUTION",
            )
        request = metrics_pb2.ReadMetricColumnsRequest(
            training=training, names=names, resolution=_RESOLUTIONS[resolution]
        )
        with self._connection.translated():
            stream = self._stub.ReadMetricColumns(request, timeout=_COLUMNS_SECONDS)
            return join(cancelling.begun(stream))

    def evaluations(self, training: str) -> Sequence[metrics_pb2.Evaluation]:
        """Returns the evaluations of a training: validation, then test.

        Args:
            training: Resource name of the training.

        Raises:
            NotFound: There is no such training.
        """
        request = metrics_pb2.ListEvaluationsRequest(parent=training)
        return self._connection.call(self._stub.ListEvaluations, request).evaluations

    def watch(
        self, training: str, *, cursor: str = "", steps: bool = False
    ) -> Iterator[metrics_pb2.WatchMetricsResponse]:
        """Watches both: what there is, then every epoch and evaluation; with `steps` these too.

        Args:
            training: Resource name of the training.
            cursor: Of the last message seen, to go on after it; empty begins with what there is.
            steps: The values of steps as well.

        Raises:
            NotFound: There is no such training.
        """
        return self._connection.watch(
            self._stub.WatchMetrics,
            lambda at: metrics_pb2.WatchMetricsRequest(
                training=training, cursor=at, with_steps=steps
            ),
            cursor=cursor,
        )

    def evaluation(self, training: str, split: str) -> metrics_pb2.Evaluation:
        """Returns the evaluation of one split.

        Example:
            evaluation = client.metrics.evaluation(training.name, "val")
            print(f"mAP50 {evaluation.coco.map50:.3f} on {evaluation.num_images} images")
            for one in evaluation.classes:
                print(one.class_name, one.ap50)

        Args:
            training: Resource name.
            split: val or test.

        Raises:
            NotFound: There is no such training, or it is not evaluated yet.
            InvalidArgument: There is no such split.
        """
        request = metrics_pb2.GetEvaluationRequest(name=_evaluation(training, split))
        return self._connection.call(self._stub.GetEvaluation, request)

    def curves(
        self, training: str, split: str, classes: Sequence[str] = ()
    ) -> analysis_pb2.EvaluationCurves:
        """Returns precision by recall, what every confidence threshold gives, and calibration.

        Example:
            curves = client.metrics.curves(training.name, "val", classes=["*"])
            for curve in curves.confidence:
                best = curve.best_f1
                print(curve.class_name or "all", best.confidence_threshold, best.f1)

        Args:
            training: Resource name.
            split: val or test.
            classes: Names of classes that get curves of their own; "*" alone means all.

        Raises:
            NotFound: There is no such training or evaluation.
            InvalidArgument: There is no such split or class.
            FailedPrecondition: EVALUATION_FAILED, or NO_MATCHES: an earlier release measured it.
        """
        request = analysis_pb2.GetEvaluationCurvesRequest(
            name=_evaluation(training, split), class_names=classes
        )
        return self._connection.call(
            self._analysis.GetEvaluationCurves, request, seconds=_ANALYSIS_SECONDS
        )

    def analyze(
        self, training: str, split: str, threshold: float | None = None
    ) -> analysis_pb2.EvaluationAnalysis:
        """Returns what a confidence threshold makes of an evaluation: counts, confusion, errors.

        Example:
            analysis = client.metrics.analyze(training.name, "val", threshold=0.4)
            print(analysis.all.num_false_positives, "false positives")
            for cell in analysis.confusion:
                if cell.actual_class != cell.predicted_class:
                    actual = cell.actual_class or "background"
                    print(actual, "taken for", cell.predicted_class or "background", cell.count)

        Args:
            training: Resource name.
            split: val or test.
            threshold: Detections of at least this confidence count, 0..1; None means the one with
                the best F1.

        Raises:
            NotFound: There is no such training or evaluation.
            InvalidArgument: There is no such split, or the threshold is out of range.
            FailedPrecondition: EVALUATION_FAILED, or NO_MATCHES: an earlier release measured it.
        """
        request = analysis_pb2.AnalyzeEvaluationRequest(
            name=_evaluation(training, split), confidence_threshold=threshold
        )
        return self._connection.call(
            self._analysis.AnalyzeEvaluation, request, seconds=_ANALYSIS_SECONDS
        )


def _evaluation(training: str, split: str) -> str:
    if split not in EVALUATED_SPLITS:
        raise InvalidArgument(
            f"split {split!r} must be {' or '.join(EVALUATED_SPLITS)}", reason="BAD_SPLIT"
        )
    return f"{training}/evaluations/{split}"
