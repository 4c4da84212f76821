"""The loaders of `large_images` alone, an epoch each in turn, in a process as the worker's is.

`python -m tests.benchmarks.large_image_loaders FOLDER MANIFEST` prints a JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from tests.benchmarks.large_images import BATCH_SIZE, HYPERPARAMETERS

_NUM_REPEATS = 4
"""How often the data set holds each image: what the library keeps of it must be little."""
_NUM_EPOCHS = 4


def main(folder: Path, manifest: StoredObject) -> dict[str, Any]:
    """Takes the images of an epoch from each loader, as fast as it makes them.

    Args:
        folder: With the sources in yolo/ and what was made of them in 640/.
        manifest: Of the bundle.

    Returns:
        Images per CPU second after the first epoch, CPU seconds of the first, and the ratio of the
        worker's loader to that of `yolo train`.
    """
    from services.trainer.worker import library

    work = folder / "640"
    library.prepare(folder / "ultralytics")
    library.silence()
    import torch

    from services.trainer.worker import data
    from services.trainer.worker.bundle import fetch_bundle

    library.tune_cpu()
    bundle = fetch_bundle(
        ObjectStore(f"file://{folder / 'store'}"), manifest, work / "data", check=lambda: None
    )
    images = bundle.splits["train"] * _NUM_REPEATS
    loaders = {
        "ours": _our_loader(images),
        "yolo_train": _their_loader(folder / "yolo"),
        "yolo_train_from_640": _their_loader(work),
        "yolo_train_from_640_cache_ram": _their_loader(work, cache="ram"),
    }
    share, data._RAM_SHARE = data._RAM_SHARE, 0.0
    loaders["ours_without_memory"] = _our_loader(images)
    data._RAM_SHARE = share
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(_NUM_EPOCHS):
        for name, load in loaders.items():
            random.seed(epoch)
            torch.manual_seed(epoch)
            before = time.process_time()
            load(epoch)
            seconds[name].append(time.process_time() - before)
    rates = {
        f"{name}_images_per_cpu_second": round(len(images) / statistics.median(found[1:]), 1)
        for name, found in seconds.items()
    }
    first = {f"{name}_first_epoch_cpu_seconds": round(s[0], 2) for name, s in seconds.items()}
    ours, theirs = (statistics.median(seconds[name][1:]) for name in ("ours", "yolo_train"))
    return {**rates, **first, "cpu_ratio": round(ours / theirs, 3)}


def _our_loader(images: Sequence[Any]) -> Callable[[int], None]:
    from services.trainer.worker.data import Prefetcher, TrainDataset
    from services.trainer.worker.hyperparameters import Hyperparameters

    dataset = TrainDataset(
        images,
        hyperparameters=Hyperparameters.read({**HYPERPARAMETERS, "image_size": 640}),
        batch_size=BATCH_SIZE,
    )

    def load(epoch: int) -> None:
        batches = Prefetcher(dataset, batch_size=BATCH_SIZE, seed=0)
        batches.start(range(epoch, epoch + 1), without_mosaic_from=epoch + 1)
        for _ in batches:
            pass
        batches.close()

    return load


def _their_loader(folder: Path, cache: str | None = None) -> Callable[[int], None]:
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_dataloader, build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    config: Any = get_cfg(overrides={"imgsz": 640, "cache": cache})  # our defaults are its own
    data = check_det_dataset(str(folder / "data.yaml"), autodownload=False)
    files = folder / "files.txt"
    paths = sorted((folder / "train" / "images").iterdir())
    files.write_text("".join(f"{path}\n" for path in paths * _NUM_REPEATS))
    dataset = build_yolo_dataset(config, str(files), BATCH_SIZE, data, mode="train", stride=32)
    loader = build_dataloader(dataset, BATCH_SIZE, workers=0, device="cpu")

    def load(epoch: int) -> None:
        for _ in loader:
            pass

    return load


if __name__ == "__main__":
    entry = json.loads(sys.argv[2])
    print(json.dumps(main(Path(sys.argv[1]), StoredObject(**entry))))
