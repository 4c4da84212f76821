"""What `detflow results` and `client.results` ask for, show and write."""

import json
from pathlib import Path

import pytest

from detflow.client import Client
from detflow.errors import InvalidArgument
from detflow.v1 import analysis_pb2, common_pb2, inference_pb2, training_pb2
from tests.cli_rig import Rig, rig
from tests.surface_rig import TRAINING

__all__ = ["rig"]

Detection = inference_pb2.Detection
Truth = inference_pb2.GroundTruth
Request = inference_pb2.ListInferenceResultsRequest
WRONG = Detection.FALSE_POSITIVE


def result(
    number: int, detections: list[Detection], truths: list[Truth]
) -> inference_pb2.InferenceResult:
    return inference_pb2.InferenceResult(
        name=f"{TRAINING}/inferenceResults/val-{number}",
        image_path=f"폴더/{number}\x1b[31m.jpg",
        detections=detections,
        ground_truths=truths,
        num_true_positives=number,
        num_false_positives=sum(one.match == WRONG for one in detections),
        num_false_negatives=sum(not one.found for one in truths),
    )


@pytest.fixture(autouse=True)
def found(rig: Rig) -> None:
    rig.fakes.trainer.trainings = [training_pb2.Training(name=TRAINING)]
    confused = Detection(
        class_name="세포",
        confidence=0.876,
        match=WRONG,
        error_kind=analysis_pb2.ERROR_KIND_CLASS,
        ground_truth=0,
    )
    right = Detection(class_name="plate", confidence=0.99, match=Detection.TRUE_POSITIVE)
    missed = Truth(class_name="plate", error_kind=analysis_pb2.ERROR_KIND_MISSED)
    rig.fakes.metrics.results = [
        result(7, [right, confused], [Truth(class_name="plate")]),
        result(3, [], [Truth(class_name="cell", crowd=True, found=True), missed]),
        result(9, [right], [Truth(class_name="plate", found=True)]),
    ]


def test_table_names_the_image_its_counts_and_its_worst_error(rig: Rig) -> None:
    done = rig.run("results", "t")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == "IMAGE RIGHT WRONG NOT FOUND WORST ERROR RESULT".split()
    assert lines[1].split() == "폴더/7\ufffd[31m.jpg 7 1 1 class: 세포 0.88 on plate val-7".split()
    assert lines[2].split() == "폴더/3\ufffd[31m.jpg 3 0 1 missed: plate val-3".split()
    assert lines[3].split()[-2:] == ["-", "val-9"]
    assert lines[-1] == "3 of 3 images; detections count from confidence 0.25 on"


def test_options_become_filters(rig: Rig) -> None:
    words = "--split test --threshold 0.5 --class 세포 --class plate --error missed --error both"
    done = rig.run("results", "t", *words.split(), "--confused", "세포:", "--order", "image")
    assert done.code == 0
    asked, following = rig.fakes.metrics.asked
    assert asked == Request(
        parent=TRAINING,
        split=common_pb2.SPLIT_TEST,
        confidence_threshold=0.5,
        class_names=["세포", "plate"],
        error_kinds=[analysis_pb2.ERROR_KIND_MISSED, analysis_pb2.ERROR_KIND_BOTH],
        confusion=Request.ConfusionFilter(actual_class="세포"),
        order_by=Request.IMAGE,
        page_size=20,
    )
    asked.page_token, asked.page_size = "2", 18  # the first page held two
    assert following == asked
    rig.run("results", "t", "--limit", "1")
    asked = rig.fakes.metrics.asked[2]
    assert not asked.HasField("confidence_threshold") and not asked.HasField("confusion")
    assert asked.page_size == 1


def test_pictures_are_written_with_both_kinds_of_boxes(rig: Rig) -> None:
    done = rig.run("results", "t", "--save", "out/worst", "--limit", "2")
    assert done.code == 0
    written = {path.name: path.read_text() for path in Path("out/worst").iterdir()}
    assert written == {
        f"val-{number}.jpg": f"{TRAINING}/inferenceResults/val-{number} with boxes"
        for number in (7, 3)
    }
    assert len(rig.fakes.metrics.asked) == 3
    for asked in rig.fakes.metrics.asked[1:]:
        assert asked.draw_ground_truths and asked.confidence_threshold == 0.25
    assert "wrote 2 pictures into out/worst" in done.out


def test_json_is_the_answer_of_the_service_and_what_was_written(rig: Rig) -> None:
    document = json.loads(rig.run("results", "t", "--json", "--save", ".", "--limit", "2").out)
    assert document["totalSize"] == "3"
    assert document["inferenceResults"][0]["detections"][1]["errorKind"] == "ERROR_KIND_CLASS"
    assert document["saved"] == ["val-7.jpg", "val-3.jpg"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--split", "train"], "--split must be one of val, test, not 'train'"),
        (["--error", "bad"], "--error must be one of class, localization"),
        (["--order", "best"], "--order must be one of worst, image"),
        (["--confused", "cell"], "--confused must be ACTUAL:PREDICTED"),
        (["--confused", ":"], "--confused must be ACTUAL:PREDICTED"),
        (["--threshold", "2"], "'--threshold'"),
        (["--limit", "0"], "'--limit'"),
        (["--save", "/dev/null/x"], "--save /dev/null/x"),
    ],
)
def test_bad_usage_is_named(rig: Rig, options: list[str], problem: str) -> None:
    done = rig.run("results", "t", *options)
    assert done.code == 2
    assert problem in done.err
    assert not rig.fakes.metrics.asked


def test_client_goes_through_all_pages_and_writes_png_where_the_name_says_so(
    rig: Rig, tmp_path: Path
) -> None:
    with Client("127.0.0.1:1", environ=rig.fakes.environ) as client:
        names = [one.name.rsplit("-", 1)[1] for one in client.results.list(TRAINING)]
        assert names == ["7", "3", "9"]
        name = f"{TRAINING}/inferenceResults/val-3"
        assert client.results.get(name, threshold=0.5).num_true_positives == 3
        path = client.results.save_image(name, tmp_path / "a.PNG", truths=True, max_side_px=64)
        assert path.read_bytes() == name.encode()
        asked = rig.fakes.metrics.asked[-1]
        assert (asked.png, asked.draw_detections, asked.draw_ground_truths) == (True, False, True)
        assert asked.max_side_px == 64
        with pytest.raises(InvalidArgument, match="error_kinds: 'x' must be one of class, "):
            client.results.list(TRAINING, error_kinds=["x"]).__next__()
        with pytest.raises(InvalidArgument, match="name a file in a folder that is there"):
            client.results.save_image(name, tmp_path / "none" / "a.jpg")
