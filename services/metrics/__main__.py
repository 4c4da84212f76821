"""The metrics service: `python -m services.metrics`."""

from pathlib import Path

from detflow import server
from detflow.consumer import Consumer
from detflow.events import EVENTS_STREAM
from detflow.store import ObjectStore
from detflow.tasks import Bell
from detflow.v1 import events_pb2
from detflow.v1.analysis_pb2_grpc import add_AnalysisServiceServicer_to_server
from detflow.v1.comparison_pb2_grpc import add_ComparisonServiceServicer_to_server
from detflow.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from detflow.v1.metrics_pb2_grpc import add_MetricsServiceServicer_to_server
from detflow.v1.report_pb2_grpc import add_ReportServiceServicer_to_server
from services.metrics.analysis_service import AnalysisService
from services.metrics.bundle_images import BundleImages
from services.metrics.comparison_service import ComparisonService
from services.metrics.consumer import CONSUMER, SUBJECTS, TrainingEvents
from services.metrics.evaluator import Evaluator
from services.metrics.garbage import GarbageCollector
from services.metrics.gauges import QUERIES
from services.metrics.inference_service import InferenceService
from services.metrics.measured import MeasuredSplits
from services.metrics.pictures import Pictures
from services.metrics.prediction import wiring as prediction
from services.metrics.report_service import ReportService
from services.metrics.report_sources import ReportSources
from services.metrics.reports.renderer import Renderer
from services.metrics.service import MetricsService
from services.metrics.webhooks import wiring as webhooks

MIGRATIONS = Path(__file__).parent / "migrations"


def wire(service: server.Service) -> None:
    """Adds what the metrics service consists of."""
    applied, jobs = Bell(), Bell()
    consumer = Consumer(
        service.bus,
        service.db,
        name=CONSUMER,
        stream=EVENTS_STREAM,
        subjects=SUBJECTS,
        decode=events_pb2.Event.FromString,
        handle=TrainingEvents(applied, jobs).handle,
    )
    service.spawn(consumer.run(), "consumer")
    objects = ObjectStore(service.settings.store_url)
    evaluator = Evaluator(service.db, service.settings.store_url, jobs)
    service.spawn(evaluator.run(), "evaluator")
    service.spawn(GarbageCollector(service.db, objects).run(), "garbage")
    service.add(
        add_MetricsServiceServicer_to_server,
        MetricsService(service.db, service.bus, service.watcher, applied),
    )
    splits = MeasuredSplits(service.db, objects)
    service.add(add_AnalysisServiceServicer_to_server, AnalysisService(splits))
    comparisons = ComparisonService(service.db, splits)
    service.add(add_ComparisonServiceServicer_to_server, comparisons)
    pictures = Pictures(BundleImages(objects))
    service.add(add_InferenceServiceServicer_to_server, InferenceService(splits, pictures))
    sources = ReportSources(service.db, splits, pictures, service.settings)
    renderer = Renderer(service.settings.data_dir)
    service.add(
        add_ReportServiceServicer_to_server,
        ReportService(service.db, sources, comparisons, renderer),
    )
    service.figures(QUERIES)
    webhooks.wire(service)
    prediction.wire(service)


async def serve() -> None:
    """Runs the service until it is told to stop."""
    async with server.Service("metrics", migrations=MIGRATIONS) as service:
        wire(service)
        await service.serve()


def main() -> None:
    """Entry point of `detflow-metrics`."""
    server.run(serve)


if __name__ == "__main__":
    main()
