"""The advanced hyper-parameters: one schema is served, checks requests and gives the defaults."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from detflow.errors import MAX_VIOLATIONS, InvalidArgument, Violation
from services.trainer.hyperparameter import FIELD, Hyperparameter, Range, Type, Value
from services.trainer.models import FAMILIES, Model

_EFFICIENTDET = "efficientdet"
_YOLO = tuple(family for family in FAMILIES if family != _EFFICIENTDET)
_MAX_BATCH_NOT_ACCUMULATED = 64

SCHEMA: tuple[Hyperparameter, ...] = (
    Hyperparameter(
        name="image_size",
        type=Type.INTEGER,
        range=Range(minimum=32, maximum=2048, multiple_of=32),
        family_ranges={_EFFICIENTDET: Range(minimum=128, maximum=2048, multiple_of=128)},
        default=640,
        help_en=(
            "Side of the square the model sees, in pixels: a multiple of 32, for EfficientDet of "
            "128. Larger finds smaller objects and costs time and memory with its square. "
            "Default: the model's input size."
        ),
        help_ko=(
            "모델에 입력되는 정사각형 이미지의 한 변(픽셀). 32의 배수, EfficientDet은 128의 "
            "배수. 클수록 작은 물체를 잘 찾지만 시간과 메모리가 제곱으로 늘어납니다. 기본값: "
            "모델의 입력 크기."
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
        range=Range(minimum=1e-6, maximum=1.0),
        default=0.002,
        family_defaults={_EFFICIENTDET: 0.004},
        help_en="Initial learning rate. Typical: 0.01 for SGD, 0.001 to 0.003 for the Adam family.",
        help_ko="초기 학습률. 보통 SGD는 0.01, Adam 계열은 0.001~0.003.",
    ),
    Hyperparameter(
        name="lrf",
        type=Type.NUMBER,
        range=Range(minimum=1e-4, maximum=1.0),
        default=0.01,
        help_en="Final learning rate as a share of lr0.",
        help_ko="최종 학습률의 lr0에 대한 비율.",
    ),
    Hyperparameter(
        name="warmup_epochs",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=100),
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
        family_defaults={_EFFICIENTDET: True},
        help_en="Lower the learning rate along a cosine instead of a straight line.",
        help_ko="학습률을 직선 대신 코사인 곡선으로 낮춥니다.",
    ),
    Hyperparameter(
        name="momentum",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=0.999),
        default=0.9,
        help_en="Momentum of SGD and RMSProp, first beta of the Adam family.",
        help_ko="SGD와 RMSProp의 모멘텀, Adam 계열의 첫 번째 베타.",
    ),
    Hyperparameter(
        name="weight_decay",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=0.1),
        default=0.0005,
        help_en="Strength of the pull of the weights towards zero; works against overfitting.",
        help_ko="가중치를 0 쪽으로 당기는 세기. 과적합을 줄입니다.",
    ),
    Hyperparameter(
        name="dropout",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=0.9),
        default=0.0,
        help_en=(
            "Share of the features before the last layers that is left out at random in each "
            "training step; works against overfitting. 0 leaves none out."
        ),
        help_ko=(
            "학습 단계마다 마지막 층 앞의 특징 중 무작위로 빼는 비율. 과적합을 줄입니다. 0은 빼지 "
            "않음."
        ),
    ),
    Hyperparameter(
        name="patience",
        type=Type.INTEGER,
        range=Range(minimum=0, maximum=10000),
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
        range=Range(minimum=0, maximum=1),
        default=1.0,
        help_en="Probability that a training image is made of four.",
        help_ko="네 장의 이미지를 이어 붙여 학습 이미지를 만들 확률.",
    ),
    Hyperparameter(
        name="close_mosaic",
        type=Type.INTEGER,
        range=Range(minimum=0, maximum=10000),
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
        range=Range(minimum=0, maximum=1),
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
        name="multi_scale",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=0.9),
        default=0.0,
        help_en=(
            "Largest random change of the image size from batch to batch, as a share: 0.5 trains "
            "with half to one and a half times image_size. Needs memory for the largest. 0 keeps "
            "the size."
        ),
        help_ko=(
            "배치마다 이미지 크기를 무작위로 바꾸는 최대 비율. 0.5는 image_size의 0.5~1.5배로 "
            "학습합니다. 가장 큰 크기만큼 메모리가 필요합니다. 0은 크기를 유지합니다."
        ),
    ),
    Hyperparameter(
        name="hsv_h",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=1),
        default=0.015,
        help_en="Largest random change of hue, as a share of the colour circle.",
        help_ko="색상을 무작위로 바꾸는 최대 폭(색상환에 대한 비율).",
    ),
    Hyperparameter(
        name="hsv_s",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=1),
        default=0.7,
        help_en="Largest random change of saturation, as a share.",
        help_ko="채도를 무작위로 바꾸는 최대 비율.",
    ),
    Hyperparameter(
        name="hsv_v",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=1),
        default=0.4,
        help_en="Largest random change of brightness, as a share.",
        help_ko="밝기를 무작위로 바꾸는 최대 비율.",
    ),
    Hyperparameter(
        name="box",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=100),
        default=7.5,
        family_defaults={_EFFICIENTDET: 50.0},
        help_en="Gain of the box loss.",
        help_ko="박스 손실의 가중치.",
    ),
    Hyperparameter(
        name="cls",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=100),
        default=0.5,
        family_defaults={_EFFICIENTDET: 1.0},
        help_en="Gain of the class loss.",
        help_ko="클래스 손실의 가중치.",
    ),
    Hyperparameter(
        name="dfl",
        type=Type.NUMBER,
        range=Range(minimum=0, maximum=100),
        only=_YOLO,
        default=1.5,
        help_en="Gain of the loss of the box edges' distribution (distribution focal loss).",
        help_ko="박스 경계 분포 손실(distribution focal loss)의 가중치.",
    ),
    Hyperparameter(
        name="freeze",
        type=Type.INTEGER,
        range=Range(minimum=0, maximum=22),
        family_ranges={_EFFICIENTDET: Range(minimum=0, maximum=9)},
        default=0,
        help_en=(
            "Number of layers, from the input, whose weights stay as they are. EfficientDet has "
            "nine before its heads: stem, seven stages of the backbone, BiFPN."
        ),
        help_ko=(
            "입력 쪽부터 가중치를 고정할 층의 수. EfficientDet은 헤드 앞에 아홉 층이 있습니다: "
            "스템, 백본 7단계, BiFPN."
        ),
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
        range=Range(minimum=0, maximum=1024),
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
        range=Range(minimum=0, maximum=2**31 - 1),
        default=0,
        help_en=(
            "Seed of every random choice: the same seed on the same machine repeats the training."
        ),
        help_ko="모든 무작위 선택의 시드. 같은 기기에서 같은 시드는 같은 학습을 되풀이합니다.",
    ),
    Hyperparameter(
        name="device",
        type=Type.CHOICE,
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help_en=(
            "What to train on. cuda waits for a free GPU; auto takes a GPU if the trainer has any, "
            "else the CPU."
        ),
        help_ko=(
            "학습에 쓸 장치. cuda는 빈 GPU를 기다립니다. auto는 GPU가 있으면 GPU, 없으면 CPU를 "
            "씁니다."
        ),
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
        Every hyper-parameter that has an effect on the model, with the value in force, in the order
        of the schema.

    Raises:
        InvalidArgument: UNKNOWN_HYPERPARAMETER, UNSUPPORTED_HYPERPARAMETER, OUT_OF_RANGE or
            WRONG_TYPE; a violation for each.
    """
    strangers = sorted(name for name in given if name not in _BY_NAME)
    # As many as an error carries: finding what each might have meant takes its time.
    unknown = [_unknown(name) for name in strangers[:MAX_VIOLATIONS]]
    family = model.family
    wrong = [entry.check(given[entry.name], family) for entry in SCHEMA if entry.name in given]
    violations = [*unknown, *filter(None, wrong)]
    if violations:
        first = violations[0]
        raise InvalidArgument(
            first.description,
            reason=first.reason,
            violations=violations,
            total=len(violations) + len(strangers) - len(unknown),
        )
    values = {entry.name: entry.default_of(family) for entry in SCHEMA if entry.supports(family)}
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
        f"{FIELD}.{name}",
        "UNKNOWN_HYPERPARAMETER",
        f"there is no hyper-parameter {name!r}; {hint}",
    )
