"""What progress, log, leases, checkpoints and records cost beside the training itself."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from detflow.events import Bus
from detflow.store import ObjectStore
from tests.benchmarks.training import _nats
from tests.shapes_bundle import write_bundle

_RECIPE: Mapping[str, float | bool | str] = {
    "image_size": 128,
    "optimizer": "AdamW",
    "lr0": 0.003,
    "warmup_epochs": 1,
    "nominal_batch_size": 16,
    "patience": 0,
}
_TRAINING = "projects/p/versions/v/trainings/t1"

T = TypeVar("T")


def run(quick: bool = False) -> dict[str, Any]:
    """Trains the same steps with all of it and with none, turn about, in one process.

    The difference of two such trainings is smaller than what a virtual machine's processor varies
    by. So the work is counted too: all CPU time of the process that went neither into steps and
    validation nor into making images.

    Args:
        quick: One round of two epochs, to see that it works.

    Returns:
        CPU seconds of each training; and of what surrounds the training, in all and in percent of
        the rest.
    """
    epochs, num_rounds = (2, 1) if quick else (20, 1)
    seconds: dict[str, list[float]] = {"everything": [], "nothing": []}
    surroundings = 0.0
    with tempfile.TemporaryDirectory(prefix="detflow-overhead-") as name:
        with _worker(Path(name)) as worker:
            worker.train(epochs=1, everything=False)  # libraries set themselves up in first steps
            for _ in range(num_rounds):
                for kind in seconds:
                    total, own = worker.train(epochs=epochs, everything=kind == "everything")
                    seconds[kind].append(round(total, 2))
                    surroundings += total - own if kind == "everything" else 0.0
            num_steps, num_epochs = num_rounds * epochs * worker.num_steps, num_rounds * epochs
    rest = sum(seconds["everything"]) - surroundings
    return {
        "epochs": num_epochs,
        "steps": num_steps,
        "cpu_seconds": seconds,
        "surroundings_milliseconds_per_epoch": round(1000 * surroundings / num_epochs, 1),
        "step_milliseconds": round(1000 * rest / num_steps, 1),
        "overhead_percent": round(100 * surroundings / rest, 2),
    }


class _Worker:
    """The inside of a worker, with and without what surrounds the training."""

    def __init__(self, folder: Path, nats_url: str) -> None:
        from services.trainer.worker.bundle import fetch_bundle

        self._folder, self._nats_url = folder, nats_url
        self._store = ObjectStore(f"file://{folder / 'store'}")
        self._manifest = write_bundle(self._store, {"train": 240, "val": 40, "test": 8})
        self._bundle = fetch_bundle(
            self._store, self._manifest, folder / "bundles", check=lambda: None
        )
        self.num_steps = 0

    def train(self, *, epochs: int, everything: bool) -> tuple[float, float]:
        """Trains a new network; returns the CPU seconds in all and of the training itself."""
        from services.trainer.worker import training
        from services.trainer.worker.distributed import Ranks
        from services.trainer.worker.link import Link
        from services.trainer.worker.orders import Orders
        from services.trainer.worker.progress import Progress
        from services.trainer.worker.records import Spool
        from services.trainer.worker.spec import Spec

        spec = Spec(
            training=_TRAINING,
            attempt=1,
            model="yolov8n",
            batch_size=16,
            step_batch_size=16,
            epochs=epochs,
            hyperparameters=_RECIPE,
            manifest=self._manifest,
            checkpoint=None,
            folder=self._folder,
        )
        with _counted(spec, self._bundle) as (trainer, own_seconds):
            self.num_steps = trainer.num_steps
            before = time.process_time()
            if everything:
                orders, records = Orders(), Spool(_TRAINING, 1)
                with Link(
                    url=self._nats_url, training_id="t1", attempt=1, orders=orders, spool=records
                ) as link:
                    progress = Progress(spec, link.report)
                    training._train(trainer, Ranks(), spec, self._store, orders, records, progress)
                    assert link.flush(30)
            else:
                trainer.start(1)
                for epoch in range(1, epochs + 1):
                    trainer.train_epoch(epoch, lambda step: None)
                    trainer.measure(epoch, lambda: None)
            total = time.process_time() - before
        return total, sum(own_seconds)


@contextmanager
def _counted(spec: Any, bundle: Any) -> Iterator[tuple[Any, list[float]]]:
    """Makes a trainer that counts CPU seconds of its own: the callbacks' are not among them."""
    from services.trainer.worker.data import Prefetcher
    from services.trainer.worker.loop import Trainer

    seconds: list[float] = []

    class Counted(Trainer):
        def train_epoch(self, epoch: int, on_step: Any, *save: Any) -> dict[str, float]:
            with _counting(seconds):
                return super().train_epoch(epoch, _uncounted(on_step, seconds), *save)

        def measure(self, epoch: int, on_batch: Callable[[], None]) -> dict[str, float]:
            with _counting(seconds):
                return super().measure(epoch, _uncounted(on_batch, seconds))

    make_images = Prefetcher._make

    def make_counted(self: Prefetcher, *arguments: Any, **more: Any) -> Any:
        with _counting(seconds):
            return make_images(self, *arguments, **more)

    with mock.patch.object(Prefetcher, "_make", make_counted):
        trainer = Counted(spec, bundle)
        try:
            yield trainer, seconds
        finally:
            trainer.close()


@contextmanager
def _counting(seconds: list[float], sign: int = 1) -> Iterator[None]:
    """Adds what this thread computes in a block."""
    before = time.thread_time()
    try:
        yield
    finally:
        seconds.append(sign * (time.thread_time() - before))


def _uncounted(callback: Callable[..., T], seconds: list[float]) -> Callable[..., T]:
    def call(*arguments: Any) -> T:
        with _counting(seconds, -1):
            return callback(*arguments)

    return call


@contextmanager
def _worker(folder: Path) -> Iterator[_Worker]:
    """Prepares what a worker prepares before it trains."""
    from services.trainer.worker import library

    library.prepare(folder / "ultralytics")
    from services.trainer.worker import training  # noqa: F401  # the libraries

    library.silence()
    library.load_nms()
    with _nats(folder / "nats") as url:
        asyncio.run(_make_streams(url))
        yield _Worker(folder, url)


async def _make_streams(url: str) -> None:
    bus = await Bus.connect(url, "benchmark")
    await bus.ensure_streams()
    await bus.close()


if __name__ == "__main__":
    print(json.dumps(run(quick="--quick" in sys.argv), indent=2))
