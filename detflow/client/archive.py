"""What a user calls a dataset, as the file that is uploaded: an archive, a folder or a URL."""

import contextlib
import io
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from detflow.client import cancelling
from detflow.client.folder import FolderTar
from detflow.errors import InvalidArgument, Unavailable

_TIMEOUT_SECONDS = 60.0
_BUFFER_BYTES = 1 << 20
_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_OBJECT_STORES = ("s3://", "gs://", "az://", "file://")


def is_url(source: str) -> bool:
    """Tells whether a dataset's source is fetched by HTTP."""
    return source.startswith(("http://", "https://"))


def is_in_object_store(source: str) -> bool:
    """Tells whether a dataset's source is fetched by detflow itself, from an object store."""
    return source.startswith(_OBJECT_STORES)


def default_name(source: str) -> str:
    """Returns the name of a dataset made from `source`: its last part without its suffix."""
    if is_url(source) or is_in_object_store(source):
        name = Path(source.split("?", 1)[0].rstrip("/")).name
    else:
        name = Path(os.path.abspath(source)).name
    suffix = next((one for one in _SUFFIXES if name.lower().endswith(one)), "")
    return name[: len(name) - len(suffix)] or name


@contextlib.contextmanager
def opened(source: str) -> Iterator[IO[bytes]]:
    """Opens the archive to upload, at its first byte.

    A folder is read as a tar archive, without compression: images don't shrink.

    Raises:
        InvalidArgument: There is no such file, or the folder holds no file.
        Unavailable: The URL cannot be fetched.
    """
    if is_url(source):
        with tempfile.TemporaryFile() as file:
            _download(source, file)
            file.seek(0)
            yield file
    elif os.path.isdir(source):
        with io.BufferedReader(FolderTar(Path(source)), _BUFFER_BYTES) as packed:
            yield packed
    else:
        try:
            archive = open(source, "rb")
        except OSError as error:
            raise InvalidArgument(
                f"cannot read {source} ({error.strerror}): give a zip or tar archive, a folder or a"
                " URL",
                reason="NO_SUCH_FILE",
            ) from error
        with archive:
            if archive.seekable():
                yield archive
                return
            # A pipe, such as <(zip -qr - images): an upload that is cut off begins again.
            with tempfile.TemporaryFile() as file:
                shutil.copyfileobj(archive, file, 1 << 20)
                file.seek(0)
                yield file


def _download(url: str, file: IO[bytes]) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            while data := response.read(1 << 20):
                cancelling.check()
                file.write(data)
    except urllib.error.HTTPError as error:
        with error:
            raise Unavailable(f"{url} answers {error.code} {error.reason}") from error
    except OSError as error:
        raise Unavailable(f"cannot fetch {url}: {error}") from error
