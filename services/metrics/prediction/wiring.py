"""What predictions consist of, added to the metrics service."""

from __future__ import annotations

from detflow import channels, server
from detflow.scratch import Scratch
from detflow.v1.export_pb2_grpc import ExportServiceStub
from detflow.v1.prediction_pb2_grpc import add_PredictionServiceServicer_to_server
from detflow.v1.trainer_pb2_grpc import TrainerServiceStub
from detflow.v1.version_pb2_grpc import VersionServiceStub
from services.metrics.prediction.model_files import ModelFiles
from services.metrics.prediction.predictors import Predictors
from services.metrics.prediction.service import PredictionService


def wire(service: server.Service) -> None:
    """Adds the PredictionService and what works for it."""
    trainer = channels.channel(service.settings.trainer_address, service.settings)
    version = channels.channel(service.settings.version_address, service.settings)
    scratch = Scratch(service.settings.data_dir / "predictions")
    predictors = Predictors(service.store, service.settings, scratch.path)
    service.spawn(predictors.run(), "predictors")
    files = ModelFiles(
        TrainerServiceStub(trainer), ExportServiceStub(trainer), VersionServiceStub(version)
    )
    service.add(add_PredictionServiceServicer_to_server, PredictionService(files, predictors))

    async def close() -> None:
        await trainer.close(None)
        await version.close(None)
        scratch.close()

    service.on_drain(close)
