"""A detflow whose answers the test writes down, for the SDK and the command line."""

import contextlib
import hashlib
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.struct_pb2 import Value
from grpc_status import rpc_status

from detflow import errors
from detflow.v1 import (
    analysis_pb2,
    analysis_pb2_grpc,
    common_pb2,
    comparison_pb2,
    comparison_pb2_grpc,
    export_pb2,
    export_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    training_pb2,
    version_pb2,
    version_pb2_grpc,
    weights_pb2,
    weights_pb2_grpc,
)

Context = Any
VERSION = "projects/default/versions/v"
TRAINING = f"{VERSION}/trainings/t"
WEIGHTS = "projects/default/weights/w"
MIB = 1 << 20
FILE = bytes(range(256)) * 10_000
"""The exported file."""

_State = training_pb2.Training.State
_Export = export_pb2.Export


def fail(context: Context, error: errors.DetflowError) -> None:
    context.abort_with_status(rpc_status.to_status(errors.to_status(error)))


class Versions(version_pb2_grpc.VersionServiceServicer):
    """Has one version, V_0."""

    def ListVersions(self, request: Any, context: Context) -> Any:
        return version_pb2.ListVersionsResponse(
            versions=[version_pb2.Version(name=VERSION, display_name="V_0")]
        )

    def GetVersion(self, request: Any, context: Context) -> Any:
        return version_pb2.Version(name=request.name, display_name="V_0")


@dataclass
class Metrics(
    metrics_pb2_grpc.MetricsServiceServicer,
    analysis_pb2_grpc.AnalysisServiceServicer,
    comparison_pb2_grpc.ComparisonServiceServicer,
    inference_pb2_grpc.InferenceServiceServicer,
):
    """Has measured what it is told; remembers what it was asked."""

    evaluations: list[metrics_pb2.Evaluation] = field(default_factory=list)
    series: list[metrics_pb2.MetricSeries] = field(default_factory=list)
    step_series: list[metrics_pb2.MetricSeries] = field(default_factory=list)
    watched: list[metrics_pb2.WatchMetricsResponse] = field(default_factory=list)
    curves: analysis_pb2.EvaluationCurves = field(default_factory=analysis_pb2.EvaluationCurves)
    analysis: analysis_pb2.EvaluationAnalysis = field(
        default_factory=analysis_pb2.EvaluationAnalysis
    )
    comparison: comparison_pb2.Comparison = field(default_factory=comparison_pb2.Comparison)
    results: list[inference_pb2.InferenceResult] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)

    def ListInferenceResults(self, request: Any, context: Context) -> Any:
        self.asked.append(request)
        start = int(request.page_token or 0)
        stop = start + min(request.page_size or 20, 2)
        return inference_pb2.ListInferenceResultsResponse(
            inference_results=self.results[start:stop],
            next_page_token=f"{stop}" if stop < len(self.results) else "",
            total_size=len(self.results),
            confidence_threshold=0.25,
        )

    def GetInferenceResult(self, request: Any, context: Context) -> Any:
        self.asked.append(request)
        return next(one for one in self.results if one.name == request.name)

    def GetInferenceImage(self, request: Any, context: Context) -> Iterator[Any]:
        self.asked.append(request)
        yield HttpBody(content_type="image/jpeg", data=request.name.encode())
        yield HttpBody(data=b" with boxes" if request.draw_detections else b"")

    def ListEvaluations(self, request: Any, context: Context) -> Any:
        return metrics_pb2.ListEvaluationsResponse(evaluations=self.evaluations)

    def ListMetricSeries(self, request: Any, context: Context) -> Any:
        self.asked.append(request)
        by_step = request.resolution == metrics_pb2.RESOLUTION_STEP
        series = self.step_series if by_step else self.series
        return metrics_pb2.ListMetricSeriesResponse(
            series=[one for one in series if not request.names or one.name in request.names]
        )

    def ReadMetricColumns(self, request: Any, context: Context) -> Iterator[Any]:
        for one in self.step_series:
            numbers = range(len(one.values))
            yield metrics_pb2.MetricColumns(
                name=one.name,
                num_points=len(one.values),
                epochs=b"".join(struct.pack("<i", 1) for _ in numbers),
                steps=b"".join(struct.pack("<i", number + 1) for number in numbers),
                positions=b"".join(struct.pack("<d", position) for position in one.positions),
                values=b"".join(struct.pack("<d", value) for value in one.values),
            )

    def WatchMetrics(self, request: Any, context: Context) -> Iterator[Any]:
        self.asked.append(request)
        yield from self.watched

    def GetEvaluationCurves(self, request: Any, context: Context) -> Any:
        self.asked.append(request)
        return self.curves

    def AnalyzeEvaluation(self, request: Any, context: Context) -> Any:
        self.asked.append(request)
        return self.analysis

    def CompareTrainings(self, request: Any, context: Context) -> Any:
        self.asked.append(request)
        return self.comparison


