"""Starts a worker: `python -m services.trainer.worker SPEC.json`.

Exit codes: 0 done, 1 failed (a WorkerFailed record says why), 2 wrong usage or settings, 3 another
attempt has taken over, 4 stopped as told.
"""

from __future__ import annotations

import faulthandler
import sys
import traceback
from pathlib import Path

from detflow import errors
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
    orders = Orders()
    orders.obey_signals()
    if len(arguments) != 1:
        print("usage: python -m services.trainer.worker SPEC.json", file=sys.stderr)
        return 2
    try:
        settings = Settings.load()
        settings.require("nats_url", "store_url")
        spec = read_spec(Path(arguments[0]))
    except DetflowError as error:
        print(error, file=sys.stderr)
        return 2
    records = Spool(spec.training, spec.attempt)
    with Link(
        url=settings.nats_url,
        training_id=spec.training_id,
        attempt=spec.attempt,
        orders=orders,
        spool=records,
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
        library.prepare(spec.folder / "ultralytics")
        # Imported here, with the lease alive and signals obeyed: it takes seconds, and it reads the
        # environment that prepare() sets.
        from services.trainer.worker import memory, training

        library.silence()
        library.load_nms()
        memory.set_limit(settings.worker_memory_bytes)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
