"""Starts a worker: `python -m services.trainer.worker SPEC.json`.

With `--rank R --address HOST:PORT` it is one of several processes that train together. Those from
rank 1 on follow rank 0 and speak to nobody else.

Exit codes: 0 done, 1 failed (a WorkerFailed record says why), 2 wrong usage or settings, 3 another
attempt has taken over, 4 stopped as told.
"""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys
import traceback
from pathlib import Path

from detflow import errors, faults, telemetry
from detflow.errors import DetflowError
from detflow.settings import Settings
from detflow.v1.worker_pb2 import WorkerFailed, WorkerRecord
from services.trainer.worker import library
from services.trainer.worker.failures import explain
from services.trainer.worker.link import Link
from services.trainer.worker.orders import (
    FENCED_EXIT_CODE,
    STOPPED_EXIT_CODE,
    Fenced,
    Orders,
    Stopped,
)
from services.trainer.worker.records import Spool
from services.trainer.worker.spec import Spec, read_spec

_FLUSH_SECONDS = 120.0
_STOPPED_FLUSH_SECONDS = 3.0


def main(arguments: list[str]) -> int:
    """Runs one attempt and returns the exit code."""
    faulthandler.enable()  # a crash of native code says where, in the last lines of its output
    parser = argparse.ArgumentParser("python -m services.trainer.worker")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--address", default="")
    told = parser.parse_args(arguments)
    orders = Orders()
    orders.obey_signals()
    try:
        settings = Settings.load()
        settings.require("nats_url", "store_url")
        faults.arm(settings)
        spec = read_spec(told.spec, rank=told.rank, address=told.address)
    except DetflowError as error:
        print(error, file=sys.stderr)
        return 2
    if spec.place.rank:
        return _follow(spec, settings)
    telemetry.trace_to("worker", settings)
    with telemetry.span(f"worker of attempt {spec.attempt}", telemetry.from_environment()):
        return _lead(spec, settings, orders)


def _lead(spec: Spec, settings: Settings, orders: Orders) -> int:
    """Runs the attempt as the one whom everybody knows; returns the exit code."""
    carrier: dict[str, str] = {}
    telemetry.inject(carrier)
    records = Spool(spec.training, spec.attempt)
    with Link(
        url=settings.nats_url,
        training_id=spec.training_id,
        attempt=spec.attempt,
        orders=orders,
        spool=records,
        carrier=carrier,
    ) as link:
        exit_code, flush_seconds = _attempt(spec, settings, orders, records, link)
        flushed = link.flush(flush_seconds)
    if exit_code == 0 and orders.fenced:
        return FENCED_EXIT_CODE
    if not flushed and exit_code == 0:
        print("the last records could not be stored: NATS is away", file=sys.stderr)
        return 1
    return exit_code


def _attempt(
    spec: Spec, settings: Settings, orders: Orders, records: Spool, link: Link
) -> tuple[int, float]:
    """Runs the attempt; returns the exit code and the seconds its last records may take."""
    try:
        _set_up(spec, settings)
        from services.trainer.worker import training

        training.run(spec, settings, orders, records, link.report)
    except Fenced:
        return FENCED_EXIT_CODE, 0.0
    except Stopped:
        return STOPPED_EXIT_CODE, _STOPPED_FLUSH_SECONDS
    except Exception as error:
        if orders.fenced:
            return FENCED_EXIT_CODE, 0.0
        explained = explain(error, spec, settings)
        records.log(*traceback.format_exc().splitlines())
        traceback.print_exc()
        records.write(WorkerRecord(failed=WorkerFailed(failure=errors.failure(explained))))
        return 1, _FLUSH_SECONDS
    return 0, _FLUSH_SECONDS


def _follow(spec: Spec, settings: Settings) -> int:
    """Trains along with rank 0, which ends this process when it ends; returns the exit code."""
    # Rank 0 is told to stop as well. If this one ended before it, that would look like a failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    spec.folder.mkdir(exist_ok=True)
    _set_up(spec, settings)
    from services.trainer.worker import distributed, training

    try:
        training.follow(spec, settings)
    except distributed.RankLost:
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _set_up(spec: Spec, settings: Settings) -> None:
    """Prepares the libraries."""
    library.prepare(spec.folder / "ultralytics")
    # Imported here, with the lease alive and signals obeyed: it takes seconds, and it reads the
    # environment that prepare() sets.
    from services.trainer.worker import memory

    library.silence()
    library.load_nms()
    memory.set_limit(settings.worker_memory_bytes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
