"""The child process that measures one split: `python -m services.metrics.measure`.

It reads one JSON line from standard input (store_url, split, matches_key, and manifest and
predictions as base64 of a StoredObject) and writes one to standard output (`answer`). It is a
process of its own so that a large evaluation neither holds up the service's event loop nor takes
the service along when memory runs out. Standard input stays open as long as the service lives; the
child ends with it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any

import orjson
from obstore.exceptions import BaseError

from detflow.errors import DataLoss, DetflowError, ResourceExhausted, Unavailable, failure
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.metrics.domain import Measurement
from services.metrics.evaluate import evaluate


@dataclass(frozen=True, slots=True)
class Measured:
    """What measuring one split gave: its figures, and where the matches behind them are."""

    measurement: Measurement
    ground_truth: StoredObject
    matches: StoredObject


def measure(
    store: ObjectStore,
    manifest: StoredObject,
    predictions: StoredObject,
    split: str,
    matches_key: str,
) -> Measured:
    """Measures predictions on a split of the bundle whose manifest is given; stores the matches.

    The same input gives the same object, so that it may be measured again at any time.

    Raises:
        DataLoss: An object is gone, differs from its recorded hash or does not hold what it should.
        Unavailable: The object store is away.
    """
    if not predictions.key:
        raise DataLoss(
            f"the worker left no predictions of the {split} split; resume the training",
            reason="NO_PREDICTIONS",
        )
    try:
        ground_truth = _ground_truth(store, manifest, split)
        measurement, matches = evaluate(_read_json(store, ground_truth), store.get(predictions))
        return Measured(measurement, ground_truth, store.put(matches_key, matches.to_bytes()))
    except (BaseError, OSError) as error:
        raise Unavailable(f"the object store does not answer: {error}") from error


def _ground_truth(store: ObjectStore, manifest: StoredObject, split: str) -> StoredObject:
    content = _read_json(store, manifest)
    try:
        return StoredObject(**content["splits"][split]["ground_truth"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataLoss(
            f"bundle manifest {manifest.key} names no ground truth of the {split} split;"
            " preprocess the version again",
            reason="BAD_MANIFEST",
        ) from error


def _read_json(store: ObjectStore, obj: StoredObject) -> dict[str, Any]:
    try:
        content: dict[str, Any] = orjson.loads(store.get(obj))
    except ValueError as error:
        raise DataLoss(
            f"stored object {obj.key} is no JSON; preprocess the version again",
            reason="BAD_MANIFEST",
        ) from error
    return content


def answer(line: bytes) -> dict[str, Any]:
    """Does what a request line asks; returns what was measured, or `failure` and its `code`."""
    request = json.loads(line)
    try:
        measured = measure(
            ObjectStore(request["store_url"]),
            StoredObject.FromString(base64.b64decode(request["manifest"])),
            StoredObject.FromString(base64.b64decode(request["predictions"])),
            request["split"],
            request["matches_key"],
        )
    except MemoryError:
        return _failed(
            ResourceExhausted(
                "the evaluation ran out of memory; give the metrics service more",
                reason="OUT_OF_MEMORY",
            )
        )
    except DetflowError as error:
        return _failed(error)
    return {
        "measurement": dataclasses.asdict(measured.measurement),
        "ground_truth_sha256": measured.ground_truth.sha256,
        "matches": base64.b64encode(measured.matches.SerializeToString()).decode(),
    }


def _failed(error: DetflowError) -> dict[str, Any]:
    encoded = base64.b64encode(failure(error).SerializeToString(deterministic=True)).decode()
    return {"failure": encoded, "code": error.code.name}


def main() -> None:
    """Answers one request."""
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    line = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(out, "wb") as file:
        file.write(json.dumps(answer(line)).encode())


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the service closes its end, alive or killed
    os._exit(1)


if __name__ == "__main__":
    main()
