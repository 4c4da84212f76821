"""The page about Python, run as it is written against a whole stack."""

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from detflow.local.demo_data import write_dataset
from tests.stack_rig import Stack, end, free_base_port, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python.md"
# As little as a model learns anything from.
LITTLE = 'epochs=2, batch_size=4, hyperparameters={"image_size": 64, "mosaic": 0}'


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = start(tmp_path / "data", free_base_port())
    try:
        yield stack
    finally:
        end(stack, signal.SIGTERM)


def test_page_about_python_runs_from_top_to_bottom(
    stack: Stack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETFLOW_DATA_DIR", str(stack.data_dir))
    write_dataset(tmp_path / "cells", 40)
    shutil.make_archive("cells", "zip", tmp_path / "cells")
    first, second, *_ = sorted((tmp_path / "cells").rglob("*.jpg"))
    shutil.copy(first, "a.jpg")
    shutil.copy(second, "b.jpg")

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = "\n".join(blocks)
    address = f'"127.0.0.1:{stack.port}"'
    for there, here in (("Client()", f"Client({address})"), ("epochs=20", LITTLE)):
        assert there in code
        code = code.replace(there, here)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec"), names)

    out, err = capsys.readouterr()
    assert "Evaluation on val" in out and "no such version" in out
    for stage in ("upload 100%", "train, epoch 2/2", "download 100%"):
        assert stage in err
    assert names["path"].stat().st_size == names["export"].object.size_bytes > 0
    assert not [*Path().glob(".*.partial")]
