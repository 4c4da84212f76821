"""Datasets: labelled images, imported once."""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from detflow.client import archive
from detflow.client.connection import Connection, pages
from detflow.client.progress import OnProgress, Progress, shown
from detflow.client.projects import DEFAULT_PROJECT
from detflow.client.saving import replacing
from detflow.client.upload import upload_archive
from detflow.errors import InvalidArgument, NotFound, from_status
from detflow.names import MAX_NAME_LENGTH, check_display_name
from detflow.v1 import common_pb2, dataset_pb2, dataset_pb2_grpc

FORMATS = {
    "yolo": dataset_pb2.DATASET_FORMAT_YOLO,
    "voc": dataset_pb2.DATASET_FORMAT_VOC,
    "coco": dataset_pb2.DATASET_FORMAT_COCO,
}
"""Formats that are read and written."""

_DOWNLOAD_SECONDS = 24 * 3600.0


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
        format: str = "",
        progress: Progress = None,
    ) -> dataset_pb2.Dataset:
        """Imports an archive (zip, tar, tar.gz), a folder or a URL, and waits until it is done.

        If it breaks off on the way to detflow, call it again: the same content goes on where it
        stood.

        Args:
            source: Path or http(s) address; or s3://, gs:// or az:// address of an archive or, with
                / at its end, of a folder, which detflow fetches by itself if its operator allows
                that (DETFLOW_IMPORT_URLS).
            project: Id of the project.
            name: Name shown to people; by default that of the file.
            skip_invalid: Leave out what is invalid, and list it, instead of refusing the archive.
            format: One of `FORMATS`; by default it is detected.
            progress: Called with what is being done: stages "hash" and "upload" (bytes), then the
                import's. True shows a bar.

        Returns:
            The dataset, READY.

        Raises:
            InvalidArgument: The archive was refused; the violations name file and line.
            AlreadyExists: The project has a dataset of this name.
        """
        text = os.fspath(source)
        name = name or archive.default_name(text)[:MAX_NAME_LENGTH]
        check_display_name(name, "name")  # not only after a long upload
        wanted = _format(format)
        with shown(progress) as told:
            return self._import(text, project, name, skip_invalid, wanted, told)

    def _import(
        self,
        text: str,
        project: str,
        name: str,
        skip_invalid: bool,
        wanted: dataset_pb2.DatasetFormat.ValueType,
        progress: OnProgress | None,
    ) -> dataset_pb2.Dataset:
        upload = ""
        if not archive.is_in_object_store(text):
            with archive.opened(text) as file:
                upload = upload_archive(
                    self._connection, self._stub, file, project=project, progress=progress
                ).name
        dataset = self._connection.call(
            self._stub.CreateDataset,
            dataset_pb2.CreateDatasetRequest(
                parent=f"projects/{project}",
                dataset=dataset_pb2.Dataset(display_name=name),
                upload=upload,
                source_url="" if upload else text,
                skip_invalid=skip_invalid,
                format=wanted,
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
        """Gets a dataset by its resource name.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such dataset.
        """
        request = dataset_pb2.GetDatasetRequest(name=name)
        return self._connection.call(self._stub.GetDataset, request)

    def list(self, project: str = DEFAULT_PROJECT) -> Sequence[dataset_pb2.Dataset]:
        """Lists a project's datasets, newest first.

        Args:
            project: Id of the project.
        """
        return [*self._iterate(project)]

    def find(self, text: str, project: str = DEFAULT_PROJECT) -> dataset_pb2.Dataset:
        """Gets a dataset by resource name, id or display name; the newest if several have it.

        Args:
            text: What names it.
            project: Id of the project.

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

    def problems(self, name: str) -> Iterator[common_pb2.Problem]:
        """Yields everything that an import left out, clipped or refused, by place.

        Args:
            name: Resource name of a dataset, READY or FAILED.

        Raises:
            NotFound: There is no such dataset.
        """

        def fetch(token: str) -> tuple[Sequence[common_pb2.Problem], str]:
            request = dataset_pb2.ListImportProblemsRequest(
                parent=name, page_size=1000, page_token=token
            )
            response = self._connection.call(self._stub.ListImportProblems, request)
            return response.problems, response.next_page_token

        return pages(fetch)

    def download(
        self,
        name: str,
        destination: str | os.PathLike[str],
        *,
        format: str = "",
        progress: Progress = None,
    ) -> Path:
        """Downloads a dataset as a zip; it appears whole, or not at all.

        Args:
            name: Resource name.
            destination: Path of the file, which is replaced, or of a folder.
            format: One of `FORMATS`; by default that which it was imported in.
            progress: Called in stage "download", with bytes; how many come is not known before.
                True shows them.

        Returns:
            Where the file is.

        Raises:
            FailedPrecondition: The dataset is not READY.
            DataLoss: An image is not what was imported.
        """
        request = dataset_pb2.DownloadDatasetRequest(name=name, format=_format(format))
        path = Path(destination)
        if path.is_dir():
            path = path / f"{name.rsplit('/', 1)[-1]}.zip"
        num_bytes = 0
        parts = self._connection.download(
            self._stub.DownloadDataset, request, seconds=_DOWNLOAD_SECONDS
        )
        with replacing(path) as file, contextlib.closing(parts), shown(progress) as told:
            for data in parts:
                file.write(data)
                num_bytes += len(data)
                if told is not None:
                    told(common_pb2.Progress(stage="download", num_done=num_bytes))
        return path

    def statistics(self, name: str) -> dataset_pb2.DatasetStatistics:
        """Gets what a READY dataset says about itself: counts, histograms, likely mistakes.

        Args:
            name: Resource name of the dataset.

        Raises:
            FailedPrecondition: The dataset is not READY.
        """
        request = dataset_pb2.GetDatasetStatisticsRequest(name=f"{name}/statistics")
        return self._connection.call(self._stub.GetDatasetStatistics, request)

    def delete(self, name: str) -> None:
        """Deletes a dataset that no version uses.

        Args:
            name: Resource name.

        Raises:
            FailedPrecondition: A version uses it.
            NotFound: There is no such dataset.
        """
        request = dataset_pb2.DeleteDatasetRequest(name=name)
        self._connection.call(self._stub.DeleteDataset, request)

    def watch(self, name: str, *, cursor: str = "") -> Iterator[dataset_pb2.WatchDatasetResponse]:
        """Watches an import; ends after READY or FAILED.

        Args:
            name: Resource name.
            cursor: Of the last message seen, to go on after it; empty begins with what there is.

        Raises:
            NotFound: There is no such dataset.
        """
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


def _format(text: str) -> dataset_pb2.DatasetFormat.ValueType:
    if text and text not in FORMATS:
        raise InvalidArgument(
            f"format must be one of {', '.join(FORMATS)}, not {text!r}", reason="UNKNOWN_VALUE"
        )
    return FORMATS.get(text, dataset_pb2.DATASET_FORMAT_UNSPECIFIED)
