"""A process that has nothing to do with the network, other programs or the disk any more.

What a stranger's file makes a library do then stays in this process: memory, processor time and
writing are limited by rlimits; other programs, child processes and sockets are refused by a seccomp
filter. Where the system allows it, the process also gets a network namespace without interfaces.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
from typing import NamedTuple

from detflow.errors import FailedPrecondition

MEMORY_BYTES = 4 << 30
CPU_SECONDS = 120

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SECCOMP_SET_MODE_FILTER, _FOR_ALL_THREADS = 1, 1
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000  # the last plus an errno
_EPERM, _ENOSYS = 1, 38
# Instructions of the filter: load a word of the call's description, compare, return.
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16
_X32_BIT = 0x40000000


class _Calls(NamedTuple):
    """An architecture and the numbers of its system calls."""

    architecture: int
    clone: int
    clone3: int
    seccomp: int
    refused: tuple[int, ...]


# What a process reaches others by is refused: socket, socketpair, fork, vfork, execve, execveat,
# ptrace, io_uring_setup, process_vm_writev, kill, tkill.
_CALLS = {
    "x86_64": _Calls(0xC000003E, 56, 435, 317, (41, 53, 57, 58, 59, 322, 101, 425, 311, 62, 200)),
    "aarch64": _Calls(0xC00000B7, 220, 435, 277, (198, 199, 221, 281, 117, 425, 271, 129, 130)),
}


def enter(memory_bytes: int = MEMORY_BYTES, cpu_seconds: int = CPU_SECONDS) -> str:
    """Shuts this process in, for good, with all threads it has; a namespace only if it has one.

    Args:
        memory_bytes: Limit on the memory it can fill; mapped files don't count.
        cpu_seconds: Limit on its processor time; 0 sets none.

    Returns:
        What keeps it off the network: "network namespace and seccomp" or "seccomp".

    Raises:
        FailedPrecondition: SANDBOX_UNSUPPORTED: this system has no seccomp filter that we know.
    """
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        raise _unsupported(f"{sys.platform} on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    has_namespace = libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0
    # A change of identity, which a user namespace is, may have unset it.
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # Libraries ask for it as they are imported, and it would be chosen by writing to it.
    tempfile.tempdir = os.getcwd()
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    if cpu_seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # pipes are no files
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    program = _filter(_CALLS[platform.machine()])
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    )
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.syscall.argtypes = [*[ctypes.c_ulong] * 4]
    call, address = _CALLS[platform.machine()].seccomp, ctypes.addressof(header)
    if libc.syscall(call, _SECCOMP_SET_MODE_FILTER, _FOR_ALL_THREADS, address) != 0:
        raise _unsupported(os.strerror(ctypes.get_errno()))
    return "network namespace and seccomp" if has_namespace else "seccomp"


def _filter(calls: _Calls) -> bytes:
    """Makes the filter: threads yes; processes, programs and sockets no."""
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_EQUAL, 1, 0, calls.architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
    ]
    for number in calls.refused:
        instructions += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | _EPERM)]
    instructions += [
        # Its flags are in memory, where a filter cannot look; libraries then use the older call.
        (_EQUAL, 0, 1, calls.clone3),
        (_RETURN, 0, 0, _REFUSE | _ENOSYS),
        (_EQUAL, 0, 3, calls.clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _REFUSE | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def _unsupported(what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"files of strangers are looked into in a sandbox, which {what} does not have; run the "
        "services on Linux with seccomp (x86_64 or aarch64)",
        reason="SANDBOX_UNSUPPORTED",
    )
