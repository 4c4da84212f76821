"""1080p JPEGs to 640 px: ours, the bare loop it cannot beat, and what one would write instead.

All in one process with one thread, turn about, from files or stored objects to files or stored
objects. Quality is measured against the exact mean of each output pixel's area, before encoding.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image as Pillow

from detflow import images
from detflow.resize import Resize, place_pixels
from services.preprocess.bundle import ShardJob, Transform, make_shard, plan_shards
from services.preprocess.domain import Image

NUM_IMAGES = 48
ROUNDS = 3
WIDTH, HEIGHT, SIDE = 1920, 1080, 640


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measures one process.

    Args:
        quick: A few images.

    Returns:
        Images per CPU second and PSNR in dB by what was done, and ratios of ours.
    """
    images.use_one_thread()
    num_images, rounds = (6, 1) if quick else (NUM_IMAGES, ROUNDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        paths = [folder / "images" / f"{number:04d}.jpg" for number in range(num_images)]
        for number, path in enumerate(paths):
            path.write_bytes(_photograph(number))
        return _measure(folder, paths, rounds)


def _measure(folder: Path, paths: Sequence[Path], rounds: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], None]] = {
        "detflow": _ours(folder, paths),
        "bare loop": lambda: _bare(folder, paths),
        "Pillow script": lambda: _pillow(folder, paths),
        "ultralytics load_image": _ultralytics(folder / "images", paths),
    }
    seconds: dict[str, float] = defaultdict(float)
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name] += time.process_time() - start
    rates = {name: rounds * len(paths) / taken for name, taken in seconds.items()}
    return {
        "images_per_cpu_second": rates,
        "ours_to": {name: rates["detflow"] / rate for name, rate in rates.items()},
        "psnr_db": _qualities(paths[0]),
    }


def _ours(folder: Path, paths: Sequence[Path]) -> Callable[[], None]:
    """The making of a shard, from stored originals, as a process of the pool does it."""
    store = folder / "store" / "datasets"
    store.mkdir(parents=True)
    sources, offset = [], 0
    with (store / "0.bin").open("wb") as file:
        for path in paths:
            data = path.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            key = "datasets/0.bin"
            source = Image(path.name, sha256, WIDTH, HEIGHT, key, offset, len(data), (), ())
            sources.append(source)
            offset += file.write(data)
    (plan, *_) = plan_shards("train", range(len(paths)), [1] * len(paths), 1)

    def make() -> None:
        job = ShardJob(
            plan=plan,
            store_url=f"file://{folder}/store",
            scratch=folder,
            first_image_id=1,
            sources=tuple(sources),
            transform=Transform(resize=Resize(SIDE)),
        )
        shard = make_shard(job)
        os.unlink(folder / "store" / shard.key)  # it is stored anew each time

    return make


def _bare(folder: Path, paths: Sequence[Path]) -> None:
    """Decode, resize and encode, and nothing else."""
    for path in paths:
        decoded = simplejpeg.decode_jpeg(path.read_bytes(), "BGR", min_width=SIDE, min_height=360)
        resized = cv2.resize(decoded, (SIDE, 360), interpolation=cv2.INTER_LINEAR)
        (folder / "bare.jpg").write_bytes(simplejpeg.encode_jpeg(resized, 95, "BGR", "420"))


def _pillow(folder: Path, paths: Sequence[Path]) -> None:
    """The script that everybody writes first."""
    for path in paths:
        with Pillow.open(path) as image:
            small = image.convert("RGB").resize((SIDE, 360), Pillow.Resampling.LANCZOS)
        small.save(folder / "pillow.jpg", quality=95)


def _ultralytics(folder: Path, paths: Sequence[Path]) -> Callable[[], None]:
    """Its data set reading and resizing each image, as it does in every epoch; writes nothing."""
    from ultralytics.data.base import BaseDataset

    class Unlabelled(BaseDataset):
        def get_labels(self) -> list[dict[str, Any]]:
            return [{"im_file": str(path), "cls": np.zeros((0, 1))} for path in paths]

        def build_transforms(self, hyp: Any = None) -> None:
            return None

    dataset = Unlabelled(str(folder), imgsz=SIDE, augment=False, prefix="")

    def read() -> None:
        for number in range(len(paths)):
            dataset.ims[number] = None
            dataset.load_image(number)

    return read


def _qualities(path: Path) -> dict[str, float]:
    data = path.read_bytes()
    whole = simplejpeg.decode_jpeg(data, "BGR")
    blocks = whole.astype(np.float64).reshape(360, HEIGHT // 360, SIDE, WIDTH // SIDE, 3)
    exact = blocks.mean(axis=(1, 3))
    header = images.header_of(data)
    ours = images.decode(data, header, (SIDE, 360))
    linear = cv2.resize(whole, (SIDE, 360), interpolation=cv2.INTER_LINEAR)
    with Pillow.open(path) as image:
        lanczos = np.asarray(image.convert("RGB").resize((SIDE, 360), Pillow.Resampling.LANCZOS))
    return {
        "detflow": _psnr(exact, place_pixels(ours, Resize(SIDE).place(WIDTH, HEIGHT))),
        "Pillow script": _psnr(exact, lanczos[:, :, ::-1]),
        "ultralytics load_image": _psnr(exact, np.asarray(linear, np.uint8)),
    }


def _psnr(exact: NDArray[np.float64], pixels: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((exact - pixels) ** 2)))


def _photograph(seed: int) -> bytes:
    """A picture with shapes of all sizes and some grain, as a camera's JPEG of quality 90."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.float64)
    for cells in (8, 40, 160):
        noise = rng.uniform(0, 255, (cells * 9 // 16 + 1, cells, 3))
        pixels += cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) / 3
    pixels += rng.normal(0, 4, pixels.shape)
    encoded = cv2.imencode(".jpg", np.clip(pixels, 0, 255), [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return bytes(encoded)
