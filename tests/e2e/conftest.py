"""A stack per module."""

import signal
from collections.abc import Iterator

import pytest
from e2e_rig import Stack, end, free_base_port, start


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running stack; it must end within a minute of SIGTERM and leave nothing behind."""
    running = start(tmp_path_factory.mktemp("data"), free_base_port())
    yield running
    end(running, signal.SIGTERM)
    assert running.process.returncode == 0
