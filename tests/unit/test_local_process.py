import socket
import stat
from pathlib import Path

from detflow.local.process import free_port, is_free, remembered_port, secret


def test_secret_is_kept_and_private(tmp_path: Path) -> None:
    first = secret(tmp_path / "token")
    assert secret(tmp_path / "token") == first
    assert len(first) == 64
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600


def test_remembered_port_is_kept_while_free(tmp_path: Path) -> None:
    port = remembered_port(tmp_path / "port")
    assert remembered_port(tmp_path / "port") == port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert not is_free(port)
        other = remembered_port(tmp_path / "port")
    assert other != port
    assert remembered_port(tmp_path / "port") == other


def test_free_port_can_be_bound() -> None:
    assert is_free(free_port())
