"""A worker that learns nothing and does all else: records, checkpoints, orders, predictions.

`python -m tests.chaos.player SPEC.json` takes a WorkerSpec, or the JobSpec of a preflight or of an
export. It speaks to the trainer by the real link and the real spool; what it stores says which
attempt stored it, so that a checkpoint of the wrong one would be noticed.
"""

import io
import json
import os
import sys
import time
from pathlib import Path

import orjson
from google.protobuf import json_format
from google.protobuf.json_format import ParseError

from detflow import faults
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import EpochMetrics, Predictions, Preflight, StepMetrics
from detflow.v1.worker_pb2 import (
    Checkpoint,
    EpochRecord,
    JobMessage,
    JobSpec,
    WorkerEvaluating,
    WorkerFinished,
    WorkerRecord,
    WorkerSpec,
    WorkerStarted,
)
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

NUM_STEPS = 3
STEP_SECONDS = 0.03
_FLUSH_SECONDS = 60.0


def main(path: Path) -> int:
    """Does what the file says; returns the exit code."""
    text = path.read_text()
    try:
        json_format.Parse(text, WorkerSpec())
    except ParseError:
        return job(json_format.Parse(text, JobSpec()))
    orders = Orders()
    orders.obey_signals()
    settings = Settings.load()
    faults.arm(settings)
    spec = read_spec(path)
    spool = Spool(spec.training, spec.attempt)
    with Link(
        url=settings.nats_url,
        training_id=spec.training_id,
        attempt=spec.attempt,
        orders=orders,
        spool=spool,
    ) as link:
        try:
            train(spec, ObjectStore(settings.store_url), orders, spool)
        except Fenced:
            return FENCED_EXIT_CODE
        except Stopped:
            link.flush(3.0)
            return STOPPED_EXIT_CODE
        return 0 if link.flush(_FLUSH_SECONDS) else 1


def train(spec: Spec, store: ObjectStore, orders: Orders, spool: Spool) -> None:
    """Takes the time of a very small training and leaves what one leaves."""
    done = 0
    if spec.checkpoint is not None:
        found = json.loads(store.get(spec.checkpoint.object))
        assert found["training"] == spec.training and found["attempt"] < spec.attempt, found
        done = found["epoch"]
        assert done == spec.checkpoint.epoch, (found, spec.checkpoint)
    spool.write(WorkerRecord(started=WorkerStarted(first_epoch=done + 1, device="cpu")))
    for epoch in range(done + 1, spec.epochs + 1):
        for _ in range(NUM_STEPS):
            orders.check()
            time.sleep(STEP_SECONDS)  # the work
        columns = [StepMetrics.Column(name="lr", values=[float(epoch)] * NUM_STEPS)]
        steps = StepMetrics(
            attempt=spec.attempt, epoch=epoch, first_step=1, num_steps=NUM_STEPS, columns=columns
        )
        spool.write(WorkerRecord(steps=steps))
        checkpoint = Checkpoint(
            epoch=epoch, object=put_json(store, spec, f"checkpoint-{epoch:06d}.pt", epoch)
        )
        metrics = EpochMetrics(attempt=spec.attempt, epoch=epoch, values={"lr": float(epoch)})
        spool.write(WorkerRecord(epoch=EpochRecord(metrics=metrics, checkpoint=checkpoint)))
        if orders.finish:
            break
    orders.check()
    weights = put_json(store, spec, "best.pt", spec.epochs)
    spool.write(WorkerRecord(evaluating=WorkerEvaluating(weights=weights)))
    stored = {
        split: store.put(spec.key(f"predictions-{split}.parquet"), predict(store, spec, split))
        for split in ("val", "test")
    }
    orders.check()
    predictions = Predictions(attempt=spec.attempt, manifest=spec.manifest, **stored)
    spool.write(WorkerRecord(finished=WorkerFinished(predictions=predictions)))


def put_json(store: ObjectStore, spec: Spec, name: str, epoch: int) -> StoredObject:
    """Stores what tells where it comes from, as large as a small checkpoint."""
    content = {"training": spec.training, "attempt": spec.attempt, "epoch": epoch}
    return store.put(spec.key(name), json.dumps({**content, "rest": "." * 9999}).encode())


def predict(store: ObjectStore, spec: Spec, split: str) -> bytes:
    """Returns the ground truth as predictions."""
    import pyarrow.parquet  # takes a while

    manifest = orjson.loads(store.get(spec.manifest))
    truth = orjson.loads(store.get(StoredObject(**manifest["splits"][split]["ground_truth"])))
    found = sorted(truth["annotations"], key=lambda annotation: annotation["image_id"])
    x, y, w, h = ([float(a["bbox"][k]) for a in found] for k in range(4))
    columns = {
        "image_id": pyarrow.array([a["image_id"] for a in found], pyarrow.int32()),
        "class_id": pyarrow.array([a["category_id"] - 1 for a in found], pyarrow.int32()),
        "confidence": pyarrow.array([0.9] * len(found), pyarrow.float32()),
        "x1": pyarrow.array(x, pyarrow.float32()),
        "y1": pyarrow.array(y, pyarrow.float32()),
        "x2": pyarrow.array([a + b for a, b in zip(x, w, strict=True)], pyarrow.float32()),
        "y2": pyarrow.array([a + b for a, b in zip(y, h, strict=True)], pyarrow.float32()),
    }
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def job(spec: JobSpec) -> int:
    """Does a job: a preflight finds all well, an export is a file of a few bytes."""
    message = JobMessage()
    if spec.WhichOneof("job") == "export":
        message.export.CopyFrom(spec.export.export)
        store = ObjectStore(os.environ["DETFLOW_STORE_URL"])
        message.export.object.CopyFrom(store.put(spec.export.key, b"model"))
    else:
        message.preflight.CopyFrom(Preflight(device="cpu", step_seconds=STEP_SECONDS))
    print(json_format.MessageToJson(message, indent=None), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
