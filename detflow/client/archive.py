"""What a user calls a dataset, as the file that is uploaded: an archive, a folder or a URL."""

import contextlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from detflow.errors import InvalidArgument, Unavailable

_TIMEOUT_SECONDS = 60.0


def is_url(source: str) -> bool:
    """Tells whether a dataset's source is fetched by HTTP."""
    return source.startswith(("http://", "https://"))


def default_name(source: str) -> str:
    """Returns the name of a dataset made from `source`: its last part without its suffix."""
    path = source.split("?", 1)[0].rstrip("/") if is_url(source) else os.path.abspath(source)
    return Path(path).stem if Path(path).suffix == ".zip" else Path(path).name


@contextlib.contextmanager
def opened(source: str) -> Iterator[IO[bytes]]:
    """Opens the archive to upload, at its first byte.

    A folder is packed into a temporary zip, without compression: images don't shrink.

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
        with tempfile.TemporaryFile() as file:
            _pack(Path(source), file)
            file.seek(0)
            yield file
    else:
        try:
            archive = open(source, "rb")
        except OSError as error:
            raise InvalidArgument(
                f"cannot read {source} ({error.strerror}): give a zip archive, a folder or a URL",
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
            shutil.copyfileobj(response, file, 1 << 20)
    except urllib.error.HTTPError as error:
        with error:
            raise Unavailable(f"{url} answers {error.code} {error.reason}") from error
    except OSError as error:
        raise Unavailable(f"cannot fetch {url}: {error}") from error


def _pack(folder: Path, file: IO[bytes]) -> None:
    num_files = 0
    visited: set[str] = set()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        # Linked folders are followed, each once: data sets are often put together from links.
        for parent, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in visited:
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(parent, name)
                if name.startswith(".") or not path.is_file():
                    continue
                try:
                    archive.write(path, path.relative_to(folder).as_posix())
                except OSError as error:
                    raise InvalidArgument(
                        f"cannot read {path} ({error.strerror})", reason="NO_SUCH_FILE"
                    ) from error
                except UnicodeEncodeError as error:
                    raise InvalidArgument(
                        f"the name of {os.fsencode(path)!r} is not UTF-8; rename it",
                        reason="BAD_NAME",
                    ) from error
                num_files += 1
    if num_files == 0:
        raise InvalidArgument(f"{folder} holds no files", reason="EMPTY_DATASET")
