"""Trainings: models learning from a version."""

import datetime
import uuid
from collections.abc import Iterator, Mapping, Sequence

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Struct

from detflow.client.connection import Connection, pages
from detflow.client.progress import TrainingProgress, shown
from detflow.client.projects import DEFAULT_PROJECT
from detflow.client.versions import Versions
from detflow.errors import InvalidArgument, NotFound, from_status
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

_CHECK_SECONDS = 600.0


class Trainings:
    """Calls about trainings."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = trainer_pb2_grpc.TrainerServiceStub(connection.channel("trainer"))
        self._versions = Versions(connection)

    def purge(
        self,
        project: str = DEFAULT_PROJECT,
        *,
        min_age: datetime.timedelta | None = None,
        validate_only: bool = False,
    ) -> Sequence[trainer_pb2.PurgedArtifacts]:
        """Deletes old checkpoints of trainings that were paused or have failed, and old exports.

        Args:
            project: Id of the project; "-" for all.
            min_age: How long ago they must have ended; by default as long as the server is set.
            validate_only: Only say what would be deleted.

        Raises:
            PermissionDenied: It takes ADMIN in the project.
        """
        request = trainer_pb2.PurgeArtifactsRequest(
            parent=f"projects/{project}", validate_only=validate_only
        )
        if min_age is not None:
            request.min_age.FromTimedelta(min_age)
        return self._connection.call(self._stub.PurgeArtifacts, request).artifacts

    def start(
        self,
        version: str,
        *,
        model: str = "",
        batch_size: int | None = None,
        epochs: int | None = None,
        hyperparameters: Mapping[str, float | bool | str] | None = None,
        priority: int = 0,
        warm_start: str = "",
        num_nodes: int = 0,
        num_devices: int = 0,
        validate_only: bool = False,
    ) -> training_pb2.Training:
        """Starts a training of a READY version; it returns at once, in QUEUED.

        Args:
            version: Resource name of the version.
            model: Id of the model; by default that of `warm_start` where it says so, else yolov5s.
            batch_size: Images per step; by default 16.
            epochs: Passes over the training split; by default 200.
            hyperparameters: Advanced ones by name, see `Client.hyperparameters`.
            priority: Among the trainings that wait, higher goes first; -100 to 100.
            warm_start: Weights to begin with instead of random ones: resource name of another
                training of the project, or of uploaded weights.
            num_nodes: Machines that train it together; 0 means 1.
            num_devices: GPUs (processes, without any) per machine; 0 means 1.
            validate_only: Only try it, on the real data, which takes up to minutes; nothing is
                queued, and `preflight` of the answer says what was found.

        Raises:
            FailedPrecondition: The version is not ready.
            AlreadyExists: A training of this version runs; the message names it.
            InvalidArgument: A value is out of its range.
        """
        values = Struct()
        values.update(dict(hyperparameters or {}))
        training = training_pb2.Training(
            model=model,
            batch_size=batch_size,
            epochs=epochs,
            hyperparameters=values,
            priority=priority,
        )
        if warm_start:
            training.warm_start.CopyFrom(_warm_start(warm_start))
        if num_nodes or num_devices:
            training.resources.num_nodes = num_nodes
            training.resources.num_devices_per_node = num_devices
        request = trainer_pb2.StartTrainingRequest(
            parent=version,
            training=training,
            request_id="" if validate_only else str(uuid.uuid4()),
            validate_only=validate_only,
        )
        seconds = _CHECK_SECONDS if validate_only else None
        return self._connection.call(self._stub.StartTraining, request, seconds=seconds)

    def wait(self, name: str, *, progress: TrainingProgress = None) -> training_pb2.Training:
        """Waits until a training has ended, and returns it: SUCCEEDED, STOPPED or PAUSED.

        Example:
            training = client.trainings.wait(training.name, progress=True)
            print(training.num_epochs_done, "epochs")

        Args:
            name: Resource name.
            progress: Called with every step's progress, at most ten times a second; True shows a
                bar.

        Raises:
            DetflowError: What it failed of.
            NotFound: There is no such training.
        """
        with shown(progress) as told:
            for message in self.watch(name):
                if message.HasField("progress") and told is not None:
                    told(message.progress)
        training = self.get(name)
        if training.state == training_pb2.Training.FAILED:
            raise from_status(training.failure.status)
        return training

    def update(self, name: str, *, priority: int) -> training_pb2.Training:
        """Changes the priority of a training that waits.

        Args:
            name: Resource name.
            priority: -100 to 100; higher goes first.

        Raises:
            FailedPrecondition: It waits no more.
            InvalidArgument: The priority is not in -100 to 100.
        """
        return self._connection.call(
            self._stub.UpdateTraining,
            trainer_pb2.UpdateTrainingRequest(
                training=training_pb2.Training(name=name, priority=priority),
                update_mask=FieldMask(paths=["priority"]),
            ),
        )

    def get(self, name: str) -> training_pb2.Training:
        """Gets a training by its resource name.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such training.
        """
        request = trainer_pb2.GetTrainingRequest(name=name)
        return self._connection.call(self._stub.GetTraining, request)

    def list(
        self, project: str = DEFAULT_PROJECT, *, version: str = ""
    ) -> Sequence[training_pb2.Training]:
        """Lists the trainings of a project, or of a version (resource name), newest first.

        Args:
            project: Id of the project.
            version: Resource name of a version; only its trainings.
        """
        return [*self._iterate(version or f"projects/{project}/versions/-")]

    def find(self, text: str, project: str = DEFAULT_PROJECT) -> training_pb2.Training:
        """Gets a training by resource name or id, or the newest of a version by its name.

        Args:
            text: What names it.
            project: Id of the project.

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

        Raises:
            FailedPrecondition: It has ended, or is being stopped more urgently.
            InvalidArgument: There is no such mode.
            NotFound: There is no such training.
        """
        if mode not in STOP_MODES:
            raise InvalidArgument(
                f"mode {mode!r} must be one of {', '.join(STOP_MODES)}", reason="UNKNOWN_VALUE"
            )
        request = trainer_pb2.StopTrainingRequest(name=name, mode=STOP_MODES[mode])
        return self._connection.call(self._stub.StopTraining, request)

    def resume(self, name: str) -> training_pb2.Training:
        """Queues a PAUSED or FAILED training again, from its last checkpoint.

        Args:
            name: Resource name.

        Raises:
            FailedPrecondition: It is neither PAUSED nor FAILED.
            NotFound: There is no such training.
        """
        request = trainer_pb2.ResumeTrainingRequest(name=name)
        return self._connection.call(self._stub.ResumeTraining, request)

    def watch(self, name: str, *, cursor: str = "") -> Iterator[trainer_pb2.WatchTrainingResponse]:
        """Watches a training: as it is, then states, progress, epochs and log lines, to its end.

        Args:
            name: Resource name.
            cursor: Of the last message seen, to go on after it; empty begins with what there is.

        Raises:
            NotFound: There is no such training.
        """
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


def _warm_start(name: str) -> training_pb2.WarmStart:
    parts = name.split("/")
    if len(parts) == 4 and parts[2] == "weights":
        return training_pb2.WarmStart(weights=name)
    if len(parts) == 6 and parts[4] == "trainings":
        return training_pb2.WarmStart(training=name)
    raise InvalidArgument(
        f"warm_start {name!r} must be the resource name of a training or of uploaded weights",
        reason="BAD_NAME",
    )
