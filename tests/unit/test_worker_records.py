"""Records waiting for NATS: numbering, order and the bound."""

from __future__ import annotations

from detflow.v1.training_pb2 import EpochMetrics, StepMetrics
from detflow.v1.worker_pb2 import EpochRecord, WorkerRecord
from services.trainer.worker.records import Spool


def epoch(number: int) -> WorkerRecord:
    return WorkerRecord(epoch=EpochRecord(metrics=EpochMetrics(epoch=number)))


def steps(first: int) -> WorkerRecord:
    return WorkerRecord(steps=StepMetrics(first_step=first))


def drain(spool: Spool) -> list[WorkerRecord]:
    taken = []
    while (record := spool.peek()) is not None:
        spool.remove(record)
        taken.append(record)
    return taken


def test_full_spool_gives_up_log_lines_only_and_leaves_no_hole() -> None:
    spool = Spool("projects/p/versions/v/trainings/t", 3, max_records=4)
    spool.write(epoch(1))
    for line in "abc":
        spool.log(line)
    spool.write(epoch(2))
    spool.write(epoch(3))
    records = drain(spool)
    assert [record.seq for record in records] == [1, 2, 3, 4]
    assert [record.epoch.metrics.epoch for record in records if record.HasField("epoch")] == [
        *(1, 2, 3)
    ]
    assert [line for record in records for line in record.log.lines] == ["c"]
    assert spool.num_dropped == 2


def test_full_spool_gives_up_steps_after_log_lines_and_before_anything_else() -> None:
    spool = Spool("projects/p/versions/v/trainings/t", 3, max_records=3)
    for first in (1, 11):
        spool.write(steps(first))
    spool.log("newer than the steps")
    spool.write(steps(21))
    assert [record.steps.first_step for record in drain(spool)] == [1, 11, 21]
    for number in range(1, 3):
        spool.write(steps(number))
        spool.write(epoch(number))
    spool.write(epoch(3))
    kinds = [(record.steps.first_step, record.epoch.metrics.epoch) for record in drain(spool)]
    assert kinds == [(0, 1), (0, 2), (0, 3)]


def test_record_being_published_keeps_its_number_and_place() -> None:
    spool = Spool("projects/p/versions/v/trainings/t", 1, max_records=1)
    spool.log("first")
    first = spool.peek()
    assert first is not None and first.seq == 1
    spool.write(epoch(1))
    assert spool.peek() is first
    assert [record.seq for record in drain(spool)] == [1, 2]


def test_writer_learns_when_its_record_is_stored() -> None:
    spool = Spool("projects/p/versions/v/trainings/t", 1)
    stored = spool.write(epoch(1))
    assert not stored.done() and not spool.is_empty
    drain(spool)
    assert stored.result() == 1 and spool.is_empty


def test_fenced_spool_forgets_everything() -> None:
    spool = Spool("projects/p/versions/v/trainings/t", 1)
    stored = spool.write(epoch(1))
    spool.clear()
    assert stored.cancelled() and spool.peek() is None
