"""The events of datasets and preprocessings, recorded in the transaction that makes the change."""

from __future__ import annotations

from detflow import outbox
from detflow.postgres import Connection
from detflow.v1 import events_pb2
from services.preprocess.domain import Dataset, Preprocessing
from services.preprocess.messages import dataset_message, preprocessing_message


async def append_dataset_event(conn: Connection, dataset: Dataset, what: str) -> None:
    """Records what happened to a dataset: created, imported, failed or deleted."""
    await outbox.append(
        conn,
        kind="dataset",
        resource_id=dataset.id,
        what=what,
        name=dataset.name,
        event=events_pb2.Event(dataset=dataset_message(dataset)),
    )


async def append_state(conn: Connection, preprocessing: Preprocessing) -> None:
    """Records a preprocessing's change of state."""
    await outbox.append(
        conn,
        kind="preprocessing",
        resource_id=preprocessing.version_id,
        what="state_changed",
        name=preprocessing.version_name,
        event=events_pb2.Event(preprocessing=preprocessing_message(preprocessing)),
    )
