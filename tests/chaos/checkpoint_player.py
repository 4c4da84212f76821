"""Saves checkpoints in processes that are killed at a place each, and loads what was recorded.

`python -m tests.chaos.checkpoint_player FOLDER PLACE...` prints for each place, in JSON, the exit
code, the epochs that were recorded and the epochs that could be loaded of them.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from detflow import faults
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.worker.checkpoint import Checkpoints, load_checkpoint
from services.trainer.worker.spec import Spec

EPOCHS = 4


def main(folder: Path, places: list[str]) -> None:
    """Does it for each place."""
    # All are forked before an object is read here: that starts threads, which a fork loses.
    codes = {place: _kill_at(folder / place, place) for place in places}
    told = {place: {"code": code, **_load(folder / place)} for place, code in codes.items()}
    print(json.dumps(told))


def _kill_at(folder: Path, place: str) -> int:
    pid = os.fork()
    if pid == 0:
        _save(folder, place)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _load(folder: Path) -> dict[str, Any]:
    store = ObjectStore((folder / "store").as_uri())
    lines = (folder / "records").read_text().splitlines()
    records = [Checkpoint.FromString(bytes.fromhex(line)) for line in lines]
    loaded = [load_checkpoint(store, record, folder)["epoch"] for record in records]
    return {"recorded": [record.epoch for record in records], "loaded": loaded}


def _save(folder: Path, place: str) -> None:
    """Saves until it is killed, when it comes there for the third time."""
    faults.arm(Settings(faults=f"{place}:kill:3", access="open", data_dir=folder))
    spec = Spec(
        training="projects/p/versions/v/trainings/t",
        attempt=1,
        model="yolov8n",
        batch_size=1,
        step_batch_size=1,
        epochs=EPOCHS,
        hyperparameters={},
        manifest=StoredObject(),
        checkpoint=None,
        folder=folder,
    )

    def record(checkpoint: Checkpoint) -> None:
        with (folder / "records").open("a") as file:
            file.write(checkpoint.SerializeToString().hex() + "\n")

    checkpoints = Checkpoints(ObjectStore((folder / "store").as_uri()), spec)
    for epoch in range(1, EPOCHS + 1):
        state = {"step": 0, "weight": torch.full((20_000,), float(epoch))}
        checkpoints.save(epoch, state, record)
    checkpoints.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
