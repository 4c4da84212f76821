from pathlib import Path

from detflow.local.logs import Log


def test_full_log_is_rotated_and_three_old_ones_are_kept(tmp_path: Path) -> None:
    log = Log(tmp_path / "a.log", max_bytes=10)
    for number in range(9):
        log.write(b"line %d of this log\n" % number)
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"a.log", "a.log.1", "a.log.2", "a.log.3"}
    assert (tmp_path / "a.log").read_text() == "line 8 of this log\n"
    assert (tmp_path / "a.log.1").read_text() == "line 7 of this log\n"


def test_lines_are_passed_on_whole_however_they_arrive(tmp_path: Path) -> None:
    lines: list[str] = []
    log = Log(tmp_path / "a.log", lines.append)
    for data in (b"one\ntw", b"o\n", b"three", b"\n"):
        log.write(data)
    assert lines == ["one", "two", "three"]
    assert log.tail(2) == "two\nthree"
    log.close()
