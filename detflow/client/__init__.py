"""The Python SDK: everything detflow does, as calls on the nouns a user knows.

Example:
    with detflow.Client() as client:
        dataset = client.datasets.import_("cells.zip", name="cells")
        version = client.versions.wait(client.versions.create(dataset.name).name)
        training = client.trainings.start(version.name, model="yolov8n", epochs=20)
        for message in client.trainings.watch(training.name):
            print(message)
        print(client.metrics.evaluations(training.name))
        export = client.exports.wait(client.exports.create(training.name, format="onnx").name)
        client.exports.download(export.name, "cells.onnx")

Every call raises the errors of `detflow.errors`. `detflow.AsyncClient` has the same calls for
asyncio.
"""

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from detflow.client.access import Access
from detflow.client.audit import Audit
from detflow.client.comparisons import Comparisons
from detflow.client.connection import DEFAULT_TIMEOUT_SECONDS, Connection
from detflow.client.datasets import Datasets
from detflow.client.exports import Exports
from detflow.client.hyperparameters import schema_of
from detflow.client.keys import Keys
from detflow.client.members import Members
from detflow.client.metrics import Metrics
from detflow.client.predictions import Predictions
from detflow.client.projects import Projects
from detflow.client.reports import Reports
from detflow.client.results import Results
from detflow.client.showing import Showable, Shown, shown
from detflow.client.trainings import Trainings
from detflow.client.versions import Versions
from detflow.client.webhooks import Webhooks
from detflow.client.weights import Weights
from detflow.v1 import inference_pb2, trainer_pb2, trainer_pb2_grpc

__all__ = ["Client"]

DEFAULT_ADDRESS = "127.0.0.1:7100"


class Client:
    """A connection to one detflow.

    Args:
        address: host:port of the gateway, with https:// before it where its services have TLS. They
            are expected on the four ports after it, unless DETFLOW_VERSION_ADDRESS,
            DETFLOW_PREPROCESS_ADDRESS, DETFLOW_TRAINER_ADDRESS or DETFLOW_METRICS_ADDRESS say
            otherwise.
        timeout: Seconds that a call may take; those that are known to take longer, such as an
            upload, have more. Watches go on as long as they are read.
        environ: Where those variables are read.
        token: API key, or another token, that says who is calling; None takes DETFLOW_TOKEN, or
            what is in the file that DETFLOW_TOKEN_FILE names, or the token of the `detflow up` that
            runs at this address on this machine. It is sent to another machine over TLS only,
            unless DETFLOW_INSECURE is 1.
        ca_file: PEM file with the authorities whose servers are trusted; "" takes
            DETFLOW_TLS_CA_FILE, or those that browsers trust.
        cert_file: PEM file with a certificate of one's own, where the services ask for one; ""
            takes DETFLOW_TLS_CERT_FILE.
        key_file: PEM file with its key; "" takes DETFLOW_TLS_KEY_FILE.

    Attributes:
        address: host:port of the gateway, as it was given.
        projects: Groups of datasets and versions.
        datasets: Labelled images.
        versions: Datasets frozen with a split and a recipe.
        trainings: Models being trained.
        exports: Trained models as files.
        weights: Files that trainings begin with.
        webhooks: Addresses that are told what happens to trainings.
        metrics: What was measured.
        predictions: Models tried on one's own images.
        comparisons: Trainings against each other.
        results: What was found in each image.
        reports: What was measured, as files.
        access: Who is calling.
        keys: Tokens for programs.
        members: People with a role.
        audit: Who changed what.

    Example:
        client = detflow.Client("gpu-server:7100", timeout=60)
        print([model.name for model in client.models()])

    Raises:
        InvalidArgument: The address is not host:port, the timeout is no time, the token cannot be
            one or would be sent without TLS to another machine, or a file of TLS is none.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        environ: Mapping[str, str] = os.environ,
        token: str | None = None,
        ca_file: str = "",
        cert_file: str = "",
        key_file: str = "",
    ) -> None:
        self._connection = Connection(
            address,
            environ,
            timeout,
            token=token,
            ca_file=ca_file,
            cert_file=cert_file,
            key_file=key_file,
        )
        self.address = address
        self.projects = Projects(self._connection)
        self.datasets = Datasets(self._connection)
        self.versions = Versions(self._connection)
        self.trainings = Trainings(self._connection)
        self.exports = Exports(self._connection)
        self.weights = Weights(self._connection)
        self.webhooks = Webhooks(self._connection)
        self.metrics = Metrics(self._connection)
        self.predictions = Predictions(self._connection)
        self.comparisons = Comparisons(self._connection)
        self.results = Results(self._connection)
        self.reports = Reports(self._connection)
        self.access = Access(self._connection)
        self.keys = Keys(self._connection)
        self.members = Members(self._connection)
        self.audit = Audit(self._connection)

    def models(self) -> Sequence[trainer_pb2.Model]:
        """Lists the models that can be trained."""
        stub = trainer_pb2_grpc.TrainerServiceStub(self._connection.channel("trainer"))
        return self._connection.call(stub.ListModels, trainer_pb2.ListModelsRequest()).models

    def hyperparameters(self, family: str = "") -> Sequence[trainer_pb2.Hyperparameter]:
        """Lists the advanced hyper-parameters: type, range, defaults and help.

        Args:
            family: Only those with an effect in this model family, with the ranges it allows; ""
                lists all, with the ranges of single families beside them.

        Raises:
            InvalidArgument: There is no such family.
        """
        stub = trainer_pb2_grpc.TrainerServiceStub(self._connection.channel("trainer"))
        request = trainer_pb2.GetHyperparameterSchemaRequest()
        schema = self._connection.call(stub.GetHyperparameterSchema, request).hyperparameters
        return schema_of(schema, family) if family else schema

    def show(self, message: Showable, *, max_side_px: int = 640) -> Shown:
        """Makes of an answer what a notebook draws, and `print` writes.

        Example:
            for result in client.results.list(training.name, error_kinds=["missed"]):
                display(client.show(result))

        Args:
            message: A Prediction (with its picture, if `drawn_side_px` was given), an
                InferenceResult (its image is fetched, with detections and ground truth), an
                Evaluation, a Training or a Version.
            max_side_px: Longest side of an image that is fetched.

        Raises:
            InvalidArgument: It is something else.
            DetflowError: As of `results.image`.
        """
        jpeg = b""
        if isinstance(message, inference_pb2.InferenceResult):
            jpeg = self.results.image(
                message.name, detections=True, truths=True, max_side_px=max_side_px
            )
        return shown(message, jpeg)

    def nouns(self) -> Mapping[str, object]:
        """Returns the attributes that have methods, by name."""
        return {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "address"
        }

    def close(self) -> None:
        """Closes the connection; running watches end."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
