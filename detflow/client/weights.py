"""Weights: files that trainings begin with instead of random numbers."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from detflow.client.connection import Connection, pages
from detflow.client.progress import Progress, shown
from detflow.client.projects import DEFAULT_PROJECT
from detflow.client.upload import upload
from detflow.errors import InvalidArgument, NotFound
from detflow.names import MAX_NAME_LENGTH, check_display_name
from detflow.uploads import MAX_WEIGHTS_BYTES, weights_too_large
from detflow.v1 import weights_pb2, weights_pb2_grpc


class Weights:
    """Calls about uploaded weights."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = weights_pb2_grpc.WeightsServiceStub(connection.channel("trainer"))

    def upload(
        self,
        source: str | os.PathLike[str],
        *,
        project: str = DEFAULT_PROJECT,
        name: str = "",
        progress: Progress = None,
    ) -> weights_pb2.Weights:
        """Uploads a weights file, of torch.save or safetensors.

        Args:
            source: Path.
            project: Id of the project.
            name: Name shown to people; by default that of the file.
            progress: Called in stage "upload", with bytes; True shows a bar.

        Raises:
            InvalidArgument: There is no such file, or it holds anything but tensors.
            ResourceExhausted: WEIGHTS_LIMIT, it is larger than 2 GiB.
        """
        with _opened(source) as file:
            return self._upload(file, source, project, name, progress)

    def ensure(
        self,
        source: str | os.PathLike[str],
        *,
        project: str = DEFAULT_PROJECT,
        progress: Progress = None,
    ) -> weights_pb2.Weights:
        """Uploads a weights file unless the project has one with the same bytes.

        Args:
            source: Path.
            project: Id of the project.
            progress: Called in stage "upload", with bytes; True shows a bar.

        Raises:
            DetflowError: As of `upload`.
        """
        with _opened(source) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            for weights in self._iterate(project):
                if weights.sha256 == sha256:
                    return weights
            return self._upload(file, source, project, "", progress)

    def get(self, name: str) -> weights_pb2.Weights:
        """Gets the description of weights by their resource name.

        Args:
            name: Resource name.

        Raises:
            NotFound: There are no such weights.
        """
        request = weights_pb2.GetWeightsRequest(name=name)
        return self._connection.call(self._stub.GetWeights, request)

    def list(self, project: str = DEFAULT_PROJECT) -> Sequence[weights_pb2.Weights]:
        """Lists a project's uploaded weights, newest first.

        Args:
            project: Id of the project.
        """
        return [*self._iterate(project)]

    def find(self, text: str, project: str = DEFAULT_PROJECT) -> weights_pb2.Weights:
        """Gets weights by resource name, id or display name; the newest if several have it.

        Args:
            text: What names it.
            project: Id of the project.

        Raises:
            NotFound: There are none.
        """
        if text.startswith("projects/"):
            return self.get(text)
        for weights in self._iterate(project):
            if text in (weights.display_name, weights.name.rsplit("/", 1)[-1]):
                return weights
        raise NotFound(
            f"no weights {text!r} in project {project}: see `detflow weights list`",
            metadata={"weights": text},
        )

    def delete(self, name: str) -> None:
        """Deletes uploaded weights; trainings that have begun keep what they took over.

        Args:
            name: Resource name.

        Raises:
            NotFound: There are no such weights.
        """
        request = weights_pb2.DeleteWeightsRequest(name=name)
        self._connection.call(self._stub.DeleteWeights, request)

    def _upload(
        self,
        file: BinaryIO,
        source: str | os.PathLike[str],
        project: str,
        name: str,
        progress: Progress,
    ) -> weights_pb2.Weights:
        name = name or Path(source).name[:MAX_NAME_LENGTH]
        check_display_name(name, "name")  # not only after a long upload
        header = weights_pb2.UploadWeightsHeader(parent=f"projects/{project}", display_name=name)
        with shown(progress) as told:
            return upload(
                self._connection,
                self._stub.UploadWeights,
                file,
                opening=weights_pb2.UploadWeightsRequest(header=header),
                chunk=lambda data: weights_pb2.UploadWeightsRequest(chunk=data),
                ending=lambda size: weights_pb2.UploadWeightsRequest(size_bytes=size),
                noun="weights file",
                progress=told,
            )

    def _iterate(self, project: str) -> Iterator[weights_pb2.Weights]:
        def fetch(token: str) -> tuple[Sequence[weights_pb2.Weights], str]:
            request = weights_pb2.ListWeightsRequest(
                parent=f"projects/{project}", page_size=1000, page_token=token
            )
            response = self._connection.call(self._stub.ListWeights, request)
            return response.weights, response.next_page_token

        return pages(fetch)


def _opened(source: str | os.PathLike[str]) -> BufferedReader:
    try:
        file = open(source, "rb")
    except OSError as error:
        raise InvalidArgument(
            f"cannot read {os.fspath(source)} ({error.strerror}): give a weights file",
            reason="NO_SUCH_FILE",
        ) from error
    if os.fstat(file.fileno()).st_size > MAX_WEIGHTS_BYTES:  # not only after a long upload
        file.close()
        raise weights_too_large(MAX_WEIGHTS_BYTES)
    return file
