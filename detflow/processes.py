"""Child processes that end with the process that started them."""

import os
import signal
import sys
from collections.abc import Sequence

# The kernel is asked after exec, not between fork and exec: there Python and the fork handlers of
# libraries run in a copy of a process with threads, which has crashed children. Without a
# `preexec_fn` Python starts children by vfork, which runs nothing of it.
_WRAPPER = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[2]), 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)  # the parent died before: nobody is left to send the signal
os.execvp(sys.argv[3], sys.argv[3:])
"""


def dying_with_parent(
    command: Sequence[str], death_signal: signal.Signals = signal.SIGKILL
) -> list[str]:
    """Wraps a command so that the kernel sends it `death_signal` when its parent thread is gone.

    Start it from a thread that lives as long as the process, without a shell in between.
    """
    interpreter = [sys.executable, "-I", "-S", "-c", _WRAPPER]
    return [*interpreter, str(os.getpid()), str(int(death_signal)), *command]
