"""ultralytics and torch imported as the worker imports them, once for all tests of a process."""

import os
import sys
from collections.abc import Iterator

import pytest

from services.trainer.worker import library


@pytest.fixture(scope="session")
def quiet_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sets the environment that the worker sets before it imports them."""
    before = dict(os.environ)
    if "ultralytics" not in sys.modules:
        library.prepare(tmp_path_factory.mktemp("ultralytics"))
    library.silence()
    library.load_nms()
    yield
    os.environ.clear()
    os.environ.update(before)
