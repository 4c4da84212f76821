"""Trainings: models learning from a version."""

import uuid
from collections.abc import Iterator, Mapping, Sequence

from google.protobuf.struct_pb2 import Struct

from detflow.client.connection import Connection, pages
from detflow.client.projects import DEFAULT_PROJECT
from detflow.client.versions import Versions
from detflow.errors import NotFound
from detflow.v1 import trainer_pb2, trainer_pb2_grpc, training_pb2

LIVE_STATES = (
    training_pb2.Training.QUEUED,
    training_pb2.Training.PROVISIONING,
    training_pb2.Training.RUNNING,
    training_pb2.Training.EVALUATING,
)
"""States of a training that has not come to an end."""

STOP_MODES = {
    "pause": training_pb2.STOP_MODE_PAUSE,
    "finish": training_pb2.STOP_MODE_FINISH,
    "discard": training_pb2.STOP_MODE_DISCARD,
}
"""Ways to stop: keep the checkpoint, measure what there is, give up."""


class Trainings:
    """Calls about trainings."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = trainer_pb2_grpc.TrainerServiceStub(connection.channel("trainer"))
        self._versions = Versions(connection)

    def start(
        self,
        version: str,
        *,
        model: str = "",
        batch_size: int | None = None,
        epochs: int | None = None,
        hyperparameters: Mapping[str, float | bool | str] | None = None,
    ) -> training_pb2.Training:
        """Starts a training of a READY version; it returns at once, in QUEUED.

        Args:
            version: Resource name of the version.
            model: Id of the model; by default yolov5s.
            batch_size: Images per step; by default 16.
            epochs: Passes over the training split; by default 200.
            hyperparameters: Advanced ones by name, see `Client.hyperparameters`.

        Raises:
            FailedPrecondition: The version is not ready.
            AlreadyExists: A training of this version runs; the message names it.
            InvalidArgument: A value is out of its range.
        """
        values = Struct()
        values.update(dict(hyperparameters or {}))
        training = training_pb2.Training(
            model=model, batch_size=batch_size, epochs=epochs, hyperparameters=values
        )
        return self._connection.call(
            self._stub.StartTraining,
            trainer_pb2.StartTrainingRequest(
                parent=version, training=training, request_id=str(uuid.uuid4())
            ),
        )

    def get(self, name: str) -> training_pb2.Training:
        """Gets a training by its resource name."""
        request = trainer_pb2.GetTrainingRequest(name=name)
        return self._connection.call(self._stub.GetTraining, request)

    def list(
        self, project: str = DEFAULT_PROJECT, *, version: str = ""
    ) -> Sequence[training_pb2.Training]:
        """Lists the trainings of a project, or of a version (resource name), newest first."""
        return [*self._iterate(version or f"projects/{project}/versions/-")]

    def find(self, text: str, project: str = DEFAULT_PROJECT) -> training_pb2.Training:
        """Gets a training by resource name or id, or the newest of a version by the version's name.

        Raises:
            NotFound: There is none.
        """
        if "/trainings/" in text:
            return self.get(text)
        try:
            version = self._versions.find(text, project)
        except NotFound:
            for training in self._iterate(f"projects/{project}/versions/-"):
                if training.name.endswith(f"/{text}"):
                    return training
        else:
            for training in self._iterate(version.name):
                return training
        raise NotFound(
            f"no training {text!r} in project {project}: see `detflow trainings list`",
            metadata={"training": text},
        )

    def stop(self, name: str, *, mode: str = "pause") -> training_pb2.Training:
        """Asks a training to stop.

        Args:
            name: Resource name.
            mode: One of `STOP_MODES`: "pause" (can be resumed), "finish" (after this epoch, and
                measured) or "discard".
        """
        request = trainer_pb2.StopTrainingRequest(name=name, mode=STOP_MODES[mode])
        return self._connection.call(self._stub.StopTraining, request)

    def resume(self, name: str) -> training_pb2.Training:
        """Queues a PAUSED or FAILED training again, from its last checkpoint."""
        request = trainer_pb2.ResumeTrainingRequest(name=name)
        return self._connection.call(self._stub.ResumeTraining, request)

    def watch(self, name: str, *, cursor: str = "") -> Iterator[trainer_pb2.WatchTrainingResponse]:
        """Watches a training: as it is, then states, progress, epochs and log lines, to its end."""
        return self._connection.watch(
            self._stub.WatchTraining,
            lambda at: trainer_pb2.WatchTrainingRequest(name=name, cursor=at),
            cursor=cursor,
        )

    def _iterate(self, parent: str) -> Iterator[training_pb2.Training]:
        def fetch(token: str) -> tuple[Sequence[training_pb2.Training], str]:
            request = trainer_pb2.ListTrainingsRequest(
                parent=parent, page_size=1000, page_token=token
            )
            response = self._connection.call(self._stub.ListTrainings, request)
            return response.trainings, response.next_page_token

        return pages(fetch)
