"""The training loop of every network: it can be stopped between two steps, saved and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detflow.errors import FailedPrecondition, InvalidArgument
from services.trainer.worker import library, memory, networks
from services.trainer.worker.batches import Sides, split_batch, to_pixels
from services.trainer.worker.bundle import Bundle, Image
from services.trainer.worker.data import Prefetcher, TrainDataset
from services.trainer.worker.distributed import Ranks
from services.trainer.worker.ema import Ema
from services.trainer.worker.evaluation import EvaluationSet, Score, forward, select
from services.trainer.worker.hyperparameters import Hyperparameters
from services.trainer.worker.networks import Network
from services.trainer.worker.optimizer import prepare, restore_optimizer
from services.trainer.worker.precision import Precision
from services.trainer.worker.spec import Spec
from services.trainer.worker.weights import ReadWeights, take_over

_MAX_GRADIENT_NORM = 10.0
_NO_TIMES: Mapping[str, float] = {"images": 0.0, "seconds": 0.0, "waited": 0.0}
"""Images of the epoch's steps so far, the time they took, and how much of it was waiting."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where the training is after a step.

    Attributes:
        epoch: From 1.
        number: From 1 within the epoch.
        losses: Running mean of each loss in this epoch, by name.
        learning_rate: Of the first parameter group.
        data_wait_share: Share of this epoch's time spent waiting for data.
        loader_shares: What making images takes time for, by name: shares of that time.
        own_losses: Each loss of this step alone, by name.
        own_wait_share: Share of this step's time spent waiting for data.
        images_per_second: Of this step, from the wait for its images to its end.
    """

    epoch: int
    number: int
    losses: Mapping[str, float]
    learning_rate: float
    data_wait_share: float
    loader_shares: Mapping[str, float]
    own_losses: Mapping[str, float]
    own_wait_share: float
    images_per_second: float


class Trainer:
    """One network on one bundle, with all that changes while it learns.

    Args:
        spec: What to train.
        bundle: What to learn from.
        ranks: The processes that learn together; by default it is alone.

    Attributes:
        device: Device in use.
        network: What learns.
        optimizer: What changes it.
        ema: Average of its weights: what is measured and kept.

    Raises:
        InvalidArgument: The specification names what this worker does not know or cannot train.
    """

    def __init__(self, spec: Spec, bundle: Bundle, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._spec = spec
        self._class_names = bundle.class_names
        self._hyperparameters = Hyperparameters.read(spec.hyperparameters)
        self.device = self._ranks.choose_device(self._hyperparameters.device)
        if self.device.type == "cpu":
            library.tune_cpu()
        torch.manual_seed(self._hyperparameters.seed)
        self.network = networks.build(
            spec.model,
            num_classes=len(bundle.class_names),
            image_size=self.image_size,
            hyperparameters=spec.hyperparameters,
        ).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._ranks.prepare(self.network)
        memory.watch(self.network.layers())
        self._frozen = _freeze(self.network, self._hyperparameters.freeze, spec.model)
        # To look for them in every step takes longer than to add up their gradients.
        self._learning = [one for one in self.network.parameters() if one.requires_grad]
        self._set_train_mode()
        self._images = Prefetcher(
            self._dataset(bundle.splits["train"]),
            batch_size=spec.batch_size,
            seed=self._hyperparameters.seed,
            ranks=self._ranks,
        )
        self._validation = self.evaluation_set(bundle.splits["val"])
        self._calibration = self._calibration_set(bundle.splits["train"])
        self.optimizer, self._schedule = prepare(
            self.network,
            self._hyperparameters,
            num_classes=len(bundle.class_names),
            num_images=len(bundle.splits["train"]),
            batch_size=spec.batch_size,
            epochs=spec.epochs,
            num_steps=self.num_steps,
        )
        self.ema = Ema(self.network)
        self._precision = Precision(self.device, amp=self._hyperparameters.amp)
        self._sides = Sides(self._hyperparameters, self.network.stride)
        self._last_update = -1
        # The epoch under way, or the last one until the next begins.
        self._epoch = 0
        self._steps_done = 0
        self._sums: dict[str, float] = {}
        self._times = dict(_NO_TIMES)
        self._best: dict[str, Any] = {"epoch": 0, "fitness": -1.0, "state_dict": None}

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
        return len(self._images)

    @property
    def image_size(self) -> int:
        """Side of the square the network sees, in pixels."""
        return self._hyperparameters.image_size

    @property
    def _num_at_once(self) -> int:
        """Images that are in the memory of one device at once."""
        return -(-self._spec.step_batch_size // self._ranks.num_ranks)

    @property
    def loader_shares(self) -> Mapping[str, float]:
        """What making the images of this epoch took time for, by name: shares of it."""
        return self._images.loader_shares

    @property
    def kept_bytes(self) -> int:
        """Memory that decoded images of all splits will take."""
        sets = (self._images.dataset, self._validation, self._calibration)
        return sum(images.kept_bytes for images in sets)

    def make_batch(self, images: Sequence[Image]) -> Mapping[str, Any]:
        """Makes a batch of some images as they are trained with, apart from the training's own."""
        dataset = self._dataset(images)
        return dataset.make_batch(range(len(images)))

    def evaluation_set(self, images: Sequence[Image]) -> EvaluationSet:
        """Returns images as they are measured and predicted."""
        return EvaluationSet(
            images,
            image_size=self.image_size,
            batch_size=2 * self._num_at_once,
            stride=self.network.stride,
        )

    def _calibration_set(self, images: Sequence[Image]) -> EvaluationSet:
        """Returns the images that the network wants batch statistics of, in full batches."""
        wanted = min(self.network.num_calibration_images, len(images))
        batch_size = 2 * self._num_at_once
        wanted -= wanted % batch_size if wanted > batch_size else 0
        chosen = [images[index * len(images) // wanted] for index in range(wanted)]
        return self.evaluation_set(chosen)

    def _dataset(self, images: Sequence[Image]) -> TrainDataset:
        return TrainDataset(
            images,
            hyperparameters=self._hyperparameters,
            batch_size=self._spec.batch_size,
            num_sharing=self._ranks.place.num_per_node,
        )

    def begin_with(self, found: ReadWeights) -> tuple[int, int]:
        """Takes weights over before the first step; returns how many tensors fit, of how many.

        Raises:
            InvalidArgument: WEIGHTS_DO_NOT_FIT.
        """
        numbers = take_over(self.network, found, self._spec.model)
        self.ema.network.load_state_dict(self.network.state_dict())
        return numbers

    def start(self, first_epoch: int) -> None:
        """Starts making images for the epochs from `first_epoch`, counted from 1."""
        epochs = self._spec.epochs
        self._images.start(
            range(first_epoch, epochs + 1),
            first_step=self._steps_done,
            without_mosaic_from=epochs + 1 - self._hyperparameters.close_mosaic,
        )

    def close(self) -> None:
        """Ends the thread that makes images."""
        self._images.close()

    def train_epoch(
        self,
        epoch: int,
        on_step: Callable[[Step], object],
        save: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Trains one epoch, or what is left of it; at its end `state` may be saved.

        Args:
            epoch: From 1.
            on_step: Called after every step; may raise to end the training. If what it returns at
                rank 0 is true, `state` is saved here as well.
            save: Called to save it, at every rank.

        Returns:
            Mean of each loss, lr, data_wait_share, images_per_second and epoch_seconds, by name; of
            all steps of the epoch, without what was done between them.

        Raises:
            FailedPrecondition: LOSS_NOT_FINITE.
        """
        if epoch != self._epoch:
            self._epoch, self._steps_done, self._sums = epoch, 0, {}
            self._times = dict(_NO_TIMES)
        waited_before, resumed = 0.0, time.perf_counter()
        for index, batch in enumerate(self._images, self._steps_done):
            losses = self.step(batch, epoch, index)
            for name, value in losses.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._steps_done = index + 1
            seconds = time.perf_counter() - resumed
            waited = self._images.wait_seconds - waited_before
            num_images = len(batch["img"]) * self._ranks.num_ranks
            for name, value in (("images", num_images), ("seconds", seconds), ("waited", waited)):
                self._times[name] += value
            step = Step(
                epoch=epoch,
                number=index + 1,
                losses=self._means(),
                learning_rate=self.optimizer.param_groups[0]["lr"],
                data_wait_share=self._times["waited"] / self._times["seconds"],
                loader_shares=self.loader_shares,
                own_losses=losses,
                own_wait_share=waited / seconds,
                images_per_second=num_images / seconds,
            )
            if self._ranks.agree(bool(on_step(step))):
                self._leave_to_first(epoch, index)
                save()
            resumed, waited_before = time.perf_counter(), self._images.wait_seconds
        self._leave_to_first(epoch, self.num_steps - 1)
        values = {f"train/{name}": value for name, value in self._means().items()}
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        if seconds := self._times["seconds"]:
            values["data_wait_share"] = self._times["waited"] / seconds
            values["images_per_second"] = self._times["images"] / seconds
            values["epoch_seconds"] = seconds
        return values

    def _means(self) -> dict[str, float]:
        """Returns the mean of each loss in the steps of this epoch so far."""
        return {name: value / self._steps_done for name, value in self._sums.items()}

    def step(
        self, batch: Mapping[str, Any], epoch: int, index: int, *, update: bool = False
    ) -> dict[str, float]:
        """Learns from one batch.

        Args:
            batch: As the images are made: img of shape (n, 3, h, w), uint8, and the targets.
            epoch: From 1.
            index: From 0 within the epoch.
            update: Change the weights now, however many batches are to be accumulated, with the
                largest images there may be; it is no step of the training.

        Returns:
            Its losses by name.

        Raises:
            FailedPrecondition: LOSS_NOT_FINITE.
        """
        if not self.network.training:
            self._set_train_mode()
        self._schedule.apply(self.optimizer, epoch, index)
        num_images, sums = len(batch["img"]), torch.zeros(())
        side = self._sides.largest if update else self._sides.of_step(epoch, index)
        # What is in memory at once is a part of the batch; the gradients of all parts add up.
        for part in split_batch(batch, self._num_at_once):
            names, losses = self._learn(part, side)
            sums = sums + losses * (len(part["img"]) / num_images)
        sums = self._ranks.add_up(sums, num_images)
        position = self._position(epoch, index)
        if update:
            self._update()
        elif position - self._last_update >= self._schedule.accumulate(epoch, index):
            self._update()
            self._last_update = position
        values = dict(zip(names, sums.tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise _not_finite(name, epoch, self._hyperparameters.lr0)
        return values

    def _leave_to_first(self, epoch: int, index: int) -> None:
        """Leaves to rank 0 what a checkpoint after a step shall hold."""
        is_pending = self._position(epoch, index) > self._last_update
        self._ranks.leave_to_first(self.network, pending=is_pending)

    def _position(self, epoch: int, index: int) -> int:
        return (epoch - 1) * self.num_steps + index

    def _learn(self, batch: Mapping[str, Any], side: int) -> tuple[list[str], torch.Tensor]:
        """Adds the gradients of some images, scaled; returns names and values of their losses."""
        targets = {
            name: batch[name].to(self.device, non_blocking=True)
            for name in ("batch_idx", "cls", "bboxes")
        }
        pixels = to_pixels(batch["img"], self.device, side)
        with self._precision.autocast():
            raw = self.network(pixels)
        loss, parts = self.network.loss(targets, self._precision.restored(raw))
        loss.backward()
        return list(parts), torch.stack(list(parts.values()))

    def _update(self) -> None:
        self._ranks.combine(self.network)
        gradients = [one.grad for one in self._learning if one.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.device.type != "cpu" or norm > _MAX_GRADIENT_NORM:  # others would be waited for
            nn.utils.clip_grads_with_norm_(self._learning, _MAX_GRADIENT_NORM, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    @torch.no_grad()
    def measure(self, epoch: int, on_batch: Callable[[], None]) -> dict[str, float]:
        """Measures the averaged weights on the validation split; remembers the best.

        Args:
            epoch: Epoch just trained, from 1.
            on_batch: Called before every batch; raises to stop.

        Returns:
            Losses and mAP by name.
        """
        self.ema.calibrate(self._calibration, self.device, on_batch)
        values = self.validate(self._validation, on_batch)
        fitness = 0.1 * values["val/map50"] + 0.9 * values["val/map50_95"]
        # While nothing is found at all the newest weights are the best, as for ultralytics.
        if fitness > self._best["fitness"] or self._best["fitness"] == 0.0:
            state_dict = self.ema.network.state_dict()
            state_dict = {name: value.clone() for name, value in state_dict.items()}
            self._best = {"epoch": epoch, "fitness": fitness, "state_dict": state_dict}
        return values

    @torch.no_grad()
    def validate(
        self, images: EvaluationSet, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Returns losses and mAP of the averaged weights on some images, by name."""
        network, score = self.ema.network, Score()
        sums: dict[str, float] = {}
        for batch in images:
            on_batch()
            predictions, raw = forward(network, batch, self.device)
            targets = {name: value.to(self.device) for name, value in batch.targets().items()}
            for name, value in network.loss(targets, raw)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
            for image, found in zip(batch.images, select(predictions, batch), strict=True):
                score.add(image, found)
        means = {f"val/{name}": value / len(images) for name, value in sums.items()}
        return score.values() | means

    def has_stalled(self, epoch: int) -> bool:
        """Says whether the last `patience` epochs brought nothing better."""
        patience = self._hyperparameters.patience
        return bool(patience) and epoch - self.best_epoch >= patience

    def state(self, epoch: int) -> dict[str, Any]:
        """Returns everything needed to go on as if nothing had been: tensors and plain values.

        Args:
            epoch: Last finished epoch: trained and measured.
        """
        step = self._steps_done if self._epoch == epoch + 1 else 0
        # The best weights are those of this epoch more often than not: not twice then.
        is_best = self._best["epoch"] == epoch and not step
        return {
            "epoch": epoch,
            "model": self.network.state_dict(),
            "ema": self.ema.network.state_dict(),
            "ema_updates": self.ema.num_updates,
            "optimizer": self.optimizer.state_dict(),
            "best": self._best | ({"state_dict": None} if is_best else {}),
            "step": step,
            "sums": dict(self._sums) if step else {},
            "times": dict(self._times) if step else {},
            "last_update": self._last_update,
            # Of the batches since then.
            "gradients": {
                name: parameter.grad
                for name, parameter in self.network.named_parameters()
                if parameter.grad is not None
            },
            "random": torch.get_rng_state(),
            "device_random": self._device_random(),
        }

    def _device_random(self) -> torch.Tensor | None:
        """Returns the state of the device's random numbers, if it has its own."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` returned."""
        self.network.load_state_dict(state["model"])
        self.ema.network.load_state_dict(state["ema"])
        self.ema.num_updates = state["ema_updates"]
        restore_optimizer(self.optimizer, state["optimizer"])
        self._best = dict(state["best"])
        if self._best["epoch"] and self._best["state_dict"] is None:
            self._best["state_dict"] = state["ema"]
        self._epoch, self._steps_done = state["epoch"] + 1, state["step"]
        self._sums = dict(state["sums"])
        self._times = dict(_NO_TIMES) | state.get("times", {})  # earlier releases did not save them
        self._last_update = state["last_update"]
        for name, parameter in self.network.named_parameters():
            gradient = state["gradients"].get(name)
            parameter.grad = None
            if gradient is not None and self._ranks.is_first:  # they are the first rank's
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        torch.set_rng_state(state["random"])
        if state["device_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_random"], self.device)

    def best_network(self) -> Network:
        """Returns the averaged network with its best weights, in evaluation mode."""
        self.ema.network.load_state_dict(self._best["state_dict"])
        return self.ema.network

    def weights(self) -> dict[str, Any]:
        """Returns the best weights with all that is needed to use them."""
        return {
            "model": self._spec.model,
            "class_names": list(self._class_names),
            "image_size": self.image_size,
            "epoch": self.best_epoch,
            "state_dict": self._best["state_dict"],
        }

    def _set_train_mode(self) -> None:
        """Sets what learns to training mode; frozen batch statistics stay as they are."""
        self.network.train()
        for layer in self._frozen:
            layer.eval()


def _freeze(network: Network, num_layers: int, model: str) -> list[nn.Module]:
    """Turns off the gradients of the first layers and returns these."""
    frozen = network.layers()[:num_layers]
    for layer in frozen:
        layer.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InvalidArgument(
            f"freeze={num_layers} leaves nothing of {model} to train; lower it",
            reason="OUT_OF_RANGE",
        )
    return frozen


def _not_finite(name: str, epoch: int, learning_rate: float) -> FailedPrecondition:
    return FailedPrecondition(
        f"{name} became infinite or NaN in epoch {epoch} at lr0={learning_rate:g}; lower lr0 or "
        "raise warmup_epochs, and start a new training",
        reason="LOSS_NOT_FINITE",
    )
