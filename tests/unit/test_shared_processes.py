import signal
import subprocess
import sys


def test_child_dies_with_its_parent() -> None:
    program = """
import signal, subprocess, sys
from detflow.processes import dying_with_parent
child = subprocess.Popen(
    dying_with_parent(
        [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    ),
    stdin=subprocess.PIPE,
)
signal.pause()
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    parent.send_signal(signal.SIGKILL)
    # The pipe reaches its end only when the child, its other holder, is gone too.
    assert parent.stdout.read() == b""
    parent.wait()
    parent.stdout.close()
