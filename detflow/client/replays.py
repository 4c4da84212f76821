"""Documents that say how to make a version again: read, and compared with what was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from google.protobuf import json_format

from detflow.errors import InvalidArgument
from detflow.v1 import version_pb2

_FORMAT = "detflow-replay/1"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a bundle is made of, as a replay says.

    Attributes:
        recipe: What was done to the dataset.
        dataset_sha256: Hash of the dataset's content.
        class_names: Its classes.
        manifest_sha256: Hash of the bundle's manifest: two bundles with the same one are the same.
        libraries: Versions of the libraries that made the images, and of detflow.
    """

    recipe: version_pb2.Recipe
    dataset_sha256: str
    class_names: tuple[str, ...]
    manifest_sha256: str
    libraries: Mapping[str, str]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that `detflow versions replay` has written.

        Raises:
            InvalidArgument: BAD_REPLAY: it cannot be read, or is something else.
        """
        try:
            return cls.parse(Path(path).read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(
                f"{path} is no replay of a version ({error}): take a file that"
                " `detflow versions replay` has written",
                reason="BAD_REPLAY",
            ) from error

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a replay.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: It is none.
        """
        document: dict[str, Any] = json.loads(data)
        if document["format"] != _FORMAT:
            raise ValueError(f"its format is {document['format']!r}, not {_FORMAT!r}")
        try:
            recipe = json_format.ParseDict(document["recipe"], version_pb2.Recipe())
        except json_format.ParseError as error:
            raise ValueError(str(error)) from error
        return cls(
            recipe=recipe,
            dataset_sha256=document["dataset"]["content_sha256"],
            class_names=tuple(document["class_names"]),
            manifest_sha256=document["manifest"]["sha256"],
            libraries={**document["libraries"], "detflow": document["detflow"]},
        )

    def differences(self, made: Replay) -> list[str]:
        """Says why a version that was made by this is another one; empty if it is the same."""
        if made.manifest_sha256 == self.manifest_sha256:
            return []
        found = []
        if made.dataset_sha256 != self.dataset_sha256:
            found.append(
                f"the dataset's content is {made.dataset_sha256[:12]}, not"
                f" {self.dataset_sha256[:12]}"
            )
        if made.class_names != self.class_names:
            found.append("the classes have other names")
        found += [
            f"{name} is {made.libraries.get(name, 'missing')}, not {version}"
            for name, version in self.libraries.items()
            if made.libraries.get(name) != version
        ]
        return found or ["nothing that is known of differs"]
