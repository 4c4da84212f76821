"""Versions: datasets frozen with a split and a recipe."""

import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from google.protobuf.field_mask_pb2 import FieldMask

from detflow.client import cancelling
from detflow.client.connection import Connection, pages
from detflow.client.progress import OnProgress, Progress, shown
from detflow.client.projects import DEFAULT_PROJECT
from detflow.client.recipes import RecipeOptions, make_recipe, override_recipe
from detflow.client.saving import replacing
from detflow.errors import NotFound, from_status
from detflow.names import project_of
from detflow.v1 import (
    preprocess_pb2,
    preprocess_pb2_grpc,
    version_pb2,
    version_pb2_grpc,
)

_PREPROCESSING_APPEARS_SECONDS = 10.0
_DOWNLOAD_SECONDS = 3600.0


class Versions:
    """Calls about versions."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = version_pb2_grpc.VersionServiceStub(connection.channel("version"))
        self._preprocess = preprocess_pb2_grpc.PreprocessServiceStub(
            connection.channel("preprocess")
        )

    def create(
        self,
        dataset: str,
        *,
        name: str = "",
        labels: Mapping[str, str] | None = None,
        parent: str = "",
        recipe: version_pb2.Recipe | None = None,
        **options: Unpack[RecipeOptions],
    ) -> version_pb2.Version:
        """Creates a version; it returns at once, in PREPROCESSING.

        Args:
            dataset: Resource name of the dataset.
            name: Name shown to people; by default the next V_n.
            labels: Notes by key.
            parent: Resource name of the version that this one is made after.
            recipe: What to do, e.g. the recipe of another version; by default the options alone.
            options: The recipe, or what is to differ from `recipe`: see
                `detflow.client.recipes.RecipeOptions`.

        Raises:
            InvalidArgument: An augmentation is not known, or the split does not add up to 100.
        """
        wanted = version_pb2.Version(
            dataset=dataset,
            recipe=_recipe(recipe, options),
            display_name=name,
            labels=labels,
            parent_version=parent,
        )
        return self._connection.call(
            self._stub.CreateVersion,
            version_pb2.CreateVersionRequest(
                parent=f"projects/{project_of(dataset)}",
                version=wanted,
                request_id=str(uuid.uuid4()),
            ),
        )

    def preview(
        self,
        dataset: str,
        *,
        num_samples: int = 4,
        recipe: version_pb2.Recipe | None = None,
        **options: Unpack[RecipeOptions],
    ) -> preprocess_pb2.PreviewVersionResponse:
        """Shows what `create` would make: images in each split, and images before and after.

        Args:
            dataset: Resource name of the dataset.
            num_samples: Images to show, 0..12.
            recipe: As for `create`.
            options: The recipe, as for `create`.

        Raises:
            InvalidArgument: An augmentation is not known, or the split does not add up to 100.
        """
        return self._connection.call(
            self._preprocess.PreviewVersion,
            preprocess_pb2.PreviewVersionRequest(
                parent=f"projects/{project_of(dataset)}",
                dataset=dataset,
                recipe=_recipe(recipe, options),
                num_samples=num_samples,
            ),
        )

    def wait(self, name: str, *, progress: Progress = None) -> version_pb2.Version:
        """Waits until a version's preprocessing is over and returns the version.

        Args:
            name: Resource name.
            progress: Called with what is being done; True shows a bar.

        Raises:
            DetflowError: What preprocessing failed of.
            NotFound: The version is not there, or was deleted meanwhile.
        """
        with shown(progress) as told:
            self._follow_preprocessing(name, told)
        is_listed = False  # in the parts of the snapshot so far
        for message in self.watch(project_of(name)):
            changed = (
                [message.version] if message.HasField("version") else message.snapshot.versions
            )
            version = next((version for version in changed if version.name == name), None)
            if message.HasField("snapshot"):
                is_missing = version is None and not is_listed and not message.snapshot.more
                is_listed = message.snapshot.more and (is_listed or version is not None)
            else:
                is_missing = version is not None and version.HasField("delete_time")
            if is_missing:
                raise NotFound(f"{name} was deleted", metadata={"version": name})
            if version is None:
                continue
            if version.state == version_pb2.Version.FAILED and not version.training:
                raise from_status(version.failure.status)
            if version.state != version_pb2.Version.PREPROCESSING:
                return version
        raise AssertionError("a watch of versions has no end")

    def get(self, name: str) -> version_pb2.Version:
        """Gets a version by its resource name.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such version.
        """
        request = version_pb2.GetVersionRequest(name=name)
        return self._connection.call(self._stub.GetVersion, request)

    def list(
        self,
        project: str = DEFAULT_PROJECT,
        *,
        show_deleted: bool = False,
        filter: str = "",
        order_by: str = "",
    ) -> Sequence[version_pb2.Version]:
        """Lists a project's versions.

        Args:
            project: Id of the project.
            show_deleted: Those in the trash too.
            filter: Which ones, e.g. `state = COMPLETED AND metrics.map50 >= 0.8`.
            order_by: E.g. "metrics.map50 desc"; by default newest first.

        Raises:
            InvalidArgument: BAD_FILTER or BAD_ORDER; the message says where and what is expected.
        """
        return [*self._iterate(project, show_deleted, filter, order_by)]

    def find(
        self, text: str, project: str = DEFAULT_PROJECT, *, deleted: bool = False
    ) -> version_pb2.Version:
        """Gets a version by resource name, id or display name; the newest if several have it.

        Args:
            text: What names it.
            project: Id of the project a bare id or display name is looked for in.
            deleted: Look in the trash instead.

        Raises:
            NotFound: There is none.
        """
        if text.startswith("projects/"):
            return self.get(text)
        for version in self._iterate(project, deleted):
            if deleted != version.HasField("delete_time"):
                continue
            if text in (version.display_name, version.name.rsplit("/", 1)[-1]):
                return version
        where = f"the trash of project {project}" if deleted else f"project {project}"
        raise NotFound(
            f"no version {text!r} in {where}: see `detflow versions list`",
            metadata={"version": text},
        )

    def leaks(self, name: str) -> preprocess_pb2.LeakReport:
        """Gets the leak report of a preprocessed version: what its split kept together.

        Args:
            name: Resource name of the version.

        Raises:
            FailedPrecondition: Its preprocessing is not done.
        """
        request = preprocess_pb2.GetLeakReportRequest(name=f"{name}/leakReport")
        return self._connection.call(self._preprocess.GetLeakReport, request)

    def rename(self, name: str, display_name: str, *, etag: str = "") -> version_pb2.Version:
        """Changes the name shown to people.

        Args:
            name: Resource name.
            display_name: The new one, at most 63 characters.
            etag: That of what was read, to fail if it has changed since.

        Raises:
            Aborted: The version has changed since the etag was read.
        """
        return self._connection.call(
            self._stub.UpdateVersion,
            version_pb2.UpdateVersionRequest(
                version=version_pb2.Version(name=name, display_name=display_name, etag=etag),
                update_mask=FieldMask(paths=["display_name"]),
            ),
        )

    def label(self, name: str, changes: Mapping[str, str | None]) -> version_pb2.Version:
        """Changes labels of a version; those not named stay.

        Args:
            name: Resource name.
            changes: New values by key; None removes the label.

        Raises:
            NotFound: There is no such version.
        """
        labels = {key: value for key, value in changes.items() if value is not None}
        return self._connection.call(
            self._stub.UpdateVersion,
            version_pb2.UpdateVersionRequest(
                version=version_pb2.Version(name=name, labels=labels),
                update_mask=FieldMask(paths=[f"labels.{key}" for key in changes]),
            ),
        )

    def read_replay(self, name: str) -> bytes:
        """Reads all that is needed to make a version again, as JSON.

        Args:
            name: Resource name.

        Raises:
            FailedPrecondition: VERSION_HAS_NO_BUNDLE.
        """
        return b"".join(self._replay(name))

    def download_replay(self, name: str, destination: str | os.PathLike[str]) -> Path:
        """Writes what `read_replay` returns to a file, which appears whole, or not at all.

        Args:
            name: Resource name.
            destination: Path of the file, which is replaced, or of a folder.

        Returns:
            Where the file is.

        Raises:
            NotFound: There is no such version.
        """
        path = Path(destination)
        if path.is_dir():
            path = path / f"{name.rsplit('/', 1)[-1]}.json"
        with replacing(path) as file:
            for data in self._replay(name):
                file.write(data)
        return path

    def delete(self, name: str, *, etag: str = "") -> version_pb2.Version:
        """Moves a version to the trash; a running training is stopped.

        Args:
            name: Resource name.
            etag: That of what was read, to fail if it has changed since.

        Raises:
            Aborted: It has changed since the etag was read.
            NotFound: There is no such version.
        """
        request = version_pb2.DeleteVersionRequest(name=name, etag=etag)
        return self._connection.call(self._stub.DeleteVersion, request)

    def restore(self, name: str) -> version_pb2.Version:
        """Takes a version out of the trash.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such version.
        """
        request = version_pb2.UndeleteVersionRequest(name=name)
        return self._connection.call(self._stub.UndeleteVersion, request)

    def watch(
        self, project: str = DEFAULT_PROJECT, *, cursor: str = ""
    ) -> Iterator[version_pb2.WatchVersionsResponse]:
        """Watches a project's versions: all as they are, then every change. It has no end.

        Args:
            project: Id of the project.
            cursor: Of the last message seen, to go on after it; empty begins with what there is.
        """
        return self._connection.watch(
            self._stub.WatchVersions,
            lambda at: version_pb2.WatchVersionsRequest(parent=f"projects/{project}", cursor=at),
            cursor=cursor,
        )

    def watch_preprocessing(
        self, name: str, *, cursor: str = ""
    ) -> Iterator[preprocess_pb2.WatchPreprocessingResponse]:
        """Watches the preprocessing of a version; ends after its final state.

        Args:
            name: Resource name.
            cursor: Of the last message seen, to go on after it; empty begins with what there is.

        Raises:
            NotFound: There is no such version.
        """
        return self._connection.watch(
            self._preprocess.WatchPreprocessing,
            lambda at: preprocess_pb2.WatchPreprocessingRequest(version=name, cursor=at),
            cursor=cursor,
        )

    def _follow_preprocessing(self, name: str, progress: OnProgress | None) -> None:
        """Passes progress on until preprocessing ends; it appears shortly after its version."""
        deadline = time.monotonic() + _PREPROCESSING_APPEARS_SECONDS
        while True:
            try:
                for message in self.watch_preprocessing(name):
                    if message.HasField("progress") and progress is not None:
                        progress(message.progress)
                return
            except NotFound:
                state = self.get(name).state
                if state != version_pb2.Version.PREPROCESSING or time.monotonic() > deadline:
                    return
                cancelling.pause(0.05)

    def _replay(self, name: str) -> Iterator[bytes]:
        request = preprocess_pb2.DownloadReplayRequest(name=name)
        return self._connection.download(
            self._preprocess.DownloadReplay, request, seconds=_DOWNLOAD_SECONDS
        )

    def _iterate(
        self, project: str, show_deleted: bool, filter: str = "", order_by: str = ""
    ) -> Iterator[version_pb2.Version]:
        def fetch(token: str) -> tuple[Sequence[version_pb2.Version], str]:
            request = version_pb2.ListVersionsRequest(
                parent=f"projects/{project}",
                page_size=1000,
                page_token=token,
                show_deleted=show_deleted,
                filter=filter,
                order_by=order_by,
            )
            response = self._connection.call(self._stub.ListVersions, request)
            return response.versions, response.next_page_token

        return pages(fetch)


def _recipe(base: version_pb2.Recipe | None, options: RecipeOptions) -> version_pb2.Recipe:
    return make_recipe(**options) if base is None else override_recipe(base, **options)
