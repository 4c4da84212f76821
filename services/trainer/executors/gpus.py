"""Which GPUs this machine has, found out without torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECONDS = 30.0


def list_gpus(environ: Mapping[str, str], *, driver: Path = _DRIVER) -> tuple[str, ...]:
    """Returns the GPUs trainings may use, each as CUDA_VISIBLE_DEVICES names it.

    Those that the environment allows, else those nvidia-smi tells of, else those of the driver.
    """
    if _VISIBLE in environ:
        names = [name.strip() for name in environ[_VISIBLE].split(",")]
        # As CUDA reads it: the first that is none ends the list.
        end = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
        return tuple(names[:end])
    num_gpus = _num_told(environ)
    if num_gpus is None:
        num_gpus = len(list(driver.iterdir())) if driver.is_dir() else 0
    return tuple(str(number) for number in range(num_gpus))


def _num_told(environ: Mapping[str, str]) -> int | None:
    """Asks nvidia-smi; None if it is not there or knows nothing."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return None
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
