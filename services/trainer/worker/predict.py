"""The predictions that metrics measures: the best weights on every image of a split, as Parquet."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from services.trainer.worker.evaluation import Detections, EvaluationSet, forward, select
from services.trainer.worker.networks import Network

SCHEMA = pa.schema(
    [
        ("image_id", pa.int32()),
        ("class_id", pa.int32()),
        ("confidence", pa.float32()),
        *((name, pa.float32()) for name in ("x1", "y1", "x2", "y2")),
    ]
)


@torch.no_grad()
def predict(
    network: Network,
    images: EvaluationSet,
    device: torch.device,
    on_batch: Callable[[], None],
) -> bytes:
    """Predicts a split.

    Args:
        network: In evaluation mode.
        images: The split.
        device: Where the network is.
        on_batch: Called after every batch; raises to stop.

    Returns:
        Parquet: image_id (from 1 in the split), class_id (from 0), confidence, x1, y1, x2, y2 in
        pixels of the bundle's image; sorted by image, then by descending confidence.
    """
    found: list[tuple[int, Detections]] = []
    for batch in images:
        detections = select(forward(network, batch, device)[0], batch)
        found.extend((image.id, one) for image, one in zip(batch.images, detections, strict=True))
        on_batch()
    found.sort(key=lambda pair: pair[0])
    return _to_parquet(found)


def _to_parquet(found: list[tuple[int, Detections]]) -> bytes:
    boxes = np.concatenate([one.boxes for _, one in found] or [np.empty((0, 4), np.float32)])
    table = pa.table(
        [
            np.repeat([image_id for image_id, _ in found], [len(one.classes) for _, one in found]),
            np.concatenate([one.classes for _, one in found] or [np.empty(0, np.int64)]),
            np.concatenate([one.confidences for _, one in found] or [np.empty(0, np.float32)]),
            *boxes.T,
        ],
        names=SCHEMA.names,
    ).cast(SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
