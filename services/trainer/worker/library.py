"""ultralytics, silenced: no network, telemetry, installs or plots, and a private configuration.

Call `prepare` before anything imports ultralytics or torch: they read their environment on import.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

_ENVIRONMENT = {
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
    "ULTRALYTICS_SAFE_LOAD": "1",
    # More than one thread per worker collapses as soon as something else wants a core.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
}
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BLOCK_BYTES, _MAX_KEPT_BYTES = 1 << 30, (1 << 31) - 1
_INTEGRATIONS = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")


def prepare(folder: Path) -> None:
    """Sets the environment that ultralytics and torch read on import.

    Args:
        folder: Becomes the library's configuration folder.
    """
    if "ultralytics" in sys.modules:
        raise RuntimeError("prepare() must run before ultralytics is imported")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(_ENVIRONMENT, YOLO_CONFIG_DIR=str(folder))
    for name in ("ULTRALYTICS_API_KEY", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    _place_font(folder / "Arial.ttf")
    _keep_freed_memory()


def silence() -> None:
    """Imports ultralytics and turns off what its settings and not its environment govern."""
    from ultralytics.utils import SETTINGS

    SETTINGS.update(dict.fromkeys(_INTEGRATIONS, False))  # type: ignore[no-untyped-call]


def tune_cpu() -> None:
    """Makes torch compute with one thread and take the tiniest numbers for zero, as GPUs do.

    Vanishing activations and gradients of a young network are such numbers; CPUs are slow at them.
    """
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def load_nms() -> None:
    """Loads torchvision's operators without its Python package, which takes seconds to import."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("torchvision is not installed")
    for folder in spec.submodule_search_locations:
        for path in Path(folder).glob("_C*.so"):
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


def _place_font(path: Path) -> None:
    """Puts a font where the library looks for Arial, which it would fetch even when offline."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None or path.is_symlink():
        return
    path.symlink_to(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")


def _keep_freed_memory() -> None:
    """Stops glibc from returning memory to the kernel and fetching it, zeroed, in every step."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return  # another C library
    libc.mallopt(_M_MMAP_THRESHOLD, _MAX_KEPT_BLOCK_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _MAX_KEPT_BYTES)
