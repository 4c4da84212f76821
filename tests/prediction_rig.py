"""A running PredictionService, exports whose jobs the test does, and a model that tells colours."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import onnx
from onnx import TensorProto, helper

from detflow import channels
from detflow.errors import not_found
from detflow.interceptors import Boundary
from detflow.v1 import (
    prediction_pb2,
    prediction_pb2_grpc,
    trainer_pb2_grpc,
    training_pb2,
    version_pb2,
    version_pb2_grpc,
)
from services.metrics.prediction.model_files import ModelFiles
from services.metrics.prediction.predictors import Predictors
from services.metrics.prediction.service import PredictionService
from tests import export_rig

SIZE = 64
CLASS_NAMES = ("blue", "green", "red")
POINTS = ((16, 16), (48, 16), (16, 48), (48, 48))
"""x, y of what the model looks at, in pixels of its input: it says how red, green, blue it is."""
BOX_SIDE = 8

Message = prediction_pb2.PredictImagesRequest


def probe(size: int = SIZE) -> bytes:
    """An ONNX file that finds at each of `POINTS` three boxes, as confident as it is colourful."""
    red, green, blue = range(3)
    places = [(0, channel, y, x) for channel in (blue, green, red) for x, y in POINTS]
    boxes = [[float(x) for x, _ in POINTS], [float(y) for _, y in POINTS]]
    boxes += [[float(BOX_SIDE)] * len(POINTS)] * 2
    constants = [
        helper.make_tensor("places", TensorProto.INT64, (12, 4), np.array(places)),
        helper.make_tensor("boxes", TensorProto.FLOAT, (1, 4, 4), np.array(boxes)),
        helper.make_tensor("shape", TensorProto.INT64, (3,), (1, 3, 4)),
    ]
    graph = helper.make_graph(
        [
            helper.make_node("GatherND", ["images", "places"], ["seen"]),
            helper.make_node("Reshape", ["seen", "shape"], ["scores"]),
            helper.make_node("Concat", ["boxes", "scores"], ["predictions"], axis=1),
        ],
        "probe",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, "height", "width"))],
        [helper.make_tensor_value_info("predictions", TensorProto.FLOAT, (1, 7, 4))],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    about = {
        "model": "yolov8n",
        "class_names": json.dumps(CLASS_NAMES),
        "image_size_px": str(size),
        "stride": "32",
    }
    helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def messages(
    training: str, images: Iterable[bytes], *, chunk_bytes: int = 1 << 20, **header: Any
) -> list[Message]:
    """What is sent for images that are called 0, 1, ..."""
    sent = []
    for number, image in enumerate(images):
        sent.append(
            Message(
                header=prediction_pb2.PredictImageHeader(
                    **{"training": training, "file_name": f"{number}", **header}
                )
            )
        )
        for start in range(0, len(image), chunk_bytes):
            sent.append(Message(chunk=image[start : start + chunk_bytes]))
        sent.append(Message(size_bytes=len(image)))
    return sent


@dataclass
class Others(trainer_pb2_grpc.TrainerServiceServicer, version_pb2_grpc.VersionServiceServicer):
    """Stands for the trainings and versions that the test says there are."""

    trainings: dict[str, training_pb2.Training] = field(default_factory=dict)
    recipe: version_pb2.Recipe = field(default_factory=version_pb2.Recipe)

    async def GetTraining(self, request: Any, context: Any) -> training_pb2.Training:
        if request.name not in self.trainings:
            raise not_found(request.name)
        return self.trainings[request.name]

    async def GetVersion(self, request: Any, context: Any) -> version_pb2.Version:
        return version_pb2.Version(name=request.name, recipe=self.recipe)


@dataclass
class Rig:
    """What a test of predictions needs."""

    exports: export_rig.Rig
    others: Others
    predictors: Predictors
    service: PredictionService
    address: str
    stub: prediction_pb2_grpc.PredictionServiceAsyncStub

    async def training(self, training_id: str = "t1", *, has_weights: bool = True) -> str:
        """Makes a training that has ended; returns its name."""
        name = await self.exports.training(training_id, image_size=SIZE, has_weights=has_weights)
        training = training_pb2.Training(name=name, state=training_pb2.Training.STOPPED)
        training.hyperparameters["image_size"] = SIZE
        if has_weights:
            training.weights.sha256 = "0" * 64
            training.end_time.GetCurrentTime()
        self.others.trainings[name] = training
        return name

    async def ready(self, training_id: str = "t1") -> str:
        """Makes a training whose model is there, exported by its user."""
        name = await self.training(training_id)
        export = await self.exports.create(name, dynamic=True)
        (await self.exports.jobs.next()).succeed(self.exports.store, probe())
        await self.exports.until(export.name, export_rig.Export.SUCCEEDED)
        return name

    async def predict(
        self, training: str, image: bytes, **header: Any
    ) -> prediction_pb2.Prediction:
        """Predicts one image."""
        sent = messages(training, [image], **{"file_name": "a.jpg", **header})
        with channels.translate():
            return await self.stub.PredictImage(as_stream(map(_single, sent)))

    async def predict_all(
        self, sent: Sequence[Message]
    ) -> list[prediction_pb2.PredictImagesResponse]:
        """Sends messages and returns all answers."""
        with channels.translate():
            return [one async for one in self.stub.PredictImages(as_stream(sent))]


def _single(message: Message) -> prediction_pb2.PredictImageRequest:
    return prediction_pb2.PredictImageRequest.FromString(message.SerializeToString())


async def as_stream(sent: Iterable[Any]) -> AsyncIterator[Any]:
    """Sends messages one after the other."""
    for one in sent:
        yield one


@contextlib.asynccontextmanager
async def running(
    *, nats_url: str, database_url: str, folder: Path, **settings: Any
) -> AsyncIterator[Rig]:
    """Runs predictions, with the exports of a real trainer."""
    server = grpc.aio.server(interceptors=[Boundary()])
    others = Others()  # type: ignore[abstract]
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(others, server)
    version_pb2_grpc.add_VersionServiceServicer_to_server(others, server)
    scratch = folder / "predictions"
    scratch.mkdir()
    async with export_rig.running(
        nats_url=nats_url, database_url=database_url, folder=folder
    ) as exports:
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        predictors = Predictors(
            exports.store,
            dataclasses.replace(exports.settings, predict_threads=1, **settings),
            scratch,
        )
        async with channels.channel(address) as channel:
            files = ModelFiles(
                trainer_pb2_grpc.TrainerServiceStub(channel),
                exports.stub,
                version_pb2_grpc.VersionServiceStub(channel),
            )
            service = PredictionService(files, predictors)
            prediction_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
            await server.start()
            working = asyncio.create_task(predictors.run())
            try:
                stub = prediction_pb2_grpc.PredictionServiceStub(channel)
                yield Rig(exports, others, predictors, service, address, stub)
            finally:
                await server.stop(None)
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
