"""Blocks of steps: when they are written and what is in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from detflow.v1.training_pb2 import StepMetrics
from services.trainer.worker.records import Spool
from tests.quiet_library import quiet_library

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")


class Blocks:
    """Blocks of a training of 2,000 steps an epoch, and a clock that the test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from services.trainer.worker import steps

        self.now = 100.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(steps, "time", clock)
        self.spool = Spool("projects/p/versions/v/trainings/t", 3)
        self.blocks = steps.StepBlocks(self.spool, 3, 2000)

    def add(self, epoch: int, number: int, memory_bytes: int = 1) -> None:
        from services.trainer.worker.loop import Step

        values: dict[str, Any] = {
            "losses": {"box_loss": -1.0},
            "learning_rate": 0.01,
            "data_wait_share": -1.0,
            "loader_shares": {},
            "own_losses": {"box_loss": float(number)},
            "own_wait_share": 0.25,
            "images_per_second": 8.0,
        }
        self.blocks.add(Step(epoch=epoch, number=number, **values), memory_bytes)

    def written(self) -> list[StepMetrics]:
        found = []
        while (record := self.spool.peek()) is not None:
            self.spool.remove(record)
            found.append(record.steps)
        return found


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    return Blocks(monkeypatch)


def test_block_is_written_after_512_steps_and_at_the_end_of_the_epoch(blocks: Blocks) -> None:
    for number in range(1, 601):
        blocks.add(2, number, memory_bytes=number)
    assert blocks.blocks.end_epoch() == 600
    assert blocks.blocks.end_epoch() == 0
    first, second = blocks.written()
    assert [(one.attempt, one.epoch, one.num_steps) for one in (first, second)] == [
        (3, 2, 2000)
    ] * 2
    assert (first.first_step, second.first_step) == (1, 513)
    columns = {column.name: list(column.values) for column in second.columns}
    assert columns == {
        "train/box_loss": [float(number) for number in range(513, 601)],
        "lr": [0.01] * 88,
        "images_per_second": [8.0] * 88,
        "data_wait_share": [0.25] * 88,
        "memory_bytes": [float(number) for number in range(513, 601)],
    }


def test_block_is_written_when_its_first_step_is_five_seconds_old(blocks: Blocks) -> None:
    for number in range(1, 5):
        blocks.add(1, number)
        blocks.now += 2.4
    (block,) = blocks.written()
    assert (block.first_step, len(block.columns[0].values)) == (1, 4)
    blocks.add(1, 5)
    assert not blocks.written()
    blocks.blocks.flush()
    (block,) = blocks.written()
    assert (block.first_step, len(block.columns[0].values)) == (5, 1)
