"""The hyper-parameters in the types the worker computes with; their ranges are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from detflow.errors import InvalidArgument
from services.trainer.worker.spec import Value


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """Every hyper-parameter with its value; what each means is told by the trainer's schema.

    A `nominal_batch_size` of 0 stands for the batch size.
    """

    image_size: int = 640
    optimizer: str = "AdamW"
    lr0: float = 0.002
    lrf: float = 0.01
    warmup_epochs: float = 3.0
    cos_lr: bool = False
    momentum: float = 0.9
    weight_decay: float = 0.0005
    dropout: float = 0.0
    patience: int = 100
    mosaic: float = 1.0
    close_mosaic: int = 10
    flip_lr: float = 0.5
    multi_scale: float = 0.0
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    box: float = 7.5
    cls: float = 0.5
    dfl: float = 1.5
    freeze: int = 0
    amp: bool = True
    nominal_batch_size: int = 0
    seed: int = 0
    device: str = "auto"

    @classmethod
    def read(cls, values: Mapping[str, Value]) -> Self:
        """Reads the values of a specification; whole numbers come as doubles.

        Raises:
            InvalidArgument: UNKNOWN_HYPERPARAMETER.
        """
        kinds: dict[str, type] = {
            field.name: type(field.default) for field in dataclasses.fields(cls)
        }
        for name in values:
            if name not in kinds:
                raise InvalidArgument(
                    f"this worker does not know the hyper-parameter {name!r}; "
                    f"it knows {', '.join(kinds)}",
                    reason="UNKNOWN_HYPERPARAMETER",
                )
        return cls(**{name: kinds[name](value) for name, value in values.items()})
