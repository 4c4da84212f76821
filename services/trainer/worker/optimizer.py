"""Optimizers and their schedule, by ultralytics' recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detflow.errors import InvalidArgument
from services.trainer.worker.hyperparameters import Hyperparameters
from services.trainer.worker.networks import Network

_WARMUP_BIAS_LR = 0.1
_WARMUP_MOMENTUM = 0.8
_SECOND_BETA = 0.999
_MANY_UPDATES = 10_000
_BOOST = 3
"""MuSGD learns the class branch of the head this much faster."""
_NORMS = tuple(kind for name, kind in vars(nn).items() if "Norm" in name)


@dataclass(frozen=True, slots=True)
class Choice:
    """An optimizer and its numbers.

    Attributes:
        name: One of the schema's, or MuSGD.
        lr0: First learning rate.
        momentum: Momentum, or the first beta of the Adam family.
        warmup_bias_lr: Learning rate of the biases when the warm-up begins.
    """

    name: str
    lr0: float
    momentum: float
    warmup_bias_lr: float = _WARMUP_BIAS_LR


class AdamW(torch.optim.AdamW):
    """torch's AdamW: the same numbers, sooner.

    torch's own copies each tensor of four axes that is channels_last in every step, and what it
    decorates its methods with imports torch's compiler, which takes 1.5 s and is not used here.
    """

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__  # type: ignore[attr-defined]
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Changes the weights that have a gradient.

        Args:
            closure: Not supported.
        """
        for group in self.param_groups:
            tensors: tuple[list[torch.Tensor], ...] = ([], [], [], [], [])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    moments = self._moments(parameter)
                    for found, tensor in zip(
                        tensors, (parameter, parameter.grad, *moments), strict=True
                    ):
                        found.append(_as_in_memory(tensor))
            parameters, gradients, means, squares, steps = tensors
            if not parameters:
                continue
            torch._foreach_add_(steps, 1)
            first_beta, second_beta = group["betas"]
            torch._fused_adamw_(
                parameters,
                gradients,
                means,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=first_beta,
                beta2=second_beta,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _moments(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns mean and mean square of a weight's gradients, and how many there were."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _as_in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with its axes in the order they have in memory if that is channels_last."""
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def choose(hyperparameters: Hyperparameters, *, num_classes: int, num_updates: int) -> Choice:
    """Returns the optimizer asked for; for `auto`, what ultralytics takes for so many updates."""
    if hyperparameters.optimizer != "auto":
        return Choice(hyperparameters.optimizer, hyperparameters.lr0, hyperparameters.momentum)
    if num_updates > _MANY_UPDATES:
        return Choice("MuSGD", 0.01, 0.9, warmup_bias_lr=0.0)
    return Choice("AdamW", round(0.01 / (4 + num_classes), 6), 0.9, warmup_bias_lr=0.0)


def build_optimizer(
    network: Network, choice: Choice, *, weight_decay: float
) -> torch.optim.Optimizer:
    """Builds an optimizer of the weights that are to change.

    Groups: weights, which decay; weights of normalisations and biases, which do not.

    Args:
        network: What to optimize, with gradients turned off for what stays as it is.
        choice: Optimizer.
        weight_decay: Of the first group.
    """
    use_muon = choice.name == "MuSGD"
    branches = network.class_branch() if use_muon else []
    boosted = {id(parameter) for branch in branches for parameter in branch.parameters()}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                key = _kind(module, name, parameter, use_muon), id(parameter) in boosted
                members.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (kind, is_boosted), parameters in members.items():
        lr = choice.lr0 * (_BOOST if is_boosted else 1)
        decay = weight_decay if kind in ("weight", "muon") else 0.0
        group = {"params": parameters, "kind": kind, "lr": lr, "initial_lr": lr}
        groups.append(group | {"weight_decay": decay})
        if use_muon:
            groups[-1]["use_muon"] = kind == "muon"
    return _construct(choice, groups)


def _kind(module: nn.Module, name: str, parameter: nn.Parameter, use_muon: bool) -> str:
    if use_muon and parameter.ndim in (2, 4):
        return "muon"  # it makes matrices orthogonal
    if "bias" in name:
        return "bias"
    return "norm" if isinstance(module, _NORMS) else "weight"


def _construct(choice: Choice, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Makes the optimizer, where there is one in the form that updates all weights in one pass."""
    lr, momentum, betas = choice.lr0, choice.momentum, (choice.momentum, _SECOND_BETA)
    match choice.name:
        case "SGD":
            return torch.optim.SGD(
                groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True
            )
        case "RMSProp":
            return torch.optim.RMSprop(groups, lr=lr, momentum=momentum)
        case "Adam":
            return torch.optim.Adam(groups, lr=lr, betas=betas, fused=True)
        case "AdamW":
            return AdamW(groups, lr=lr, betas=betas, fused=True)
        case "NAdam":
            return torch.optim.NAdam(groups, lr=lr, betas=betas)
        case "RAdam":
            return torch.optim.RAdam(groups, lr=lr, betas=betas)
        case "MuSGD":
            from ultralytics.optim import MuSGD

            return MuSGD(groups, lr=lr, momentum=momentum, nesterov=True, muon=0.2, sgd=1.0)
    raise InvalidArgument(
        f"this worker does not know the optimizer {choice.name!r}; "
        "it knows SGD, Adam, AdamW, NAdam, RAdam, RMSProp and auto",
        reason="OUT_OF_RANGE",
    )


def prepare(
    network: Network,
    hyperparameters: Hyperparameters,
    *,
    num_classes: int,
    num_images: int,
    batch_size: int,
    epochs: int,
    num_steps: int,
) -> tuple[torch.optim.Optimizer, Schedule]:
    """Builds the optimizer of a training and its schedule.

    Args:
        network: What to optimize, with gradients turned off for what stays as it is.
        hyperparameters: Their optimizer, its numbers and its schedule.
        num_classes: Classes of the data.
        num_images: Images of the training split.
        batch_size: Images per step.
        epochs: Passes over the training split.
        num_steps: Steps per epoch.
    """
    nominal = hyperparameters.nominal_batch_size or batch_size
    accumulate = max(1, round(nominal / batch_size))
    choice = choose(
        hyperparameters,
        num_classes=num_classes,
        num_updates=math.ceil(num_images / max(batch_size, nominal)) * epochs,
    )
    # Fewer images per update than the nominal batch size has: less decay per update.
    weight_decay = hyperparameters.weight_decay * batch_size * accumulate / nominal
    optimizer = build_optimizer(network, choice, weight_decay=weight_decay)
    schedule = Schedule(
        hyperparameters,
        choice,
        epochs=epochs,
        num_steps=num_steps,
        accumulate=min(accumulate, num_steps * epochs),
    )
    return optimizer, schedule


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Goes back to a state of the same optimizer that was saved.

    Its tensors get the order in memory that their parameters have: optimizers that update all
    weights in one pass take it for granted, and sums are rounded in that order.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


class Schedule:
    """Learning rates, momentum and accumulation at every step: functions of the step alone.

    In the warm-up, learning rates and momentum rise step by step - the biases' learning rate
    falls - and more and more batches are accumulated; then learning rates fall epoch by epoch.

    Args:
        hyperparameters: Their warmup_epochs, cos_lr and lrf.
        choice: The optimizer.
        epochs: Passes over the training split.
        num_steps: Steps per epoch.
        accumulate: Batches per update of the weights after the warm-up.
    """

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        choice: Choice,
        *,
        epochs: int,
        num_steps: int,
        accumulate: int,
    ) -> None:
        self._choice = choice
        self._epochs = epochs
        self._num_steps = num_steps
        self._accumulate = accumulate
        self._lrf = hyperparameters.lrf
        self._along_cosine = hyperparameters.cos_lr
        # At least the last epoch is a regular one.
        self._warmup_steps = round(min(hyperparameters.warmup_epochs, epochs - 1) * num_steps)

    def apply(self, optimizer: torch.optim.Optimizer, epoch: int, step: int) -> None:
        """Sets learning rates and momentum for a step.

        Args:
            optimizer: Made for the same choice.
            epoch: From 1.
            step: From 0 within the epoch.
        """
        share = self._warmup_share(epoch, step)
        for group in optimizer.param_groups:
            regular = group["initial_lr"] * self._factor(epoch)
            first = self._choice.warmup_bias_lr if group["kind"] == "bias" else 0.0
            group["lr"] = first + share * (regular - first) if share < 1 else regular
            if "momentum" in group:
                group["momentum"] = _WARMUP_MOMENTUM + share * (
                    self._choice.momentum - _WARMUP_MOMENTUM
                )

    def accumulate(self, epoch: int, step: int) -> int:
        """Returns how many batches an update of the weights takes at a step."""
        return max(1, round(1 + self._warmup_share(epoch, step) * (self._accumulate - 1)))

    def _warmup_share(self, epoch: int, step: int) -> float:
        position = (epoch - 1) * self._num_steps + step
        return min(1.0, position / self._warmup_steps) if self._warmup_steps else 1.0

    def _factor(self, epoch: int) -> float:
        share = (epoch - 1) / self._epochs
        fallen = (1 - math.cos(math.pi * share)) / 2 if self._along_cosine else share
        return 1 - fallen * (1 - self._lrf)
