from pathlib import Path

import pytest

from services.trainer.executors.starvation import MemoryWatch

VMSTAT, MEMINFO = "proc/vmstat", "proc/meminfo"
EVENTS = "sys/fs/cgroup/pod/memory.events"
CONTROL = "sys/fs/cgroup/memory/pod/memory.oom_control"


class Machine:
    """What the kernel tells of memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tell("proc/self/cgroup", "4:cpu,memory:/pod\n0::/pod\n")
        self.tell(VMSTAT, "pgfault 9\noom_kill 3\n")
        self.free(0.5)

    def tell(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def free(self, share: float) -> None:
        kilobytes = int(1_000_000 * share)
        self.tell(MEMINFO, f"MemTotal: 1000000 kB\nMemAvailable: {kilobytes} kB\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        (VMSTAT, "oom_kill 3\n", "oom_kill 4\n"),
        (EVENTS, "low 0\noom_kill 0\n", "low 0\noom_kill 1\n"),
        (CONTROL, "under_oom 0\noom_kill 0\n", "under_oom 0\noom_kill 1\n"),
    ],
)
def test_kill_that_the_kernel_counts_is_for_memory(
    machine: Machine, path: str, before: str, after: str
) -> None:
    machine.tell(path, before)
    watch = MemoryWatch(machine.root)
    assert not watch.ran_out()
    machine.tell(path, after)
    assert watch.ran_out()
    watch.look()  # of a kill long ago nothing follows
    assert not watch.ran_out()


def test_kill_while_hardly_any_memory_was_left_is_for_memory(machine: Machine) -> None:
    watch = MemoryWatch(machine.root)
    machine.free(0.01)
    assert not watch.ran_out()
    watch.look()
    machine.free(0.5)  # the killed process gave it back
    assert watch.ran_out()


def test_limit_of_the_control_group_counts_without_what_files_have_cached(
    machine: Machine,
) -> None:
    machine.tell("sys/fs/cgroup/pod/memory.max", "1000\n")
    machine.tell("sys/fs/cgroup/pod/memory.current", "995\n")
    machine.tell("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 500\n")
    assert not MemoryWatch(machine.root).ran_out()
    machine.tell("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 0\n")
    assert MemoryWatch(machine.root).ran_out()
    machine.tell("sys/fs/cgroup/pod/memory.max", "max\n")
    assert not MemoryWatch(machine.root).ran_out()


def test_system_that_tells_nothing_blames_nothing(tmp_path: Path) -> None:
    assert not MemoryWatch(tmp_path).ran_out()
