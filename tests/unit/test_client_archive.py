import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from detflow.client.archive import default_name, opened
from detflow.errors import InvalidArgument, Unavailable


def names_in(source: Path) -> list[str]:
    """Names of the files in what is uploaded."""
    with opened(str(source)) as file, tarfile.open(fileobj=file) as archive:
        return archive.getnames()


def test_folder_is_read_as_a_tar_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "강아지.jpg").write_bytes(b"x" * 5000)
    (tmp_path / "images" / "empty.txt").write_bytes(b"")
    (tmp_path / "images" / ".DS_Store").write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    (tmp_path / "data.yaml").write_text("names: [dog]")
    with opened(str(tmp_path)) as file, tarfile.open(fileobj=file) as archive:
        assert {m.name: archive.extractfile(m).read() for m in archive} == {  # type: ignore[union-attr]
            "data.yaml": b"names: [dog]",
            "images/empty.txt": b"",
            "images/강아지.jpg": b"x" * 5000,
        }


def test_the_same_files_are_the_same_bytes_from_any_place_on(tmp_path: Path) -> None:
    for number, size in enumerate((0, 1, 511, 512, 513, 70_000)):
        (tmp_path / f"{number}{'긴' * 60}.jpg").write_bytes(bytes([number]) * size)
    with opened(str(tmp_path)) as file:
        whole = file.read()
        assert file.seek(0, os.SEEK_END) == len(whole)
    for path in tmp_path.iterdir():
        path.chmod(0o700)
        os.utime(path, (1, 1))
    with opened(str(tmp_path)) as file:
        for at in (0, 1, 512, 1535, 1536, 30_000, len(whole) - 1100, len(whole) - 1, len(whole)):
            file.seek(at)
            assert file.read() == whole[at:]


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 100)
    with opened(str(tmp_path)) as file:
        (tmp_path / "a.jpg").write_bytes(b"x" * 99)
        with pytest.raises(InvalidArgument, match=r"a\.jpg changed") as caught:
            file.read()
    assert caught.value.reason == "FILE_CHANGED"
    with opened(str(tmp_path)) as file:
        (tmp_path / "a.jpg").unlink()
        with pytest.raises(InvalidArgument, match=r"cannot read .*a\.jpg \(No such file"):
            file.read()


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"x")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    assert names_in(tmp_path / "set") == ["images/a.jpg"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/cells.zip", "cells"),
        ("/data/cells/", "cells"),
        ("/data/v1.2", "v1.2"),
        ("https://example.org/sets/cells.zip?token=1", "cells"),
        ("https://example.org/sets/cells/", "cells"),
        ("/data/cells.tar.gz", "cells"),
        ("cells.TGZ", "cells"),
        ("s3://bucket/sets/cells.tar", "cells"),
        ("s3://bucket/sets/v1.2/", "v1.2"),
    ],
)
def test_dataset_is_named_after_its_source(source: str, name: str) -> None:
    assert default_name(source) == name


def test_missing_file_and_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nothing\.zip \(No such file"):
        with opened(str(tmp_path / "nothing.zip")):
            pass
    with pytest.raises(InvalidArgument, match="holds no files") as caught:
        with opened(str(tmp_path)):
            pass
    assert caught.value.reason == "EMPTY_DATASET"


def test_pipe_is_read_to_its_end_and_can_begin_again(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"x" * 100_000,))
    writer.start()
    with opened(str(pipe)) as file:
        assert len(file.read()) == 100_000
        assert file.seek(0) == 0
    writer.join()


def test_file_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    with pytest.raises(InvalidArgument, match=r"xff\.jpg.* is not UTF-8"), opened(str(tmp_path)):
        pass


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(tmp_path), **kwargs)  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_url_is_fetched(tmp_path: Path, url: str) -> None:
    (tmp_path / "a.zip").write_bytes(b"archive")
    with opened(f"{url}/a.zip") as file:
        assert file.read() == b"archive"
    with pytest.raises(Unavailable, match="answers 404"):
        with opened(f"{url}/b.zip"):
            pass
    with pytest.raises(Unavailable, match="cannot fetch"):
        with opened("http://127.0.0.1:1/a.zip"):
            pass
