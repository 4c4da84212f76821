from pathlib import Path

import cv2
import yaml

from detflow.local.demo_data import CLASS_NAMES, SIDE_PX, write_dataset


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_more_images_keep_the_first(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", 6, seed=3)
    write_dataset(tmp_path / "b", 6, seed=3)
    write_dataset(tmp_path / "c", 9, seed=3)
    write_dataset(tmp_path / "d", 6, seed=4)
    first = contents(tmp_path / "a")
    assert len(first) == 13
    assert contents(tmp_path / "b") == first
    assert first.items() <= contents(tmp_path / "c").items()
    assert contents(tmp_path / "d")["images/shapes-0000.jpg"] != first["images/shapes-0000.jpg"]


def test_labels_are_boxes_inside_the_image_of_every_class(tmp_path: Path) -> None:
    write_dataset(tmp_path, 30)
    assert yaml.safe_load((tmp_path / "data.yaml").read_text()) == {
        "names": dict(enumerate(CLASS_NAMES))
    }
    classes = set()
    for path in (tmp_path / "labels").iterdir():
        image = cv2.imread(str(tmp_path / "images" / f"{path.stem}.jpg"))
        assert image is not None and image.shape == (SIDE_PX, SIDE_PX, 3)
        rows = path.read_text().splitlines()
        assert 1 <= len(rows) <= 4
        for row in rows:
            index, *box = row.split()
            cx, cy, width, height = map(float, box)
            assert 0 <= cx - width / 2 and cx + width / 2 <= 1
            assert 0 <= cy - height / 2 and cy + height / 2 <= 1
            assert width > 0.1 and height > 0.1
            classes.add(int(index))
    assert classes == {0, 1, 2}
