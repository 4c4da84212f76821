"""Does a job for the trainer: `python -m services.trainer.worker.jobs SPEC.json [--sandbox]`.

Every line of standard output is a JobMessage; the last is the result or the failure. Exit codes: 0
done, 1 failed, 2 wrong usage or settings, 143 ended by SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from google.protobuf import json_format

from detflow import errors, sandbox
from detflow.errors import DetflowError
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.worker_pb2 import JobMessage, JobSpec
from services.trainer.worker import library
from services.trainer.worker.failures import explain

_PACKAGE = "services.trainer.worker"
_TERMINATED = 128 + signal.SIGTERM


def main(arguments: list[str]) -> int:
    """Does the job and returns the exit code."""
    # As an exception: what the job has put into the object store for a moment goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    emit = _take_stdout()
    if len(arguments) not in (1, 2) or arguments[1:] not in ([], ["--sandbox"]):
        print(f"usage: python -m {_PACKAGE}.jobs SPEC.json [--sandbox]", file=sys.stderr)
        return 2
    spec = JobSpec()
    try:
        json_format.Parse(Path(arguments[0]).read_text(encoding="utf-8"), spec)
        settings = Settings.load()
        library.prepare(Path(arguments[0]).resolve().parent / "ultralytics")
    except (OSError, json_format.ParseError, DetflowError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if arguments[1:]:
            print("sandbox:", sandbox.enter(), file=sys.stderr, flush=True)
        _do(spec, settings, emit)
    except Exception as error:
        traceback.print_exc()
        emit(JobMessage(failure=errors.failure(explain(error))))
        return 1
    return 0


def _do(spec: JobSpec, settings: Settings, emit: Callable[[JobMessage], None]) -> None:
    # Imported when needed: torch takes seconds, and it reads the environment that is set by now.
    kind = spec.WhichOneof("job")
    job = importlib.import_module(f"{_PACKAGE}.{kind}")
    if kind == "export":
        settings.require("store_url")
        job.run(spec.export, ObjectStore(settings.store_url), emit)
    elif kind == "inspect":
        job.run(spec.inspect, emit)
    else:
        job.run(spec.preflight, settings, emit)


def _take_stdout() -> Callable[[JobMessage], None]:
    """Keeps standard output for messages; what libraries print goes to standard error."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(message: JobMessage) -> None:
        messages.write(json_format.MessageToJson(message, indent=None) + "\n")
        messages.flush()

    return emit


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
