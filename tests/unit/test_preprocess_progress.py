"""What is told of work under way and of work given up."""

import errno
from typing import cast

from detflow.errors import DataLoss
from detflow.events import Bus
from detflow.v1.common_pb2 import Progress
from services.preprocess.checking import SampleEntry, group_samples
from services.preprocess.entries import Entry, Storage
from services.preprocess.leases import tell
from services.preprocess.progress import ProgressReporter
from services.preprocess.shards import MAX_SOURCE_BYTES


class Recorder:
    """A bus that keeps what is published."""

    def __init__(self) -> None:
        self.published: list[Progress] = []

    async def publish(self, subject: str, payload: bytes) -> None:
        """Keeps a message."""
        assert subject == "detflow.progress.dataset.d"
        self.published.append(Progress.FromString(payload))


async def test_progress_is_throttled_never_falls_and_ends_at_a_hundred() -> None:
    recorder = Recorder()
    reporter = ProgressReporter(cast(Bus, recorder), "detflow.progress.dataset.d")
    await reporter.update("read")
    for done in range(0, 1001):
        await reporter.update("check", done, 1000)
    await reporter.update("store", 1, 1000)
    seen = recorder.published
    assert [p.stage for p in seen][:2] == ["read", "check"]
    percents = [p.percent for p in seen]
    assert percents == sorted(percents)
    assert percents[-1] == 100.0
    assert len(seen) <= 5 + 10 * (seen[-1].elapsed_seconds + 0.1)


async def test_stages_that_are_not_the_whole_work_share_the_percentage() -> None:
    recorder = Recorder()
    spans = {"download": (0.0, 20.0), "check": (20.0, 100.0)}
    reporter = ProgressReporter(cast(Bus, recorder), "detflow.progress.dataset.d", spans)
    for stage, done in (("download", 1), ("download", 2), ("check", 0), ("check", 2)):
        await reporter.update(stage, done, 2)
    shown = [(p.stage, p.percent) for p in recorder.published]
    assert shown == [("download", 10.0), ("download", 20.0), ("check", 20.0), ("check", 100.0)]


def test_what_is_given_up_says_why_and_hides_what_is_internal() -> None:
    lost = DataLoss("gone")
    assert tell(lost, "import") is lost
    full = tell(OSError(errno.ENOSPC, "No space left on device"), "import")
    assert (full.code.name, full.reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL")
    unknown = tell(ValueError("secret"), "import")
    assert unknown.code.name == "INTERNAL"
    assert "secret" not in unknown.message


def test_samples_are_grouped_in_order_within_the_limits() -> None:
    sizes = [10, MAX_SOURCE_BYTES, 10, 10, MAX_SOURCE_BYTES + 1, *[5] * 40]
    samples = [
        SampleEntry(Entry(f"{i}.jpg", 0, 1, size, 0, Storage.PLAIN), None)
        for i, size in enumerate(sizes)
    ]
    groups = group_samples(samples)
    assert [s for group in groups for s in group] == samples
    for group in groups:
        total = sum(s.image.size_bytes for s in group)
        assert total <= MAX_SOURCE_BYTES or len(group) == 1
    assert group_samples([]) == []
