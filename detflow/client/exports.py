"""Exports: trained models as files that other programs run."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

from detflow.client.connection import Connection, pages
from detflow.client.progress import OnProgress, Progress, shown
from detflow.client.saving import replacing
from detflow.client.upload import of_bytes
from detflow.errors import Cancelled, DataLoss, FailedPrecondition, InvalidArgument, from_status
from detflow.v1 import export_pb2, export_pb2_grpc

FORMATS = {
    "onnx": export_pb2.Export.ONNX,
    "openvino": export_pb2.Export.OPENVINO,
    "pytorch": export_pb2.Export.PYTORCH,
}
"""What an export can be."""

PRECISIONS = {
    "fp32": export_pb2.Export.FP32,
    "fp16": export_pb2.Export.FP16,
    "int8": export_pb2.Export.INT8,
}
"""Numbers its weights can be stored and computed in."""

UNFINISHED_STATES = (export_pb2.Export.QUEUED, export_pb2.Export.RUNNING)
"""States of an export that has not come to an end."""

_DOWNLOAD_SECONDS = 6 * 3600.0


class Exports:
    """Calls about exports."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = export_pb2_grpc.ExportServiceStub(connection.channel("trainer"))

    def create(
        self,
        training: str,
        *,
        format: str,
        precision: str = "fp32",
        image_size_px: int = 0,
        batch_size: int = 0,
        dynamic: bool = False,
        simplify: bool = False,
        opset: int = 0,
        end_to_end: bool = False,
    ) -> export_pb2.Export:
        """Starts an export of a training that has weights; it returns at once, in QUEUED.

        Args:
            training: Resource name of the training.
            format: One of `FORMATS`.
            precision: One of `PRECISIONS`; "int8" for OpenVINO only.
            image_size_px: Height and width of the input; 0 means that of the training.
            batch_size: Images per call; 0 means 1.
            dynamic: Let batch size, height and width vary; ONNX and OpenVINO.
            simplify: Fold constants and remove what is redundant; ONNX.
            opset: ONNX operator set; 0 means 17.
            end_to_end: Answer detections, after threshold and non-maximum suppression; ONNX.

        Raises:
            FailedPrecondition: The training has no weights.
            InvalidArgument: An option does not go with the format.
        """
        export = export_pb2.Export(
            format=FORMATS[_choice("format", format, FORMATS)],
            precision=PRECISIONS[_choice("precision", precision, PRECISIONS)],
            image_size_px=image_size_px,
            batch_size=batch_size,
            dynamic=dynamic,
            simplify=simplify,
            opset=opset,
            end_to_end=end_to_end,
        )
        return self._connection.call(
            self._stub.CreateExport,
            export_pb2.CreateExportRequest(
                parent=training, export=export, request_id=str(uuid.uuid4())
            ),
        )

    def wait(self, name: str, *, progress: Progress = None) -> export_pb2.Export:
        """Waits until an export is made, and returns it.

        Args:
            name: Resource name.
            progress: Called with what is being done; True shows a bar.

        Raises:
            DetflowError: What it failed of; Cancelled if somebody cancelled it.
        """
        export = self.get(name)
        with shown(progress) as told:
            for message in self.watch(name):
                if message.HasField("export"):
                    export = message.export
                elif message.HasField("progress") and told is not None:
                    told(message.progress)
        if export.state in UNFINISHED_STATES:
            export = self.get(name)
        if export.state == export_pb2.Export.FAILED:
            raise from_status(export.failure.status)
        if export.state == export_pb2.Export.CANCELLED:
            raise Cancelled(f"{name} was cancelled; export again", metadata={"export": name})
        return export

    def get(self, name: str) -> export_pb2.Export:
        """Gets an export by its resource name.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such export.
        """
        request = export_pb2.GetExportRequest(name=name)
        return self._connection.call(self._stub.GetExport, request)

    def list(self, training: str) -> Sequence[export_pb2.Export]:
        """Lists the exports of a training (resource name), newest first.

        Args:
            training: Resource name of the training.
        """

        def fetch(token: str) -> tuple[Sequence[export_pb2.Export], str]:
            request = export_pb2.ListExportsRequest(
                parent=training, page_size=1000, page_token=token
            )
            response = self._connection.call(self._stub.ListExports, request)
            return response.exports, response.next_page_token

        return [*pages(fetch)]

    def watch(self, name: str, *, cursor: str = "") -> Iterator[export_pb2.WatchExportResponse]:
        """Watches an export: as it is, then progress and changes, to its end.

        Args:
            name: Resource name.
            cursor: Of the last message seen, to go on after it; empty begins with what there is.

        Raises:
            NotFound: There is no such export.
        """
        return self._connection.watch(
            self._stub.WatchExport,
            lambda at: export_pb2.WatchExportRequest(name=name, cursor=at),
            cursor=cursor,
        )

    def cancel(self, name: str) -> export_pb2.Export:
        """Cancels an export that is not finished.

        Args:
            name: Resource name.

        Raises:
            FailedPrecondition: It has ended.
            NotFound: There is no such export.
        """
        request = export_pb2.CancelExportRequest(name=name)
        return self._connection.call(self._stub.CancelExport, request)

    def delete(self, name: str) -> None:
        """Deletes an export and its file; cancels it first if it is not finished.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such export.
        """
        request = export_pb2.DeleteExportRequest(name=name)
        self._connection.call(self._stub.DeleteExport, request)

    def download(
        self,
        name: str,
        destination: str | os.PathLike[str],
        *,
        progress: Progress = None,
    ) -> Path:
        """Downloads the file of a finished export; it appears whole and checked, or not at all.

        Args:
            name: Resource name.
            destination: Path of the file, which is replaced, or of a folder.
            progress: Called in stage "download", with bytes; True shows a bar.

        Returns:
            Where the file is.

        Raises:
            DataLoss: What arrived is not what was stored.
            FailedPrecondition: The export has no file.
        """
        export = self.get(name)
        if not export.HasField("object"):
            state = export_pb2.Export.State.Name(export.state)
            raise FailedPrecondition(f"{name} is {state} and has no file", reason="NO_FILE")
        path = self.path_of(export, destination)
        with replacing(path) as file, shown(progress) as told:
            self._receive(export, file, told)
        return path

    def path_of(self, export: export_pb2.Export, destination: str | os.PathLike[str]) -> Path:
        """Returns where `download` puts a file: in a folder, under its own name.

        Args:
            export: A finished export.
            destination: Path of a file or of a folder.
        """
        path = Path(destination)
        return path / Path(export.file_name).name if path.is_dir() else path

    def _receive(
        self, export: export_pb2.Export, file: IO[bytes], progress: OnProgress | None
    ) -> None:
        digest, num_bytes = hashlib.sha256(), 0
        request = export_pb2.DownloadExportRequest(name=export.name)
        parts = self._connection.download(
            self._stub.DownloadExport, request, seconds=_DOWNLOAD_SECONDS
        )
        with contextlib.closing(parts):
            for data in parts:
                file.write(data)
                digest.update(data)
                num_bytes += len(data)
                if progress is not None:
                    progress(of_bytes("download", num_bytes, export.object.size_bytes))
        if digest.hexdigest() != export.object.sha256:
            raise DataLoss(
                f"{num_bytes} bytes with SHA-256 {digest.hexdigest()} arrived of {export.name},"
                f" not {export.object.size_bytes} with {export.object.sha256}; download it again",
                reason="HASH_MISMATCH",
            )


def _choice(field: str, text: str, choices: Collection[str]) -> str:
    if text not in choices:
        raise InvalidArgument(
            f"{field} must be one of {', '.join(choices)}, not {text!r}", reason="UNKNOWN_VALUE"
        )
    return text
