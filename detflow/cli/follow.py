"""A training on the screen: its progress, and what came of it."""

import sys
import time
from collections.abc import Sequence

import typer

from detflow.cli import output
from detflow.cli.session import Session
from detflow.client.trainings import LIVE_STATES
from detflow.errors import from_status
from detflow.v1 import analysis_pb2, common_pb2, metrics_pb2, training_pb2

_State = training_pb2.Training.State
_QUEUED = training_pb2.Training.QUEUED
_NOTABLE_WAIT_SHARE = 0.05


def follow(s: Session, name: str, *, ask: bool = True) -> training_pb2.Training:
    """Shows a training's progress until it has ended, and returns it.

    Ctrl-C leaves the training running, or pauses it if the user says so; without `ask` it goes on
    to the caller.
    """
    try:
        with s.bar() as bar:
            display = _Display(bar)
            for message in s.client.trainings.watch(name):
                if message.HasField("training"):
                    display.on_training(message.training)
                elif message.HasField("progress"):
                    display.on_progress(message.progress)
                elif message.HasField("epoch"):
                    display.on_epoch(message.epoch)
                elif message.HasField("log"):
                    display.on_log(message.log.lines)
    except KeyboardInterrupt:
        if not ask:
            raise
        _interrupted(s, name)
        raise typer.Exit(0) from None
    return s.client.trainings.get(name)


def _interrupted(s: Session, name: str) -> None:
    if sys.stdin.isatty() and not s.json:
        try:
            if typer.confirm("\nThe training goes on. Pause it?", default=False):
                s.client.trainings.stop(name, mode="pause")
                output.say(f"pausing; go on with `detflow trainings resume {name}`")
                return
        except typer.Abort:
            output.say()
    output.complain(
        f"the training goes on: see it with `detflow trainings watch {name}`, stop it with"
        f" `detflow trainings stop {name}`"
    )


class _Display:
    """Turns the messages of a watch into the state of a progress bar."""

    def __init__(self, bar: output.Bar) -> None:
        self._bar = bar
        self._create_time = time.time()
        self._state = _State.Name(_QUEUED)
        self._percent = 0.0
        self._map50 = ""
        self._step_batch_size = 0
        self._queue_position = 0
        self._check = ""

    def on_training(self, training: training_pb2.Training) -> None:
        self._note_steps(training)
        self._state = _State.Name(training.state)
        self._create_time = training.create_time.ToNanoseconds() / 1e9
        if training.state in (_QUEUED, training_pb2.Training.PROVISIONING):
            self._percent = 0.0
            details = f"attempt {training.attempt}, " if training.attempt > 1 else ""
            self._queue_position = training.queue_position
            is_checked = training.state == _QUEUED and training.HasField("preflight")
            self._check = "checked, " if is_checked else ""
            self._show(f"{details}{self._waiting()}")
        else:
            self._show(f"elapsed {self._elapsed()}{self._map50}")

    def on_progress(self, progress: training_pb2.TrainingProgress) -> None:
        if progress.stage == "queue":
            self._queue_position = progress.queue_position
            self._show(self._waiting())
            return
        if progress.stage == "preflight":
            self._check = f"preflight {progress.step}/{progress.num_steps}, "
            self._show(self._waiting())
            return
        if not progress.epoch:
            self._show(f"{progress.stage}, {self._waiting()}")
            return
        self._percent = max(self._percent, progress.percent)
        left = "calculating" if self._percent < 1 else ""
        if progress.HasField("eta_seconds"):
            left = output.duration(progress.eta_seconds)
        losses = " ".join(
            f"{name.removesuffix('_loss')} {value:.3f}"
            for name, value in sorted(progress.losses.items())
        )
        self._show(
            f"epoch {progress.epoch}/{progress.num_epochs}, elapsed {self._elapsed()}"
            + (f", left {left}" if left else "")
            + (f", losses {losses}" if losses else "")
            + self._map50
            + _data_wait(progress)
        )

    def on_epoch(self, epoch: training_pb2.EpochMetrics) -> None:
        if "val/map50" in epoch.values:
            self._map50 = f", mAP50 {epoch.values['val/map50']:.3f}"

    def on_log(self, lines: Sequence[str]) -> None:
        """Shows why a training that waits could not be tried."""
        if self._state == _State.Name(_QUEUED):
            self._check = ""
            for line in lines:
                self._bar.note(line)

    def _note_steps(self, training: training_pb2.Training) -> None:
        """Says once that memory ran out, and what is done about it."""
        known = self._step_batch_size or training.batch_size
        self._step_batch_size = training.step_batch_size
        if 0 < training.step_batch_size < known:
            self._bar.note(
                f"memory ran out: steps of {training.step_batch_size} images from now on; every"
                f" update of the weights still sees {training.batch_size}"
            )

    def _waiting(self) -> str:
        place = f"place {self._queue_position} in the queue, " if self._queue_position else ""
        return f"{place}{self._check}elapsed {self._elapsed()}, left: calculating"

    def _elapsed(self) -> str:
        """Renders the time since the training was queued: the same for every watcher."""
        return output.duration(max(time.time() - self._create_time, 0.0))

    def _show(self, details: str) -> None:
        self._bar.update(self._state, self._percent, details)


