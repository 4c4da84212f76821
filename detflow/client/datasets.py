"""Datasets: labelled images, imported once."""

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from detflow.client import archive
from detflow.client.connection import Connection, pages
from detflow.client.projects import DEFAULT_PROJECT
from detflow.errors import DetflowError, InvalidArgument, NotFound, Unavailable, from_status
from detflow.names import MAX_NAME_LENGTH, check_display_name
from detflow.v1 import common_pb2, dataset_pb2, dataset_pb2_grpc

_CHUNK_BYTES = 1 << 20
_UPLOAD_SECONDS = 6 * 3600.0
_UPLOAD_ATTEMPTS = 3


class Datasets:
    """Calls about datasets."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = dataset_pb2_grpc.DatasetServiceStub(connection.channel("preprocess"))

    def import_(
        self,
        source: str | os.PathLike[str],
        *,
        project: str = DEFAULT_PROJECT,
        name: str = "",
        skip_invalid: bool = False,
        progress: Callable[[common_pb2.Progress], None] | None = None,
    ) -> dataset_pb2.Dataset:
        """Imports a zip archive, a folder or a URL, and waits until it is done.

        Args:
            source: Path or http(s) address.
            project: Id of the project.
            name: Name shown to people; by default that of the file.
            skip_invalid: Leave out what is invalid, and list it, instead of refusing the archive.
            progress: Called with what is being done: stage "upload" (bytes), then the import's.

        Returns:
            The dataset, READY.

        Raises:
            InvalidArgument: The archive was refused; the violations name file and line.
            AlreadyExists: The project has a dataset of this name.
        """
        text = os.fspath(source)
        name = name or archive.default_name(text)[:MAX_NAME_LENGTH]
        check_display_name(name, "name")  # not only after a long upload
        with archive.opened(text) as file:
            upload = self._upload(file, project, progress)
        dataset = self._connection.call(
            self._stub.CreateDataset,
            dataset_pb2.CreateDatasetRequest(
                parent=f"projects/{project}",
                dataset=dataset_pb2.Dataset(display_name=name),
                upload=upload.name,
                skip_invalid=skip_invalid,
                request_id=str(uuid.uuid4()),
            ),
        )
        for message in self.watch(dataset.name):
            if message.HasField("dataset"):
                dataset = message.dataset
            elif message.HasField("progress") and progress is not None:
                progress(message.progress)
            if dataset.state != dataset_pb2.Dataset.IMPORTING:
                break
        if dataset.state == dataset_pb2.Dataset.FAILED:
            raise from_status(dataset.failure.status)
        return dataset

    def get(self, name: str) -> dataset_pb2.Dataset:
        """Gets a dataset by its resource name."""
        request = dataset_pb2.GetDatasetRequest(name=name)
        return self._connection.call(self._stub.GetDataset, request)

    def list(self, project: str = DEFAULT_PROJECT) -> Sequence[dataset_pb2.Dataset]:
        """Lists a project's datasets, newest first."""
        return [*self._iterate(project)]

    def find(self, text: str, project: str = DEFAULT_PROJECT) -> dataset_pb2.Dataset:
        """Gets a dataset by resource name, id or display name; the newest if several have it.

        Raises:
            NotFound: There is none.
        """
        if text.startswith("projects/"):
            return self.get(text)
        for dataset in self._iterate(project):
            if text in (dataset.display_name, dataset.name.rsplit("/", 1)[-1]):
                return dataset
        raise NotFound(
            f"no dataset {text!r} in project {project}: see `detflow datasets list`",
            metadata={"dataset": text},
        )

    def delete(self, name: str) -> None:
        """Deletes a dataset that no version uses."""
        request = dataset_pb2.DeleteDatasetRequest(name=name)
        self._connection.call(self._stub.DeleteDataset, request)

    def watch(self, name: str, *, cursor: str = "") -> Iterator[dataset_pb2.WatchDatasetResponse]:
        """Watches an import; ends after READY or FAILED."""
        return self._connection.watch(
            self._stub.WatchDataset,
            lambda at: dataset_pb2.WatchDatasetRequest(name=name, cursor=at),
            cursor=cursor,
        )

    def _iterate(self, project: str) -> Iterator[dataset_pb2.Dataset]:
        def fetch(token: str) -> tuple[Sequence[dataset_pb2.Dataset], str]:
            request = dataset_pb2.ListDatasetsRequest(
                parent=f"projects/{project}", page_size=1000, page_token=token
            )
            response = self._connection.call(self._stub.ListDatasets, request)
            return response.datasets, response.next_page_token

        return pages(fetch)

    def _upload(
        self,
        file: IO[bytes],
        project: str,
        progress: Callable[[common_pb2.Progress], None] | None,
    ) -> dataset_pb2.Upload:
        num_total = os.fstat(file.fileno()).st_size

        unreadable: list[OSError] = []

        def read() -> bytes:
            # gRPC keeps to itself what was wrong with the parts.
            try:
                return file.read(_CHUNK_BYTES)
            except OSError as error:
                unreadable.append(error)
                raise

        def parts() -> Iterator[dataset_pb2.UploadArchiveRequest]:
            yield dataset_pb2.UploadArchiveRequest(parent=f"projects/{project}")
            while chunk := read():
                yield dataset_pb2.UploadArchiveRequest(chunk=chunk)
                if progress is not None:
                    num_done = file.tell()
                    progress(
                        common_pb2.Progress(
                            stage="upload",
                            num_done=num_done,
                            num_total=num_total,
                            percent=100.0 * num_done / max(num_total, 1),
                        )
                    )
            yield dataset_pb2.UploadArchiveRequest(size_bytes=file.tell())

        for attempt in range(1, _UPLOAD_ATTEMPTS + 1):
            file.seek(0)
            try:
                with self._connection.translated():
                    return self._stub.UploadArchive(parts(), timeout=_UPLOAD_SECONDS)
            except Unavailable as error:
                if attempt == _UPLOAD_ATTEMPTS or error.reason == "UNREACHABLE":
                    raise
            except DetflowError as error:
                if not unreadable:
                    raise
                raise InvalidArgument(
                    f"the archive cannot be read to its end ({unreadable[0].strerror})",
                    reason="UNREADABLE_FILE",
                ) from error
        raise AssertionError("the last attempt returns or raises")
