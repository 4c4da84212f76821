import pytest

from detflow.cli import output
from detflow.errors import InvalidArgument, Violation


def test_names_cannot_control_the_terminal() -> None:
    assert output.printable("a\x1b[31mb\u202ec\n") == "a\ufffd[31mb\ufffdc\ufffd"
    assert output.printable("세포 🎯") == "세포 🎯"


def test_error_is_one_line_and_its_violations_follow(capsys: pytest.CaptureFixture[str]) -> None:
    violations = [Violation(f"labels/{n}.txt:1", "BAD_BOX", "has no area") for n in range(100)]
    output.complain_about(InvalidArgument("many\nlines", violations=violations, total=250))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "detflow: many lines"
    assert lines[1] == "  labels/0.txt:1: BAD_BOX: has no area"
    assert lines[-1] == "  and 150 more"
    assert len(lines) == 102


def test_table_is_aligned_with_wide_characters(capsys: pytest.CaptureFixture[str]) -> None:
    output.say_table(("NAME", "N"), [("세포", "1"), ("cells", "2")], empty="none")
    assert capsys.readouterr().out == "NAME   N\n세포   1\ncells  2\n"
    output.say_table(("NAME",), [], empty="none")
    assert capsys.readouterr().out == "none\n"


def test_progress_without_a_terminal_is_a_line_per_ten_percent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with output.Bar() as bar:
        for percent in range(0, 101):
            bar.update("RUNNING", percent, f"epoch {percent}")
        bar.update("EVALUATING", 100)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[1] == "RUNNING 10% epoch 10"
    assert lines[-1] == "EVALUATING 100%"
    with output.Bar(silent=True) as bar:
        bar.update("RUNNING", 10)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")]
)
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text
