"""The child process that draws: `python -m services.metrics.reports`.

It reads one pickled job from standard input and writes the file to standard output, which is a file
of the service. It is a process of its own since matplotlib holds the interpreter for long, has
settings of the whole process, and may need much memory. Standard input stays open as long as the
service lives; the child ends with it.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading

from services.metrics.reports.files import write
from services.metrics.reports.jobs import Job


def main() -> None:
    """Does one job."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no file
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    job: Job = pickle.loads(sys.stdin.buffer.read(size))  # from the service that started us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(out, "wb") as file:
        write(job, file)


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the service closes its end, alive or killed
    os._exit(1)


if __name__ == "__main__":
    main()
