import shutil
import zipfile
from pathlib import Path

import pytest

from detflow.local.demo_data import write_dataset
from tests.stack_rig import Stack, detflow, free_base_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images; one with a box without area, one with a class that is not named."""
    folder = tmp_path_factory.mktemp("images") / "broken"
    write_dataset(folder, 8)
    (folder / "labels" / "shapes-0002.txt").write_text("0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.0 0.2\n")
    (folder / "labels" / "shapes-0005.txt").write_text("7 0.5 0.5 0.2 0.2\n")
    return folder


def test_bad_labels_are_named_with_file_and_line_and_can_be_left_out(
    stack: Stack, broken: Path
) -> None:
    refused = stack.detflow("datasets", "import", str(broken))
    assert refused.code == 1
    first, *violations = refused.err.splitlines()
    assert first.startswith("detflow: ")
    assert any("labels/shapes-0002.txt:2: BAD_BOX: " in line for line in violations)
    assert any("labels/shapes-0005.txt:1: UNKNOWN_CLASS: " in line for line in violations)

    kept = stack.detflow(
        "datasets", "import", str(broken), "--name", "kept", "--skip-invalid", "--json"
    )
    assert kept.code == 0, kept.err
    assert {p["reason"] for p in kept.json["skipped"]} == {"BAD_BOX", "UNKNOWN_CLASS"}
    assert int(kept.json["numSkipped"]) >= 2
    shown = stack.detflow("datasets", "show", "kept")
    assert "labels/shapes-0002.txt:2: BAD_BOX" in shown.out


@pytest.mark.parametrize(
    ("name", "reason"),
    [("../evil.txt", "UNSAFE_PATH"), ("a\\b.txt", "UNSAFE_PATH"), ("/etc/passwd", "UNSAFE_PATH")],
)
def test_unsafe_archive_is_refused(stack: Stack, tmp_path: Path, name: str, reason: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        archive.writestr(info, "x")
    done = stack.detflow("datasets", "import", str(tmp_path / "evil.zip"))
    assert done.code == 1
    assert reason in done.err


def test_file_that_is_no_archive_is_refused(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "notes.zip").write_text("these are not images")
    done = stack.detflow("datasets", "import", str(tmp_path / "notes.zip"))
    assert done.code == 1 and done.err.startswith("detflow: ")
    assert "Error" not in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("datasets", "import", "/no/such.zip"), 1, "cannot read /no/such.zip"),
        (("datasets", "show", "nothing"), 1, "detflow datasets list"),
        (("versions", "show", "V_99"), 1, "detflow versions list"),
        (("versions", "create", "--dataset", "nothing"), 1, "detflow datasets list"),
        (("versions", "create", "--dataset", "x", "--split", "70/20"), 2, "70/20/10"),
        (("versions", "create", "--dataset", "x", "--augment", "spin"), 2, "hflip"),
        (("trainings", "show", "nothing"), 1, "detflow trainings list"),
        (("trainings", "stop", "nothing", "--mode", "now"), 2, "pause, finish, discard"),
        (("metrics", "projects/default/versions/v/trainings/t"), 1, "detflow: "),
        (("train", "V_99", "--batch", "many"), 2, "--batch"),
        (("datasets", "list", "--project", "../x"), 1, "detflow: "),
        (("models", "--address", "nowhere"), 1, "host:port"),
        (("train",), 2, "VERSION"),
        (("fly",), 2, "fly"),
        (("export", "x"), 2, "export"),
    ],
)
def test_mistake_is_one_line_with_the_remedy(
    stack: Stack, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = stack.detflow(*arguments)
    assert done.code == code
    assert words in done.err.splitlines()[0]
    assert done.out == ""


def test_training_with_bad_settings_names_them(stack: Stack, tmp_path: Path) -> None:
    write_dataset(tmp_path / "few", 12)
    assert stack.detflow("datasets", "import", str(tmp_path / "few")).code == 0
    made = stack.detflow("versions", "create", "--dataset", "few", "--name", "few")
    assert made.code == 0, made.err
    for settings, words in (
        (("--model", "yolov9n"), "yolov9n"),
        (("--batch", "0"), "batch"),
        (("--epochs", "1000000000"), "epochs"),
        (("--set", "lr0=nan"), "lr0"),
        (("--set", "lr0=5"), "lr0"),
        (("--set", "colour=red"), "colour"),
    ):
        done = stack.detflow("train", "few", *settings)
        assert done.code == 1, (settings, done)
        assert words in done.err and done.err.startswith("detflow: ")
    done = stack.detflow("train", "few", "--set", "lr0=fast")
    assert done.code == 2 and "lr0 must be a number" in done.err
    assert stack.detflow("trainings", "list", "--version", "few", "--json").json == {
        "trainings": []
    }


def test_second_stack_says_who_runs_and_commands_without_one_say_how_to_start(
    stack: Stack, tmp_path: Path
) -> None:
    second = detflow(stack.data_dir, "up", "--port", str(free_base_port()))
    assert second.code == 1
    assert f"pid {stack.process.pid}, {stack.url}" in second.err
    taken = detflow(tmp_path, "up", "--port", str(stack.port))
    assert taken.code == 1
    assert f"port {stack.port} is in use" in taken.err and "--port" in taken.err
    nobody = detflow(tmp_path, "models", "--address", f"127.0.0.1:{free_base_port()}")
    assert nobody.code == 1
    assert "start it with `detflow up`" in nobody.err
    shutil.rmtree(tmp_path)
