"""What a process that was killed in the middle of an object has left is deleted after a while."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from detflow.postgres import Database
from detflow.store import ObjectStore
from services.preprocess.garbage import GarbageCollector

WRITER = """
import sys
from detflow.store import ObjectStore
store, content = ObjectStore(sys.argv[1]), b"x" * (200 << 20)
while True:
    store.put("uploads/a", content)
"""


def leave_half_an_object(folder: Path) -> list[Path]:
    """Kills a writer while it writes; returns what that leaves beside the objects."""
    with subprocess.Popen([sys.executable, "-c", WRITER, folder.as_uri()]) as writer:
        while not (found := list(folder.rglob("*#*"))):
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
    return [path for path in found if path.exists()] or leave_half_an_object(folder)


async def test_half_an_object_goes_and_what_may_still_be_written_stays(
    make_database: Callable[[str], Awaitable[Database]], tmp_path: Path
) -> None:
    store = ObjectStore((tmp_path / "store").as_uri())
    [half] = leave_half_an_object(tmp_path / "store")
    whole = store.put("uploads/b", b"whole")
    collector = GarbageCollector(db=await make_database("preprocess"), store=store)
    await collector.step()
    assert half.exists()
    an_hour_ago = time.time() - 3700
    for path in (half, tmp_path / "store" / "uploads" / "b"):
        os.utime(path, (an_hour_ago, an_hour_ago))
    await GarbageCollector(db=await make_database("preprocess"), store=store).step()
    assert not half.exists()
    assert store.get(whole) == b"whole"