def _data_wait(progress: training_pb2.TrainingProgress) -> str:
    """Renders the share of time spent waiting for data, and what makes it slow."""
    if progress.data_wait_share < _NOTABLE_WAIT_SHARE:
        return ""
    shares = progress.loader_shares
    cause = f", mostly {max(shares, key=lambda name: shares[name])}" if shares else ""
    return f", waits for data {progress.data_wait_share:.0%} of the time{cause}"


def finish(s: Session, training: training_pb2.Training) -> None:
    """Prints what came of a training that has ended.

    Raises:
        DetflowError: What it failed of.
        Exit: With 1, if it was paused or given up.
    """
    if training.state == training_pb2.Training.FAILED:
        raise from_status(training.failure.status)
    evaluations = s.client.metrics.evaluations(training.name)
    if s.json:
        output.say_json(
            {
                "training": output.as_dict(training),
                "evaluations": [output.as_dict(evaluation) for evaluation in evaluations],
            }
        )
    elif evaluations:
        output.say(f"{_State.Name(training.state)} {training.name}")
        say_evaluations(evaluations)
    if training.state in LIVE_STATES or (
        training.state != training_pb2.Training.SUCCEEDED and not evaluations
    ):
        output.complain(
            f"the training is {_State.Name(training.state)} after {training.num_epochs_done} of"
            f" {training.epochs} epochs"
            + (
                f": go on with `detflow trainings resume {training.name}`"
                if training.state == training_pb2.Training.PAUSED
                else ""
            )
        )
        raise typer.Exit(1)


def say_evaluations(evaluations: Sequence[metrics_pb2.Evaluation]) -> None:
    """Prints evaluations as a table, then the classes of the first split measured."""
    measured = [e for e in evaluations if e.state == metrics_pb2.Evaluation.SUCCEEDED]
    output.say_table(
        (
            "SPLIT",
            "mAP50-95",
            "mAP50",
            "mAP75",
            "PRECISION",
            "RECALL",
            "F1",
            "AT CONFIDENCE",
            "IMAGES",
        ),
        (
            (
                split_name(evaluation),
                figure(evaluation.coco.map50_95),
                figure(evaluation.coco.map50),
                figure(evaluation.coco.map75),
                *operating_point(evaluation),
                f"{evaluation.num_images}",
            )
            for evaluation in measured
        ),
        empty="not measured yet",
    )
    for evaluation in evaluations:
        if evaluation.state == metrics_pb2.Evaluation.FAILED:
            output.say(
                f"{split_name(evaluation)} could not be measured:"
                f" {output.printable(evaluation.failure.status.message)}"
            )
    if measured:
        output.say()
        output.say_table(
            (
                f"CLASS ({split_name(measured[0])})",
                "AP50-95",
                "AP50",
                "PRECISION",
                "RECALL",
                "F1",
                "AT CONFIDENCE",
                "BOXES",
            ),
            (
                (
                    one.class_name,
                    figure(one.ap50_95),
                    figure(one.ap50),
                    *operating_point(one),
                    f"{one.num_ground_truths}",
                )
                for one in measured[0].classes
            ),
            empty="no classes",
        )


def split_name(evaluation: metrics_pb2.Evaluation) -> str:
    """Returns "val" or "test"."""
    return common_pb2.Split.Name(evaluation.split).removeprefix("SPLIT_").lower()


def operating_point(
    measured: metrics_pb2.Evaluation | metrics_pb2.ClassMetrics | analysis_pb2.ConfidenceCurve,
) -> tuple[str, str, str, str]:
    """Renders precision, recall, F1 and their threshold; dashes without ground truth."""
    if not measured.HasField("best_f1"):
        return ("-", "-", "-", "-")
    best = measured.best_f1
    return (
        figure(best.precision),
        figure(best.recall),
        figure(best.f1),
        f">= {best.confidence_threshold:.3f}",
    )


def figure(value: float) -> str:
    """Renders a figure of 0..1, or a dash where there was nothing to measure."""
    return f"{value:.3f}" if value >= 0 else "-"
