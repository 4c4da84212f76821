"""Processes that learn together, without NATS and records: what the ranks tests look into.

`python -m tests.rank_player SPEC.json` is rank 0 and starts the others. Each writes what it sees to
rank-{rank}.json beside the specification: a given batch, the epochs, the end of a training that
accumulates batches, without and with a resume. At last memory runs out in all but the first.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from detflow.errors import DetflowError
from detflow.settings import Settings
from detflow.store import ObjectStore
from services.trainer.worker import library
from services.trainer.worker.spec import Spec, read_spec


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--address", default="")
    told = parser.parse_args()
    spec = read_spec(told.spec, rank=told.rank, address=told.address)
    settings = Settings.load()
    library.prepare(spec.folder / "ultralytics")
    library.silence()
    library.load_nms()
    import torch

    from services.trainer.worker import distributed
    from services.trainer.worker.bundle import fetch_bundle
    from services.trainer.worker.failures import explain
    from services.trainer.worker.loop import Trainer

    distributed.RANK_COMMAND = (*distributed.RANK_COMMAND[:-1], "tests.rank_player")
    bundle = fetch_bundle(
        ObjectStore(settings.store_url), spec.manifest, settings.data_dir, check=lambda: None
    )
    ranks = distributed.Ranks(spec.place)
    trainer = Trainer(spec, bundle, ranks)
    seen: list[dict[str, Any]] = []

    def write(what: dict[str, Any]) -> None:
        seen.append(what)
        file = spec.place.file.parent / f"rank-{spec.place.rank}.json"
        file.write_text(json.dumps(seen))

    def note(values: Mapping[str, float]) -> None:
        write({"state": _digest(trainer), "values": dict(values)})

    def learn() -> None:
        with ranks.meeting(trainer.network):
            note(_learn_one_batch(trainer))
            trainer.start(1)
            for epoch in range(1, spec.epochs + 1):
                note(trainer.train_epoch(epoch, lambda step: None))
                ranks.add_up(torch.zeros(1), 1)  # what was seen is written everywhere
                if not ranks.agree(True):
                    break
            if spec.place.num_ranks > 1:
                write({"resumed": _resume(spec, bundle, ranks)})
            ranks.add_up(torch.zeros(1), 1)
            if not ranks.is_first:
                raise MemoryError
            ranks.add_up(torch.zeros(1), 1)

    try:
        if ranks.is_first:
            learn()
        else:
            with ranks.explaining(lambda error: explain(error, spec, settings)):
                learn()
    except DetflowError as error:
        write({"reason": error.reason, "message": error.message})
    finally:
        trainer.close()


def _digest(trainer: Any) -> str:
    digest = hashlib.sha256()
    for tensor in trainer.network.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resume(spec: Spec, bundle: Any, ranks: Any) -> list[str]:
    """Trains two epochs; and again from a checkpoint within the first one, and from its end.

    An update takes three batches, so that some wait for theirs at both checkpoints.

    Returns:
        The weights at the end of each.
    """
    import torch

    from services.trainer.worker.checkpoint import snapshot_of
    from services.trainer.worker.loop import Trainer

    # The parts of the ranks are unequal, and so are the random numbers that they draw.
    values = {**spec.hyperparameters, "nominal_batch_size": 21, "dropout": 0.2}
    spec = dataclasses.replace(
        spec, hyperparameters=values, batch_size=7, step_batch_size=7, epochs=2
    )
    files = [spec.place.file.parent / name for name in ("within.pt", "end.pt")]

    def train(begin: Path | None = None) -> str:
        trainer, first_epoch = Trainer(spec, bundle, ranks), 1
        if begin is not None:
            state = torch.load(begin, weights_only=True)
            trainer.restore(state)
            first_epoch += state["epoch"]

        def save(epoch: int) -> None:
            state = snapshot_of(epoch, trainer.state(epoch))
            if begin is None and ranks.is_first:
                assert state["gradients"]
                torch.save(state, files[epoch])

        trainer.start(first_epoch)
        try:
            for epoch in range(first_epoch, spec.epochs + 1):
                trainer.train_epoch(epoch, _is_second, partial(save, epoch - 1))
                if epoch < spec.epochs:
                    save(epoch)
        finally:
            trainer.close()
        return _digest(trainer)

    states = [train()]
    ranks.agree(True)  # the files are there
    return states + [train(file) for file in files]


def _is_second(step: Any) -> bool:
    return (step.epoch, step.number) == (1, 2)


def _learn_one_batch(trainer: Any) -> dict[str, float]:
    """Learns thrice from eight drawn images; a rank from its part of them."""
    import torch

    from services.trainer.worker.batches import split_batch

    numbers = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        "img": torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8, generator=numbers),
        "batch_idx": (torch.arange(80) // 10).float(),
        "cls": (torch.arange(80) % 3)[:, None].float(),
        "bboxes": 0.3 + 0.4 * torch.rand((80, 4), generator=numbers),
    }
    place = trainer._ranks.place
    mine = list(split_batch(batch, 8 // place.num_ranks))[place.rank]
    for index in range(3):
        values: dict[str, float] = trainer.step(mine, 1, index, update=True)
    weights = torch.cat([weight.detach().reshape(-1) for weight in trainer.network.parameters()])
    return {**values, "norm": float(weights.double().norm()), "sum": float(weights.double().sum())}


if __name__ == "__main__":
    main()
