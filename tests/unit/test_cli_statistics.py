"""What the statistics of a dataset and the leak report of a version look like."""

import pytest

from detflow.cli.statistics import say_leaks, say_statistics
from detflow.v1 import common_pb2, dataset_pb2, preprocess_pb2, version_pb2

_Statistics = dataset_pb2.DatasetStatistics


def test_statistics_are_drawn_as_bars(capsys: pytest.CaptureFixture[str]) -> None:
    say_statistics(
        _Statistics(
            num_images=3,
            num_boxes=9,
            classes=[
                _Statistics.ClassCount(class_name="[red]세포", num_boxes=8, num_images=2),
                _Statistics.ClassCount(class_name="a\x1b[31m", num_boxes=1, num_images=1),
                _Statistics.ClassCount(class_name="none"),
            ],
            boxes_per_image=_Statistics.Histogram(edges=[0, 1, 2, 5, 8], counts=[0, 1, 0, 2]),
            box_sizes=_Statistics.Histogram(edges=[0, 0.01, 0.02, 1], counts=[0, 9, 0]),
            suspicions=[
                _Statistics.Suspicion(
                    kind=_Statistics.Suspicion.TINY_BOX, num_total=7, examples=list("abcde")
                )
            ],
        )
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "3 images (0 without boxes), 9 boxes, 3 classes"
    classes = {line.split()[0]: line.split()[1:] for line in lines[3:6]}
    assert classes == {
        "[red]세포": ["2", "8", "█" * 32],
        "a\ufffd[31m": ["1", "1", "█" * 4],
        "none": ["0", "0"],
    }
    assert "5 - 7                 2  " + "█" * 32 in lines
    # Empty bins at the ends are left out, those of whole numbers are not.
    assert sum(" %" in line for line in lines) == 1
    assert lines[-5:] == ["7 boxes with a side of less than 3 px:", "  a", "  b", "  c", "  ..."]


def test_leaks_come_first_and_classes_with_their_shares(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Group = preprocess_pb2.LeakReport.Group
    say_leaks(
        preprocess_pb2.LeakReport(
            group_by=version_pb2.GROUP_BY_NEAR_DUPLICATES,
            num_groups=12,
            num_grouped_images=30,
            num_leaking_groups=1,
            groups=[
                Group(num_images=2, paths=["a.jpg", "b.jpg"]),
                *[Group(num_images=3, split=common_pb2.SPLIT_VAL) for _ in range(11)],
            ],
            num_boxes_by_class=[
                version_pb2.SplitCounts(train=7, val=2, test=1),
                version_pb2.SplitCounts(),
            ],
        ),
        ["cell", "none"],
    )
    out = capsys.readouterr().out
    assert "30 images in 12 groups of images that look the same" in out
    assert "1 group in more than one split" in out
    assert "cell   7 (70.0%)  2 (20.0%)  1 (10.0%)" in out
    assert out.index("LEAK: 2 images\n  a.jpg\n  b.jpg") < out.index("val: 3 images")
    assert "and 2 more groups" in out
