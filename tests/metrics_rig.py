"""The metrics service in the test's process, and evaluations put where measuring puts them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from detflow.postgres import Database
from detflow.server import Service
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.metrics import store as sql
from services.metrics.__main__ import MIGRATIONS, wire
from services.metrics.domain import Evaluation, Job
from services.metrics.measure import measure
from tests.metrics_fakes import Row, parquet, put_bundle


@contextlib.asynccontextmanager
async def serving(
    database_url: str, nats_url: str, store: ObjectStore, folder: Path, **others: Any
) -> AsyncIterator[Service]:
    """Runs the service on a free port; `others` are more settings."""
    settings = Settings(
        database_url=database_url,
        nats_url=nats_url,
        store_url=store.url,
        data_dir=folder / "scratch",
        **{"log_level": "warning", "access": "open", **others},
    )
    async with Service("metrics", migrations=MIGRATIONS, settings=settings) as service:
        wire(service)
        served = asyncio.create_task(service.serve())
        await service.serving.wait()
        yield service
        service.stop()
        await served


async def put_evaluation(
    db: Database,
    store: ObjectStore,
    training: str,
    truth: dict[str, Any],
    rows: list[Row],
    *,
    split: str = "val",
    attempt: int = 1,
    manifest: StoredObject | None = None,
) -> Evaluation:
    """Measures predictions here rather than in a child process, and records the evaluation.

    Args:
        db: Database of the service.
        store: Object store.
        training: Resource name of the training, which need not be known yet.
        truth: Ground truth of the split.
        rows: Predictions.
        split: val or test.
        attempt: Attempt that made the predictions.
        manifest: Manifest of a bundle with that ground truth; by default there is one with nothing
            else in it.
    """
    training_id = training.rsplit("/", 1)[1]
    manifest = manifest or put_bundle(store, {split: truth})
    predictions = store.put(f"trainings/{training_id}/{split}.parquet", parquet(rows))
    job = Job(
        training=training,
        training_id=training_id,
        attempt=attempt,
        split=split,
        manifest=manifest.SerializeToString(),
        predictions=predictions.SerializeToString(),
        traceparent="",
        num_tries=1,
        lease="",
    )
    measured = measure(store, manifest, predictions, split, job.matches_key)
    async with db.transaction() as conn:
        await sql.lock_training(
            conn, training_id=training_id, project_id=training.split("/")[1], name=training
        )
        evaluation = await sql.insert_evaluation(
            conn,
            job,
            measurement=measured.measurement,
            ground_truth_sha256=measured.ground_truth.sha256,
            matches=measured.matches.SerializeToString(),
        )
    assert evaluation is not None
    return evaluation
