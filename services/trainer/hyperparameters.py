"""The advanced hyper-parameters: one schema is served, checks requests and gives the defaults."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from detflow.errors import MAX_VIOLATIONS, InvalidArgument, Violation
from services.trainer.models import FAMILIES, Model

Value: TypeAlias = float | bool | str
"""Value in force; whole numbers travel as doubles (google.protobuf.Value)."""

_FIELD = "training.hyperparameters"
_MAX_BATCH_NOT_ACCUMULATED = 64


class Type(Enum):
    """Type of a value."""

    INTEGER = auto()
    NUMBER = auto()
    BOOLEAN = auto()
    CHOICE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameter:
    """One entry of the schema.

    Attributes:
        name: As in `Training.hyperparameters` and `--set name=value`.
        type: Type of the value.
        default: Default of every family that `family_defaults` does not name.
        minimum: Least allowed value, for numbers.
        maximum: Greatest allowed value, for numbers.
        multiple_of: The value must be a multiple of this, for whole numbers.
        choices: Allowed values, for CHOICE.
        family_defaults: Defaults of the families that differ.
        help_en: Help in English.
        help_ko: Help in Korean.
    """

    name: str
    type: Type
    default: Value
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int = 1
    choices: tuple[str, ...] = ()
    family_defaults: Mapping[str, Value] | None = None
    help_en: str
    help_ko: str

    def default_of(self, family: str) -> Value:
        """Returns the default of a model family."""
        return (self.family_defaults or {}).get(family, self.default)

    def defaults(self) -> dict[str, Value]:
        """Returns the default of every family of the catalogue."""
        return {family: self.default_of(family) for family in FAMILIES}

    def range_text(self) -> str:
        """Says in words what is allowed."""
        if self.type is Type.BOOLEAN:
            return "true or false"
        if self.type is Type.CHOICE:
            return f"one of {', '.join(self.choices)}"
        kind = "a whole number" if self.type is Type.INTEGER else "a number"
        text = f"{kind} from {self.minimum:g} to {self.maximum:g}"
        return text if self.multiple_of == 1 else f"{text}, a multiple of {self.multiple_of}"

    def check(self, value: object) -> Violation | None:
        """Checks one value; returns what is wrong with it, if anything."""
        reason = self._reason_against(value)
        if reason is None:
            return None
        problem = f"{self.name} is {value!r}; it must be {self.range_text()}"
        return Violation(f"{_FIELD}.{self.name}", reason, problem)

    def typed(self, value: object) -> Value:
        """Returns a value that `check` found good, a whole number as an int."""
        assert isinstance(value, int | float | str)  # a bool is an int too
        return int(value) if self.type is Type.INTEGER else value

    def _reason_against(self, value: object) -> str | None:
        if self.type is Type.BOOLEAN:
            return None if isinstance(value, bool) else "WRONG_TYPE"
        if self.type is Type.CHOICE:
            if not isinstance(value, str):
                return "WRONG_TYPE"
            return None if value in self.choices else "OUT_OF_RANGE"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "WRONG_TYPE"
        return None if self._number_in_range(float(value)) else "OUT_OF_RANGE"

    def _number_in_range(self, number: float) -> bool:
        assert self.minimum is not None and self.maximum is not None
        if not math.isfinite(number) or not self.minimum <= number <= self.maximum:
            return False
        return self.type is Type.NUMBER or number % self.multiple_of == 0


SCHEMA: tuple[Hyperparameter, ...] = (
    Hyperparameter(
        name="image_size",
        type=Type.INTEGER,
        minimum=32,
        maximum=2048,
        multiple_of=32,
        default=640,
        help_en=(
            "Side of the square the model sees, in pixels. Larger finds smaller objects and "
            "costs time and memory with its square. Default: the model's input size."
        ),
        help_ko=(
            "모델에 입력되는 정사각형 이미지의 한 변(픽셀). 클수록 작은 물체를 잘 찾지만 "
            "시간과 메모리가 제곱으로 늘어납니다. 기본값: 모델의 입력 크기."
        ),
    ),
    Hyperparameter(
        name="optimizer",
        type=Type.CHOICE,
        choices=("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSProp", "auto"),
        default="AdamW",
        help_en=(
            "How the weights are updated. auto chooses optimizer, learning rate and momentum "
            "itself and ignores lr0 and momentum."
        ),
        help_ko=(
            "가중치를 갱신하는 방법. auto는 최적화기, 학습률, 모멘텀을 스스로 정하며 lr0와 "
            "momentum을 무시합니다."
        ),
    ),
    Hyperparameter(
        name="lr0",
        type=Type.NUMBER,
        minimum=1e-6,
        maximum=1.0,
        default=0.002,
        help_en="Initial learning rate. Typical: 0.01 for SGD, 0.001 to 0.003 for the Adam family.",
        help_ko="초기 학습률. 보통 SGD는 0.01, Adam 계열은 0.001~0.003.",
    ),
    Hyperparameter(
        name="lrf",
        type=Type.NUMBER,
        minimum=1e-4,
        maximum=1.0,
        default=0.01,
        help_en="Final learning rate as a share of lr0.",
        help_ko="최종 학습률의 lr0에 대한 비율.",
    ),
    Hyperparameter(
        name="warmup_epochs",
        type=Type.NUMBER,
        minimum=0,
        maximum=100,
        default=3.0,
        help_en=(
            "Epochs in which the learning rate rises from near zero; fractions are fine. If "
            "not given: 3, but at most a tenth of all epochs."
        ),
        help_ko=(
            "학습률을 0 근처에서 서서히 올리는 에폭 수(소수 가능). 지정하지 않으면 3, 단 전체 "
            "에폭의 10분의 1 이하."
        ),
    ),
    Hyperparameter(
        name="cos_lr",
        type=Type.BOOLEAN,
        default=False,
        help_en="Lower the learning rate along a cosine instead of a straight line.",
        help_ko="학습률을 직선 대신 코사인 곡선으로 낮춥니다.",
    ),
    Hyperparameter(
        name="momentum",
        type=Type.NUMBER,
        minimum=0,
        maximum=0.999,
        default=0.9,
        help_en="Momentum of SGD and RMSProp, first beta of the Adam family.",
        help_ko="SGD와 RMSProp의 모멘텀, Adam 계열의 첫 번째 베타.",
    ),
    Hyperparameter(
        name="weight_decay",
        type=Type.NUMBER,
        minimum=0,
        maximum=0.1,
        default=0.0005,
        help_en="Strength of the pull of the weights towards zero; works against overfitting.",
        help_ko="가중치를 0 쪽으로 당기는 세기. 과적합을 줄입니다.",
    ),
    Hyperparameter(
        name="patience",
        type=Type.INTEGER,
        minimum=0,
        maximum=10000,
        default=100,
        help_en=(
            "Stop early after this many epochs without a better validation result; 0 never "
            "stops early. The best weights are kept."
        ),
        help_ko=(
            "검증 성능이 이 에폭 수만큼 나아지지 않으면 일찍 멈춥니다. 0은 멈추지 않음. 가장 "
            "좋은 가중치를 보관합니다."
        ),
    ),
    Hyperparameter(
        name="mosaic",
        type=Type.NUMBER,
        minimum=0,
        maximum=1,
        default=1.0,
        help_en="Probability that a training image is made of four.",
        help_ko="네 장의 이미지를 이어 붙여 학습 이미지를 만들 확률.",
    ),
    Hyperparameter(
        name="close_mosaic",
        type=Type.INTEGER,
        minimum=0,
        maximum=10000,
        default=10,
        help_en=(
            "Epochs at the end without mosaic. If not given: 10, but at most a fifth of all epochs."
        ),
        help_ko=(
            "마지막에 모자이크를 끄는 에폭 수. 지정하지 않으면 10, 단 전체 에폭의 5분의 1 이하."
        ),
    ),
    Hyperparameter(
        name="flip_lr",
        type=Type.NUMBER,
        minimum=0,
        maximum=1,
        default=0.5,
        help_en=(
            "Probability that a training image is flipped left-right each time it is shown. "
            "Set 0 where left and right mean different things."
        ),
        help_ko=(
            "학습 이미지를 보여줄 때마다 좌우로 뒤집을 확률. 좌우가 의미를 가지면 0으로 하세요."
        ),
    ),
    Hyperparameter(
        name="hsv_h",
        type=Type.NUMBER,
        minimum=0,
        maximum=1,
        default=0.015,
        help_en="Largest random change of hue, as a share of the colour circle.",
        help_ko="색상을 무작위로 바꾸는 최대 폭(색상환에 대한 비율).",
    ),
    Hyperparameter(
        name="hsv_s",
        type=Type.NUMBER,
        minimum=0,
        maximum=1,
        default=0.7,
        help_en="Largest random change of saturation, as a share.",
        help_ko="채도를 무작위로 바꾸는 최대 비율.",
    ),
    Hyperparameter(
        name="hsv_v",
        type=Type.NUMBER,
        minimum=0,
        maximum=1,
        default=0.4,
        help_en="Largest random change of brightness, as a share.",
        help_ko="밝기를 무작위로 바꾸는 최대 비율.",
    ),
    Hyperparameter(
        name="box",
        type=Type.NUMBER,
        minimum=0,
        maximum=100,
        default=7.5,
        help_en="Gain of the box loss.",
        help_ko="박스 손실의 가중치.",
    ),
    Hyperparameter(
        name="cls",
        type=Type.NUMBER,
        minimum=0,
        maximum=100,
        default=0.5,
        help_en="Gain of the class loss.",
        help_ko="클래스 손실의 가중치.",
    ),
    Hyperparameter(
        name="freeze",
        type=Type.INTEGER,
        minimum=0,
        maximum=22,
        default=0,
        help_en="Number of layers, from the input, whose weights stay as they are.",
        help_ko="입력 쪽부터 가중치를 고정할 층의 수.",
    ),
    Hyperparameter(
        name="amp",
        type=Type.BOOLEAN,
        default=True,
        help_en="Compute in 16 bits where that is safe: faster, less memory.",
        help_ko="안전한 곳에서 16비트로 계산합니다. 더 빠르고 메모리를 덜 씁니다.",
    ),
    Hyperparameter(
        name="nominal_batch_size",
        type=Type.INTEGER,
        minimum=0,
        maximum=1024,
        default=0,
        help_en=(
            "Images per update of the weights: smaller batches are accumulated up to it. 0 "
            "means the batch size, up to 64. Larger values leave too few updates on small data "
            "sets."
        ),
        help_ko=(
            "가중치를 한 번 갱신할 때의 이미지 수. 배치가 더 작으면 여기까지 누적합니다. 0은 "
            "배치 크기(최대 64). 작은 데이터 세트에서는 큰 값이 갱신 횟수를 너무 줄입니다."
        ),
    ),
    Hyperparameter(
        name="seed",
        type=Type.INTEGER,
        minimum=0,
        maximum=2**31 - 1,
        default=0,
        help_en=(
            "Seed of every random choice: the same seed on the same machine repeats the training."
        ),
        help_ko="모든 무작위 선택의 시드. 같은 기기에서 같은 시드는 같은 학습을 되풀이합니다.",
    ),
)

_BY_NAME = {entry.name: entry for entry in SCHEMA}


def resolve(
    given: Mapping[str, object], *, model: Model, batch_size: int, epochs: int
) -> dict[str, Value]:
    """Checks what a user set and completes it.

    Args:
        given: Values by name, as they came.
        model: The model to train; gives the defaults.
        batch_size: Images per step.
        epochs: Passes over the training split.

    Returns:
        Every hyper-parameter with the value in force, in the order of the schema.

    Raises:
        InvalidArgument: UNKNOWN_HYPERPARAMETER, OUT_OF_RANGE or WRONG_TYPE; a violation for each.
    """
    strangers = sorted(name for name in given if name not in _BY_NAME)
    # As many as an error carries: finding what each might have meant takes its time.
    unknown = [_unknown(name) for name in strangers[:MAX_VIOLATIONS]]
    wrong = [entry.check(given[entry.name]) for entry in SCHEMA if entry.name in given]
    violations = [*unknown, *filter(None, wrong)]
    if violations:
        first = violations[0]
        raise InvalidArgument(
            first.description,
            reason=first.reason,
            violations=violations,
            total=len(violations) + len(strangers) - len(unknown),
        )
    values = {entry.name: entry.default_of(model.family) for entry in SCHEMA}
    values["image_size"] = model.input_size_px
    # Without these two bounds a short training would spend most of its life in warm-up, or
    # without mosaic.
    values["warmup_epochs"] = min(float(values["warmup_epochs"]), epochs / 10)
    values["close_mosaic"] = min(int(values["close_mosaic"]), epochs // 5)
    values |= {name: _BY_NAME[name].typed(value) for name, value in given.items()}
    if not values["nominal_batch_size"]:
        values["nominal_batch_size"] = min(batch_size, _MAX_BATCH_NOT_ACCUMULATED)
    return values


def _unknown(name: str) -> Violation:
    near = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(_BY_NAME)}"
    return Violation(
        f"{_FIELD}.{name}",
        "UNKNOWN_HYPERPARAMETER",
        f"there is no hyper-parameter {name!r}; {hint}",
    )
