"""What a user sees of statistics, leaks and the users of a dataset."""

from pathlib import Path

import cv2
import pytest

from detflow.local.demo_data import write_dataset
from tests.stack_rig import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_a_flipped_copy_is_found_kept_together_and_reported(stack: Stack, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    write_dataset(folder, 12)
    picture = cv2.imread(str(folder / "images" / "shapes-0003.jpg"))
    assert picture is not None
    cv2.imwrite(str(folder / "images" / "shapes-0003-flipped.jpg"), cv2.flip(picture, 1))
    assert stack.detflow("datasets", "import", str(folder)).code == 0

    drawn = stack.detflow("datasets", "stats", "copied")
    assert "13 images (1 without boxes)" in drawn.out
    assert "images/shapes-0003-flipped.jpg = images/shapes-0003.jpg" in drawn.out
    assert "█" in drawn.out

    made = stack.detflow("versions", "create", "--dataset", "copied", "--name", "apart", "--json")
    leaks = stack.detflow("versions", "leaks", "apart", "--json").json
    assert (leaks["numGroups"], leaks["numLeakingGroups"]) == ("1", "0")
    assert leaks["numSources"] == {"train": "9", "val": "3", "test": "1"}

    refused = stack.detflow("datasets", "delete", "copied")
    assert refused.code == 1
    assert f"{made.json['name']}: DATASET_IN_USE" in refused.err
