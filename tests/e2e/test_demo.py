from pathlib import Path

import psutil
import pytest

from detflow.local.running import running
from tests.stack_rig import detflow, free_base_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_demo_trains_a_good_model_and_leaves_no_process(tmp_path: Path) -> None:
    port = free_base_port()
    done = detflow(tmp_path, "demo", "--port", str(port), "--json", seconds=800)
    assert done.code == 0, done.err
    assert done.json["training"]["state"] == "SUCCEEDED"
    val, test = done.json["evaluations"]
    assert (val["split"], test["split"]) == ("SPLIT_VAL", "SPLIT_TEST")
    assert val["coco"]["map50"] > 0.9
    assert val["bestF1"]["precision"] > 0.8 and val["bestF1"]["recall"] > 0.8
    assert running(tmp_path) is None
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    assert left == []
