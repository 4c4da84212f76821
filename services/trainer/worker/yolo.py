"""YOLO models: ultralytics' trainer with loop, data and saving taken out of its hands."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import callbacks
from ultralytics.utils.metrics import DetMetrics

from detflow.errors import FailedPrecondition, InvalidArgument
from services.trainer.worker import library
from services.trainer.worker.bundle import Bundle
from services.trainer.worker.data import Prefetcher, TrainDataset
from services.trainer.worker.evaluation import EvaluationSet, Score, forward, select
from services.trainer.worker.spec import Spec, Value

MODELS = tuple(f"yolo{version}{scale}" for version in ("v5", "v8") for scale in "nsmlx")

_LIBRARY_NAMES = {
    "image_size": "imgsz",
    "nominal_batch_size": "nbs",
    "flip_lr": "fliplr",
} | {
    name: name
    for name in (
        *("optimizer", "lr0", "lrf", "warmup_epochs", "cos_lr", "momentum", "weight_decay"),
        *("patience", "mosaic", "close_mosaic", "hsv_h", "hsv_s", "hsv_v", "box", "cls"),
        *("freeze", "seed"),
    )
}
_WHOLE_NUMBERS = frozenset(
    ("image_size", "nominal_batch_size", "patience", "close_mosaic", "freeze", "seed")
)


@dataclass(frozen=True, slots=True)
class Step:
    """Where the training is after a step.

    Attributes:
        epoch: From 1.
        number: From 1 within the epoch.
        losses: Running mean of each loss in this epoch, by name.
        learning_rate: Of the first parameter group.
        data_wait_share: Share of this epoch's time spent waiting for data.
    """

    epoch: int
    number: int
    losses: Mapping[str, float]
    learning_rate: float
    data_wait_share: float


def library_arguments(spec: Spec) -> dict[str, Any]:
    """Translates a specification into ultralytics' arguments.

    Raises:
        InvalidArgument: UNKNOWN_MODEL or UNKNOWN_HYPERPARAMETER.
    """
    if spec.model not in MODELS:
        raise InvalidArgument(
            f"this worker cannot train {spec.model!r}; it trains {', '.join(MODELS)}",
            reason="UNKNOWN_MODEL",
        )
    values: dict[str, Value | None] = {}
    for name, value in spec.hyperparameters.items():
        if name == "amp":
            continue  # the library's own would download a model to check itself
        if name not in _LIBRARY_NAMES:
            raise InvalidArgument(
                f"this worker does not know the hyper-parameter {name!r}; "
                f"it knows amp, {', '.join(_LIBRARY_NAMES)}",
                reason="UNKNOWN_HYPERPARAMETER",
            )
        values[_LIBRARY_NAMES[name]] = int(value) if name in _WHOLE_NUMBERS else value
    if values.get("freeze") == 0:
        values["freeze"] = None
    return {
        **values,
        "model": f"{spec.model}.yaml",
        "data": "bundle",
        "epochs": spec.epochs,
        "batch": spec.batch_size,
        "save_dir": str(spec.folder / "library"),
        "device": "0" if torch.cuda.is_available() else "cpu",
        "pretrained": False,
        "amp": False,
        "deterministic": False,
        "plots": False,
        "save": False,
        "val": False,
        "verbose": False,
    }


class YoloTrainer(DetectionTrainer):
    """One YOLO model on one bundle.

    ultralytics builds the model, the loss, the optimizer, the schedule and the augmentations; the
    loop is ours, so that it can be stopped between two steps, saved exactly and measured.

    Args:
        spec: What to train.
        bundle: What to learn from.
    """

    model: Any
    ema: Any
    optimizer: Any
    lf: Any
    args: Any

    def __init__(self, spec: Spec, bundle: Bundle) -> None:
        self._bundle = bundle
        self._best: dict[str, Any] = {"epoch": 0, "fitness": -1.0, "state_dict": None}
        # The library would add its telemetry and the experiment trackers it finds.
        callbacks.add_integration_callbacks = lambda instance: None
        # Its own seeding imports torch's compiler, which takes seconds.
        engine.init_seeds = _seed  # type: ignore[attr-defined]
        super().__init__(overrides=library_arguments(spec), _callbacks={"": []})
        self._spec = spec
        if self.device.type == "cpu":
            library.tune_cpu()
        self._setup_train()  # type: ignore[no-untyped-call]
        self.model.to(memory_format=torch.channels_last)
        self.ema.ema.to(memory_format=torch.channels_last)
        self._compute_in_bf16 = bool(spec.hyperparameters.get("amp", True)) and _bf16_pays(
            self.device
        )
        self._val = EvaluationSet(
            bundle.splits["val"], image_size=self.args.imgsz, batch_size=2 * spec.batch_size
        )
        self._warmup_steps: int = self._get_warmup_iterations(self.num_steps)  # type: ignore[no-untyped-call]
        self._nominal_accumulate = self.accumulate
        self._last_update = -1

    @property
    def device_name(self) -> str:
        """Device in use, e.g. cpu or cuda:0."""
        return str(self.device)

    @property
    def best_epoch(self) -> int:
        """Epoch with the best weights, from 1."""
        return int(self._best["epoch"])

    @property
    def num_steps(self) -> int:
        """Steps per epoch."""
        return len(self.train_loader)

    @property
    def image_size(self) -> int:
        """Side of the square the model sees, in pixels."""
        return int(self.args.imgsz)

    # What ultralytics asks of its subclasses.

    def get_dataset(self) -> dict[str, Any]:
        """Returns what the library wants to know of the data; it never sees a data.yaml."""
        names = dict(enumerate(self._bundle.class_names))
        return {"train": "train", "val": "val", "names": names, "nc": len(names), "channels": 3}

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Builds the model without printing it."""
        return super().get_model(cfg, weights, verbose=False)

    def get_dataloader(
        self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train"
    ) -> Any:
        """Makes the training images; validation is not done by the library."""
        if mode != "train":
            return SimpleNamespace(dataset=SimpleNamespace(labels=[]))
        dataset = TrainDataset(
            self._bundle.splits["train"],
            class_names=self._bundle.class_names,
            args=self.args,
            batch_size=batch_size,
        )
        return Prefetcher(dataset, batch_size=batch_size, seed=self.args.seed)

    def get_validator(self) -> Any:
        """Returns the names of the metrics, which is all the library needs of a validator here."""
        return SimpleNamespace(metrics=DetMetrics())

    def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the library's optimizer, in the form that updates all weights in one pass."""
        optimizer = super().build_optimizer(*args, **kwargs)  # type: ignore[no-untyped-call]
        if isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):  # AdamW is an Adam
            for group in optimizer.param_groups:
                group |= {"fused": True, "foreach": False}
        return optimizer

    # The loop.

    def start(self, first_epoch: int) -> None:
        """Starts making images for the epochs from `first_epoch`, counted from 1."""
        self.optimizer.zero_grad()
        self._last_update = (first_epoch - 1) * self.num_steps - 1
        without_mosaic = (
            self.epochs - self.args.close_mosaic if self.args.close_mosaic else self.epochs
        )
        self.train_loader.start(
            range(first_epoch - 1, self.epochs), without_mosaic_from=without_mosaic, args=self.args
        )

    def close(self) -> None:
        """Ends the thread that makes images."""
        self.train_loader.close()

    def train_epoch(self, epoch: int, on_step: Callable[[Step], None]) -> dict[str, float]:
        """Trains one epoch.

        Args:
            epoch: From 1.
            on_step: Called after every step; may raise to end the training.

        Returns:
            Mean of each loss, lr, data_wait_share and images_per_second, by name.

        Raises:
            FailedPrecondition: LOSS_NOT_FINITE.
        """
        self._model_train()  # type: ignore[no-untyped-call]
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lf(epoch - 1)
        sums: dict[str, float] = {}
        num_images = 0
        began = time.perf_counter()
        for index, batch in enumerate(self.train_loader):
            position = (epoch - 1) * self.num_steps + index
            self._warm_up(position, epoch)
            losses = self._step(batch, position)
            for name, value in losses.items():
                if not math.isfinite(value):
                    raise _not_finite(name, epoch, self.args.lr0)
                sums[name] = sums.get(name, 0.0) + value
            num_images += len(batch["img"])
            means = {name: value / (index + 1) for name, value in sums.items()}
            waited = self.train_loader.wait_seconds / (time.perf_counter() - began)
            learning_rate = self.optimizer.param_groups[0]["lr"]
            on_step(Step(epoch, index + 1, means, learning_rate, waited))
        return {
            **{f"train/{name}": value for name, value in means.items()},
            "lr": learning_rate,
            "data_wait_share": waited,
            "images_per_second": num_images / (time.perf_counter() - began),
        }

    def _warm_up(self, position: int, epoch: int) -> None:
        """Sets learning rates, momentum and accumulation in the warm-up, as ultralytics does."""
        if not self._warmup_steps or position > self._warmup_steps:
            return
        share = position / self._warmup_steps
        self.accumulate = max(1, round(1 + share * (self._nominal_accumulate - 1)))
        for group in self.optimizer.param_groups:
            first = self.args.warmup_bias_lr if group.get("param_group") == "bias" else 0.0
            last = group["initial_lr"] * self.lf(epoch - 1)
            group["lr"] = first + share * (last - first)
            if "momentum" in group:
                start = self.args.warmup_momentum
                group["momentum"] = start + share * (self.args.momentum - start)

    def _step(self, batch: dict[str, Any], position: int) -> dict[str, float]:
        for name in ("batch_idx", "cls", "bboxes"):
            batch[name] = batch[name].to(self.device, non_blocking=True)
        pixels = batch["img"].to(self.device, non_blocking=True)
        pixels = pixels.contiguous(memory_format=torch.channels_last).float() / 255
        with self._autocast():
            outputs = self.model(pixels)
        if self._compute_in_bf16:  # the loss is too small a part to be worth its errors
            outputs = {
                name: value.float() if isinstance(value, torch.Tensor) else value
                for name, value in outputs.items()
            }
        loss, items = self.model.loss(batch, outputs)
        loss.sum().backward()
        if position - self._last_update >= self.accumulate:
            self.optimizer_step()  # type: ignore[no-untyped-call]
            self._last_update = position
        return dict(zip(items, torch.stack(list(items.values())).tolist(), strict=True))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._compute_in_bf16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @torch.no_grad()
    def measure(self, epoch: int, on_batch: Callable[[], None]) -> dict[str, float]:
        """Measures the averaged weights on the validation split; remembers the best.

        Args:
            epoch: Epoch just trained, from 1.
            on_batch: Called before every batch; raises to stop.

        Returns:
            Losses and mAP by name.
        """
        model, score = self.ema.ema, Score()
        sums: dict[str, float] = {}
        for batch in self._val:
            on_batch()
            predictions, raw = forward(model, batch, self.device)
            targets = {name: value.to(self.device) for name, value in batch.targets().items()}
            for name, value in model.loss(targets, raw)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
            for image, found in zip(batch.images, select(predictions, batch), strict=True):
                score.add(image, found)
        values = score.values()
        fitness = 0.1 * values["val/map50"] + 0.9 * values["val/map50_95"]
        # While nothing is found at all the newest weights are the best, as for the library.
        if fitness > self._best["fitness"] or self._best["fitness"] == 0.0:
            state_dict = {name: value.clone() for name, value in model.state_dict().items()}
            self._best = {"epoch": epoch, "fitness": fitness, "state_dict": state_dict}
        return values | {f"val/{name}": value / len(self._val) for name, value in sums.items()}

    def has_stalled(self, epoch: int) -> bool:
        """Says whether the last `patience` epochs brought nothing better."""
        return bool(self.args.patience) and epoch - self._best["epoch"] >= self.args.patience

    def state(self, epoch: int) -> dict[str, Any]:
        """Returns everything needed to go on after `epoch`: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            # The best weights are those of this epoch more often than not: not twice then.
            "best": self._best | ({"state_dict": None} if self._best["epoch"] == epoch else {}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self._best = state["best"]
        if self._best["state_dict"] is None:
            self._best["state_dict"] = state["ema"]

    def best_model(self) -> Any:
        """Returns the averaged model with its best weights, in evaluation mode."""
        model = self.ema.ema
        model.load_state_dict(self._best["state_dict"])
        return model

    def weights(self) -> dict[str, Any]:
        """Returns the best weights with all that is needed to use them."""
        return {
            "model": self._spec.model,
            "yaml": self.model.yaml,
            "class_names": list(self._bundle.class_names),
            "image_size": self.image_size,
            "epoch": self._best["epoch"],
            "state_dict": self._best["state_dict"],
        }


def _bf16_pays(device: torch.device) -> bool:
    """Says whether the device multiplies bf16 matrices faster than fp32 ones.

    On CPUs only AMX does: with AVX512-BF16 alone the convolutions take longer than in fp32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def _seed(seed: int = 0, deterministic: bool = False) -> None:
    """Seeds what the augmentations and the weights are drawn from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _not_finite(name: str, epoch: int, learning_rate: float) -> FailedPrecondition:
    return FailedPrecondition(
        f"{name} became infinite or NaN in epoch {epoch} at lr0={learning_rate:g}; lower lr0 or "
        "raise warmup_epochs, and start a new training",
        reason="LOSS_NOT_FINITE",
    )
