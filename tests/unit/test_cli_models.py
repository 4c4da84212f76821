"""The command line's models, trainings, exports and weights against fakes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from detflow import errors
from detflow.cli import output
from detflow.cli.catalogue import language
from detflow.v1 import common_pb2, export_pb2, trainer_pb2, training_pb2
from tests.cli_rig import Rig, rig
from tests.surface_rig import FILE, TRAINING, VERSION

Watched = trainer_pb2.WatchTrainingResponse
State = training_pb2.Training.State


__all__ = ["rig"]


def training(**fields: Any) -> training_pb2.Training:
    given = {"name": TRAINING, "model": "yolov8n", "batch_size": 16, "epochs": 3, **fields}
    return training_pb2.Training(**given)


def test_models_are_listed_with_family_input_and_licence(rig: Rig) -> None:
    header, row = rig.run("models").out.splitlines()
    assert header.split() == ["ID", "NAME", "FAMILY", "INPUT", "PARAMETERS", "LICENCE"]
    assert "efficientdet-d0" in row and "512 px" in row and "Apache-2.0" in row


def test_hyperparameters_show_ranges_and_defaults_of_each_family(rig: Rig) -> None:
    lines = rig.run("hyperparameters").out.splitlines()
    assert lines[0].split() == ["NAME", "TYPE", "RANGE", "DEFAULT", "HELP"]
    assert "32..2048 by 32; efficientdet: 128..1536 by 128" in lines[1]
    assert "efficientdet: 512; yolov8: 640" in lines[1] and "Side of the square." in lines[1]
    assert "SGD, AdamW" in lines[3] and "choice" in lines[3]
    assert lines[4].split()[:5] == ["cos_lr", "boolean", "true,", "false", "false"]
    of_family = rig.run("hyperparameters", "--family", "efficientdet").out
    assert "128..1536 by 128  512" in of_family and "dfl" not in of_family
    as_json = rig.run("hyperparameters", "--family", "yolov8", "--json").json
    assert as_json["hyperparameters"][1]["defaults"] == {"yolov8": 1.5}
    unknown = rig.run("hyperparameters", "--family", "yolov9")
    assert unknown.code == 1 and "one of efficientdet, yolov8" in unknown.err


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "C", "LC_MESSAGES": "ko"}, "ko"),
        ({"LANG": "de_DE"}, "en"),
        ({}, "en"),
    ],
)
def test_language_is_that_of_the_locale(environ: dict[str, str], expected: str) -> None:
    assert language(environ) == expected


def test_hyperparameters_speak_korean(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.delenv("LC_MESSAGES", raising=False)
    monkeypatch.setenv("LANG", "ko_KR.UTF-8")
    out = rig.run("hyperparameters").out
    assert "정사각형의 한 변." in out and "Side of" not in out


def test_check_prints_what_was_tried_and_what_it_will_take(rig: Rig) -> None:
    checks = [
        training_pb2.Preflight.Check(name="labels", detail="240 of 240", seconds=0.04),
        training_pb2.Preflight.Check(name="train_step", detail="batch 16", seconds=0.8),
    ]
    rig.fakes.trainer.preflight = training_pb2.Preflight(
        checks=checks,
        device="cpu",
        memory_bytes=1_500_000_000,
        disk_bytes=20_000_000,
        step_seconds=0.25,
        total_seconds=3700,
    )
    done = rig.run("train", "V_0", "--model", "yolov8n", "--check")
    assert done.code == 0, done.err
    assert "train_step  0.8 s  batch 16" in done.out
    assert "1.5 GB" in done.out and "20 MB" in done.out and "about 1:01:40" in done.out
    assert rig.fakes.trainer.started[0].validate_only
    as_json = rig.run("train", "V_0", "--check", "--json").json
    assert as_json["preflight"]["memoryBytes"] == "1500000000"


def test_check_that_fails_is_one_line_with_the_remedy(rig: Rig) -> None:
    rig.fakes.trainer.refusal = errors.FailedPrecondition(
        "a step needs 9 GB, 8 GB are free; use a smaller batch", reason="OUT_OF_MEMORY"
    )
    done = rig.run("train", "V_0", "--check")
    assert (done.code, done.err) == (
        1,
        "detflow: a step needs 9 GB, 8 GB are free; use a smaller batch\n",
    )


def test_train_takes_priority_devices_and_nodes(rig: Rig) -> None:
    options = ("--priority", "-3", "--devices", "2", "--nodes", "4", "--detach")
    assert rig.run("train", "V_0", *options).code == 0
    asked = rig.fakes.trainer.started[0].training
    assert asked.priority == -3
    assert (asked.resources.num_devices_per_node, asked.resources.num_nodes) == (2, 4)
    assert rig.run("train", "V_0", "--devices", "0").code == 2


def test_warm_start_takes_a_file_weights_or_a_training(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"x" * 10)
    sources = []
    rig.fakes.trainer.trainings = [training()]
    for text in ("best.pt", "best.pt", "w", "V_0", "t", TRAINING, "projects/default/weights/w"):
        done = rig.run("train", "V_0", "--warm-start", text, "--detach", "--json")
        assert done.code == 0, done.err
        asked = rig.fakes.trainer.started[-1].training.warm_start
        sources.append(asked.weights or asked.training)
    weights = "projects/default/weights/w"
    assert sources == [weights, weights, weights, TRAINING, TRAINING, TRAINING, weights]
    assert len(rig.fakes.weights.kept) == 1
    missing = rig.run("train", "V_0", "--warm-start", "none.pt")
    assert missing.code == 1
    assert "'none.pt' is no file and names no weights and no training" in missing.err


def test_trainings_show_queue_priority_steps_and_warm_start(rig: Rig) -> None:
    rig.fakes.trainer.trainings = [
        training(state=State.QUEUED, queue_position=2, priority=5),
        training(
            name=f"{VERSION}/trainings/s",
            state=State.RUNNING,
            step_batch_size=4,
            warm_start=training_pb2.WarmStart(training=TRAINING),
            preflight=training_pb2.Preflight(
                checks=[training_pb2.Preflight.Check(name="memory", detail="fits")]
            ),
        ),
    ]
    header, waiting, running = rig.run("trainings", "list").out.splitlines()
    assert header.split()[:5] == ["VERSION", "STATE", "QUEUE", "PRIORITY", "MODEL"]
    assert waiting.split()[:6] == ["V_0", "QUEUED", "2", "5", "yolov8n", "16"]
    assert "16 in steps of 4" in running and running.split()[2] == "-"
    assert "place 2 in the queue" in rig.run("trainings", "show", "t").out
    shown = rig.run("trainings", "show", "s").out
    assert f"warm start  {TRAINING}" in shown and "16 in steps of 4" in shown
    assert "memory" in shown and "fits" in shown


def test_training_that_waits_says_whether_it_was_checked(rig: Rig) -> None:
    found = training_pb2.Preflight(
        checks=[training_pb2.Preflight.Check(name="labels", detail="fine")], device="cpu"
    )
    checked = training(state=State.QUEUED, queue_position=3, preflight=found)
    rig.fakes.trainer.trainings = [checked]
    shown = rig.run("trainings", "show", "t").out
    assert "QUEUED, checked, place 3 in the queue" in shown
    assert "fine" in shown and "whole training" not in shown  # of the GPU to come
    rig.fakes.trainer.trainings = [training(state=State.SUCCEEDED)]
    problem = training_pb2.LogLines(lines=["tried while it waits, without a result: out of memory"])
    rig.fakes.trainer.watched = [
        Watched(training=checked),
        Watched(progress=training_pb2.TrainingProgress(stage="preflight", step=3, num_steps=7)),
        Watched(log=problem),
        Watched(training=training(state=State.SUCCEEDED)),
    ]
    lines = rig.run("trainings", "watch", "t").out.splitlines()
    assert any(line.startswith("QUEUED 0% place 3 in the queue, checked, elap") for line in lines)
    assert problem.lines[0] in lines


def test_priority_may_be_negative(rig: Rig) -> None:
    rig.fakes.trainer.trainings = [training(state=State.QUEUED)]
    done = rig.run("trainings", "priority", "t", "-5")
    assert (done.code, done.out) == (0, "priority -5, place 1 in the queue\n")
    assert rig.fakes.trainer.updated[0].training.priority == -5
    assert rig.run("trainings", "priority", "t", "high").code == 2


def test_live_training_shows_queue_waiting_for_data_and_smaller_steps(rig: Rig) -> None:
    progress = training_pb2.TrainingProgress
    rig.fakes.trainer.trainings = [training(state=State.SUCCEEDED)]
    rig.fakes.trainer.watched = [
        Watched(training=training(state=State.QUEUED, queue_position=3)),
        Watched(progress=progress(stage="queue", queue_position=2)),
        Watched(training=training(state=State.PROVISIONING, step_batch_size=16)),
        Watched(progress=progress(stage="check")),
        Watched(training=training(state=State.RUNNING, step_batch_size=16)),
        Watched(
            progress=progress(
                stage="train",
                epoch=1,
                num_epochs=3,
                percent=15,
                data_wait_share=0.42,
                loader_shares={"decode": 0.7, "augment": 0.3},
            )
        ),
        Watched(training=training(state=State.QUEUED, step_batch_size=8, attempt=1)),
        Watched(training=training(state=State.RUNNING, step_batch_size=8, attempt=2)),
        Watched(training=training(state=State.SUCCEEDED, step_batch_size=8)),
    ]
    lines = rig.run("trainings", "watch", "t").out.splitlines()
    assert any(line.startswith("QUEUED 0% place 3 in the queue") for line in lines)
    [waits] = [line for line in lines if "epoch 1/3" in line]
    assert waits.endswith("waits for data 42% of the time, mostly decode")
    [note] = [line for line in lines if "memory ran out" in line]
    assert "steps of 8 images" in note and "still sees 16" in note


def test_export_is_made_followed_downloaded_and_checked(rig: Rig, tmp_path: Path) -> None:
    rig.fakes.trainer.trainings = [training(state=State.SUCCEEDED)]
    options = ("--precision", "fp16", "--image-size", "320", "--batch", "2", "--dynamic")
    more = ("--simplify", "--opset", "18", "--end-to-end", "-o", "model.onnx")
    done = rig.run("export", "V_0", "--format", "onnx", *options, *more)
    assert done.code == 0, done.err
    assert (tmp_path / "model.onnx").read_bytes() == FILE
    assert "convert 40%" in done.out and "download 100%" in done.out
    assert "wrote model.onnx (2.56 MB)" in done.out and "0.0001 px" in done.out
    asked = rig.fakes.exports.created[0].export
    assert (asked.precision, asked.image_size_px, asked.batch_size, asked.opset) == (2, 320, 2, 18)
    assert asked.dynamic and asked.simplify and asked.end_to_end

    as_json = rig.run("export", "V_0", "--format", "onnx", "--json")
    assert as_json.json["state"] == "SUCCEEDED"
    assert (tmp_path / "yolov8n-t.onnx").read_bytes() == FILE

    listed = rig.run("exports", "list", "V_0").out.splitlines()
    assert len(listed) == 3 and "2 x 320 px, dynamic" in listed[2]
    name = as_json.json["name"]
    (tmp_path / "models").mkdir()
    assert rig.run("exports", "download", name, "-o", "models").code == 0
    assert (tmp_path / "models" / "yolov8n-t.onnx").exists()
    assert rig.run("exports", "delete", name).code == 0
    assert len(rig.run("exports", "list", "V_0", "--json").json["exports"]) == 1


def test_export_that_fails_says_why_and_leaves_no_file(rig: Rig, tmp_path: Path) -> None:
    rig.fakes.trainer.trainings = [training()]
    rig.fakes.exports.outcome = export_pb2.Export.FAILED
    done = rig.run("export", "V_0", "--format", "onnx")
    assert (done.code, done.err) == (1, "detflow: differs by 3 px\n")
    assert [*tmp_path.iterdir()] == []


def test_ctrl_c_cancels_the_export(rig: Rig) -> None:
    rig.fakes.trainer.trainings = [training()]
    exports = rig.fakes.exports
    exports.outcome = export_pb2.Export.CANCELLED

    # What a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        exports.was_cancelled.wait(20)

    exports.on_watch = interrupt
    try:
        done = rig.run("export", "V_0", "--format", "onnx")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130
    assert exports.cancelled == [f"{TRAINING}/exports/e0"]
    assert done.err == f"detflow: cancelled {TRAINING}/exports/e0\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "V_0"), "--format"),
        (("export", "V_0", "--format", "tflite"), "onnx, openvino, pytorch, not 'tflite'"),
        (("export", "V_0", "--format", "onnx", "--precision", "fp8"), "fp32, fp16, int8"),
        (("export", "V_0", "--format", "onnx", "-o", "nowhere/a.onnx"), "no folder nowhere"),
        (("exports", "download", "e", "-o", "nowhere/a.onnx"), "no folder nowhere"),
    ],
)
def test_wrong_export_is_refused_before_anything_is_made(
    rig: Rig, arguments: tuple[str, ...], words: str
) -> None:
    done = rig.run(*arguments)
    assert done.code == 2
    [line] = done.err.splitlines()
    assert words in line and rig.fakes.exports.created == []


def test_weights_are_uploaded_listed_and_deleted(rig: Rig, tmp_path: Path) -> None:
    assert "detflow weights upload FILE" in rig.run("weights", "list").out
    (tmp_path / "best.pt").write_bytes(b"x" * 2000)
    done = rig.run("weights", "upload", "best.pt")
    assert done.code == 0 and "uploaded best.pt" in done.out and "upload 100%" in done.out
    assert "--warm-start projects/default/weights/w" in done.out
    named = rig.run("weights", "upload", "best.pt", "--name", "가중치", "--json").json
    assert json.dumps(named["displayName"], ensure_ascii=False) == '"가중치"'
    assert len(rig.run("weights", "list").out.splitlines()) == 3
    assert rig.run("weights", "delete", "가중치").out == "deleted 가중치\n"
    assert len(rig.run("weights", "list", "--json").json["weights"]) == 1
    missing = rig.run("weights", "upload", "none.pt")
    assert missing.code == 1 and "cannot read none.pt" in missing.err


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_560_000, "2.56 MB"), (999_600_000, "1 GB")],
)
def test_sizes_read_in_three_digits(num_bytes: int, text: str) -> None:
    assert output.size(num_bytes) == text


def test_download_progress_speaks_of_megabytes() -> None:
    from detflow.cli.datasets import rate

    progress = common_pb2.Progress(stage="download", num_done=1_500_000, num_total=3_000_000)
    assert rate(progress) == "1.5 of 3.0 MB"