@dataclass
class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers with what it was asked for, and remembers it."""

    started: list[Any] = field(default_factory=list)
    updated: list[Any] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    trainings: list[training_pb2.Training] = field(default_factory=list)
    watched: list[trainer_pb2.WatchTrainingResponse] = field(default_factory=list)
    refusal: errors.DetflowError | None = None
    preflight: training_pb2.Preflight = field(default_factory=training_pb2.Preflight)

    def StartTraining(self, request: Any, context: Context) -> Any:
        self.started.append(request)
        self.deadlines.append(context.time_remaining())
        if self.refusal is not None:
            fail(context, self.refusal)
        training = training_pb2.Training()
        training.CopyFrom(request.training)
        if request.validate_only:
            training.preflight.CopyFrom(self.preflight)
        else:
            training.name = f"{request.parent}/trainings/t"
            training.state = _State.QUEUED
        return training

    def UpdateTraining(self, request: Any, context: Context) -> Any:
        self.updated.append(request)
        training = training_pb2.Training(queue_position=1, state=_State.QUEUED)
        training.MergeFrom(request.training)
        return training

    def GetTraining(self, request: Any, context: Context) -> Any:
        for training in self.trainings:
            if training.name == request.name:
                return training
        fail(context, errors.not_found(request.name))

    def ListTrainings(self, request: Any, context: Context) -> Any:
        return trainer_pb2.ListTrainingsResponse(trainings=self.trainings)

    def WatchTraining(self, request: Any, context: Context) -> Iterator[Any]:
        yield from self.watched

    def ListModels(self, request: Any, context: Context) -> Any:
        model = trainer_pb2.Model(
            name="models/efficientdet-d0",
            display_name="EfficientDet D0",
            family="efficientdet",
            input_size_px=512,
            num_parameters=3_880_000,
            licence="Apache-2.0",
        )
        return trainer_pb2.ListModelsResponse(models=[model])

    def GetHyperparameterSchema(self, request: Any, context: Context) -> Any:
        return trainer_pb2.GetHyperparameterSchemaResponse(hyperparameters=SCHEMA)


_Entry = trainer_pb2.Hyperparameter


def _defaults(**by_family: float | bool | str) -> dict[str, Value]:
    def value(one: float | bool | str) -> Value:
        if isinstance(one, bool):
            return Value(bool_value=one)
        return Value(string_value=one) if isinstance(one, str) else Value(number_value=one)

    return {family: value(one) for family, one in by_family.items()}


SCHEMA = [
    _Entry(
        name="image_size",
        type=_Entry.INTEGER,
        minimum=32,
        maximum=2048,
        multiple_of=32,
        defaults=_defaults(yolov8=640, efficientdet=512),
        families=["yolov8", "efficientdet"],
        family_ranges={
            "efficientdet": trainer_pb2.HyperparameterRange(
                minimum=128, maximum=1536, multiple_of=128
            )
        },
        help_en="Side of the square.",
        help_ko="정사각형의 한 변.",
    ),
    _Entry(
        name="dfl",
        type=_Entry.NUMBER,
        minimum=0,
        maximum=100,
        defaults=_defaults(yolov8=1.5),
        families=["yolov8"],
        help_en="Gain of the DFL loss.",
        help_ko="DFL 손실의 가중치.",
    ),
    _Entry(
        name="optimizer",
        type=_Entry.CHOICE,
        choices=["SGD", "AdamW"],
        defaults=_defaults(yolov8="SGD", efficientdet="AdamW"),
        families=["yolov8", "efficientdet"],
        help_en="How weights are updated.",
        help_ko="가중치를 갱신하는 방법.",
    ),
    _Entry(
        name="cos_lr",
        type=_Entry.BOOLEAN,
        defaults=_defaults(yolov8=False, efficientdet=False),
        families=["yolov8", "efficientdet"],
        help_en="Cosine.",
        help_ko="코사인.",
    ),
]


@dataclass
class Exports(export_pb2_grpc.ExportServiceServicer):
    """Keeps exports; `outcome` is how a watched one ends."""

    kept: dict[str, export_pb2.Export] = field(default_factory=dict)
    created: list[Any] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    was_cancelled: threading.Event = field(default_factory=threading.Event)
    outcome: int = _Export.SUCCEEDED
    sent: bytes = FILE
    on_watch: Any = None
    """Called in the middle of a watch."""

    def CreateExport(self, request: Any, context: Context) -> Any:
        self.created.append(request)
        export = export_pb2.Export()
        export.CopyFrom(request.export)
        export.name = f"{request.parent}/exports/e{len(self.kept)}"
        export.state = _Export.QUEUED
        export.file_name = "yolov8n-t.onnx"
        self.kept[export.name] = export
        return export

    def GetExport(self, request: Any, context: Context) -> Any:
        return self.kept[request.name]

    def ListExports(self, request: Any, context: Context) -> Any:
        # A page holds one, so that the client has to turn pages.
        names = sorted(self.kept, reverse=True)
        at = int(request.page_token or 0)
        return export_pb2.ListExportsResponse(
            exports=[self.kept[name] for name in names[at : at + 1]],
            next_page_token=str(at + 1) if at + 1 < len(names) else "",
        )

    def WatchExport(self, request: Any, context: Context) -> Iterator[Any]:
        export = self.kept[request.name]
        yield export_pb2.WatchExportResponse(cursor="1", export=export)
        progress = common_pb2.Progress(stage="convert", percent=40)
        yield export_pb2.WatchExportResponse(cursor="1", progress=progress)
        if self.on_watch is not None:
            self.on_watch()
        self.finish(export)
        yield export_pb2.WatchExportResponse(cursor="2", export=export)

    def finish(self, export: export_pb2.Export) -> None:
        export.state = self.outcome  # type: ignore[assignment]
        if self.outcome == _Export.FAILED:
            error = errors.FailedPrecondition("differs by 3 px", reason="EXPORT_DIFFERS")
            export.failure.CopyFrom(errors.failure(error))
        elif self.outcome == _Export.SUCCEEDED:
            export.object.size_bytes = len(FILE)
            export.object.sha256 = hashlib.sha256(FILE).hexdigest()
            export.max_box_difference_px = 0.0001

    def CancelExport(self, request: Any, context: Context) -> Any:
        self.cancelled.append(request.name)
        self.was_cancelled.set()
        self.kept[request.name].state = _Export.CANCELLED
        return self.kept[request.name]

    def DeleteExport(self, request: Any, context: Context) -> Any:
        if request.name not in self.kept:
            fail(context, errors.not_found(request.name))
        del self.kept[request.name]
        return export_pb2.DeleteExportResponse()

    def DownloadExport(self, request: Any, context: Context) -> Iterator[Any]:
        for start in range(0, len(self.sent), MIB):
            yield HttpBody(data=self.sent[start : start + MIB])


@dataclass
class Weights(weights_pb2_grpc.WeightsServiceServicer):
    """Keeps what is uploaded."""

    kept: dict[str, weights_pb2.Weights] = field(default_factory=dict)
    refusal: errors.DetflowError | None = None

    def UploadWeights(self, parts: Any, context: Context) -> Any:
        first, *rest = parts
        *chunks, last = rest
        data = b"".join(part.chunk for part in chunks)
        assert last.size_bytes == len(data)
        if self.refusal is not None:
            fail(context, self.refusal)
        weights = weights_pb2.Weights(
            name=f"{first.header.parent}/weights/w{len(self.kept) or ''}",
            display_name=first.header.display_name,
            model="yolov8n",
            num_tensors=3,
            num_parameters=1000,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        self.kept[weights.name] = weights
        return weights

    def GetWeights(self, request: Any, context: Context) -> Any:
        return self.kept[request.name]

    def ListWeights(self, request: Any, context: Context) -> Any:
        names = sorted(self.kept, reverse=True)
        return weights_pb2.ListWeightsResponse(weights=[self.kept[name] for name in names])

    def DeleteWeights(self, request: Any, context: Context) -> Any:
        del self.kept[request.name]
        return weights_pb2.DeleteWeightsResponse()


@dataclass
class Surface:
    """The fakes behind one address.

    Attributes:
        environ: Variables that lead a client to it.
    """

    trainer: Trainer
    exports: Exports
    weights: Weights
    metrics: Metrics
    environ: dict[str, str]


@contextlib.contextmanager
def serving() -> Iterator[Surface]:
    """Serves the fakes on a free port."""
    pool = ThreadPoolExecutor(8)
    server = grpc.server(pool)
    trainer = Trainer()  # type: ignore[abstract]
    exports = Exports()
    weights = Weights()
    metrics = Metrics()  # type: ignore[abstract]
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(trainer, server)
    export_pb2_grpc.add_ExportServiceServicer_to_server(exports, server)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(weights, server)
    version_pb2_grpc.add_VersionServiceServicer_to_server(Versions(), server)  # type: ignore[abstract]
    metrics_pb2_grpc.add_MetricsServiceServicer_to_server(metrics, server)
    analysis_pb2_grpc.add_AnalysisServiceServicer_to_server(metrics, server)
    comparison_pb2_grpc.add_ComparisonServiceServicer_to_server(metrics, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(metrics, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    names = ("VERSION", "PREPROCESS", "TRAINER", "METRICS")
    try:
        yield Surface(
            trainer,
            exports,
            weights,
            metrics,
            {f"DETFLOW_{name}_ADDRESS": address for name in names},
        )
    finally:
        server.stop(None).wait()
        pool.shutdown()
