import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detflow.errors import InvalidArgument
from services.trainer.hyperparameter import Hyperparameter, Range, Type
from services.trainer.hyperparameters import SCHEMA, resolve
from services.trainer.models import FAMILIES, MODELS, get_model

COUNT_PARAMETERS = """
import sys, torch
from ultralytics.nn.tasks import parse_model, yaml_model_load
from services.trainer.worker import efficientdet
def build(name):
    if name.startswith("efficientdet"):
        return efficientdet.build(name, num_classes=80, image_size=512, hyperparameters={})
    return parse_model(yaml_model_load(f"{name}.yaml") | {"nc": 80}, ch=3, verbose=False)[0]
for name in sys.argv[1:]:
    with torch.device("meta"):
        model = build(name)
    print(name, sum(p.numel() for p in model.parameters() if p.requires_grad))
"""

V8N = get_model("yolov8n")


def check(batch_size: int = 16, epochs: int = 100, **given: Any) -> dict[str, object]:
    return dict(resolve(given, model=V8N, batch_size=batch_size, epochs=epochs))


@pytest.mark.slow
def test_parameter_counts_are_those_of_the_built_models() -> None:
    """In a process of its own: torch is for workers, and here it would slow every other test."""
    names = [model.id for model in MODELS]
    done = subprocess.run(
        [sys.executable, "-c", COUNT_PARAMETERS, *names],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    counts = {words[0]: int(words[1]) for words in lines if words and words[0] in names}
    assert counts == {model.id: model.num_parameters for model in MODELS}


def test_models_are_shown_as_on_the_founding_page() -> None:
    assert [model.display_name for model in MODELS] == [
        f"YOLO {version}{size}"
        for version in ("v5", "v8")
        for size in ("", " Small", " Medium", " Large", " XLarge")
    ] + [f"EfficientDet D{scale}" for scale in range(8)]
    assert len({model.id for model in MODELS}) == len(MODELS) == 18
    sizes = {model.id: model.input_size_px for model in MODELS}
    assert {size for name, size in sizes.items() if name.startswith("yolo")} == {640}
    assert [sizes[f"efficientdet-d{scale}"] for scale in range(8)] == [
        *(512, 640, 768, 896, 1024, 1280, 1408, 1536)
    ]
    assert {model.licence for model in MODELS if model.family == "efficientdet"} == {"Apache-2.0"}
    assert get_model("").id == "yolov5s"


def test_unknown_model_suggests_and_lists() -> None:
    with pytest.raises(InvalidArgument) as caught:
        get_model("yolo8n")
    assert "did you mean yolov8n?" in caught.value.message
    assert all(model.id in caught.value.message for model in MODELS)


def test_every_default_is_within_its_own_range() -> None:
    for entry in SCHEMA:
        for family, value in entry.defaults().items():
            assert entry.check(value, family) is None, entry.name
        assert (entry.range is None) == (entry.type in (Type.BOOLEAN, Type.CHOICE))
        assert bool(entry.choices) == (entry.type is Type.CHOICE)


def test_schema_has_everything_the_reference_product_lets_users_set() -> None:
    assert {entry.name for entry in SCHEMA} == {
        *("image_size", "optimizer", "lr0", "lrf", "warmup_epochs", "cos_lr", "momentum"),
        *("weight_decay", "dropout", "amp", "multi_scale", "freeze", "patience", "close_mosaic"),
        *("box", "cls", "dfl", "seed", "device", "nominal_batch_size"),
        *("mosaic", "flip_lr", "hsv_h", "hsv_s", "hsv_v"),
    }
    by_name = {entry.name: entry for entry in SCHEMA}
    for name in ("dropout", "multi_scale"):
        assert by_name[name].range == Range(minimum=0, maximum=0.9)
    assert by_name["device"].choices == ("auto", "cpu", "cuda")
    assert all(entry.families == list(FAMILIES) for entry in SCHEMA if entry.name != "dfl")
    assert by_name["dfl"].families == ["yolov5", "yolov8"]


def test_help_is_there_in_both_languages() -> None:
    for entry in SCHEMA:
        assert entry.help_en.endswith(".") and entry.help_en.isprintable()
        assert any("가" <= character <= "힣" for character in entry.help_ko), entry.name


def test_range_of_a_family_replaces_that_of_all() -> None:
    size = next(entry for entry in SCHEMA if entry.name == "image_size")
    assert size.check(160, "yolov8") is None
    assert size.check(256, "efficientdet") is None
    for wrong in (64, 160, 4096):
        violation = size.check(wrong, "efficientdet")
        assert violation is not None and violation.reason == "OUT_OF_RANGE"
        assert "a multiple of 128, for efficientdet" in violation.description


def test_hyperparameter_without_effect_on_the_model_names_the_families_that_have_it() -> None:
    dfl = next(entry for entry in SCHEMA if entry.name == "dfl")
    violation = dfl.check(1.5, "efficientdet")
    assert violation is not None
    assert violation.reason == "UNSUPPORTED_HYPERPARAMETER"
    assert "yolov5 and yolov8" in violation.description
    other = dataclasses.replace(V8N, family="efficientdet")
    with pytest.raises(InvalidArgument) as caught:
        resolve({"dfl": 1.5}, model=other, batch_size=16, epochs=10)
    assert caught.value.reason == "UNSUPPORTED_HYPERPARAMETER"
    assert "dfl" not in resolve({}, model=other, batch_size=16, epochs=10)


def test_family_may_have_a_default_of_its_own() -> None:
    entry = Hyperparameter(
        name="x",
        type=Type.NUMBER,
        default=1.0,
        family_defaults={"yolov5": 2.0},
        range=Range(minimum=0, maximum=9),
        help_en="",
        help_ko="",
    )
    assert entry.defaults()["yolov5"] == 2.0
    assert entry.defaults()["yolov8"] == 1.0


def test_efficientdet_has_the_defaults_it_learns_with() -> None:
    values = resolve({}, model=get_model("efficientdet-d0"), batch_size=16, epochs=10)
    names = ("box", "cls", "lr0", "cos_lr")
    assert [values[name] for name in names] == [50.0, 1.0, 0.004, True]
    assert [check()[name] for name in names] == [7.5, 0.5, 0.002, False]


def test_nothing_given_means_every_default() -> None:
    values = check()
    assert list(values) == [entry.name for entry in SCHEMA]
    assert (values["image_size"], values["optimizer"], values["seed"]) == (640, "AdamW", 0)


def test_nominal_batch_size_follows_the_batch_up_to_64() -> None:
    assert check(batch_size=4)["nominal_batch_size"] == 4
    assert check(batch_size=256)["nominal_batch_size"] == 64
    assert check(batch_size=4, nominal_batch_size=64)["nominal_batch_size"] == 64


def test_short_training_is_not_all_warm_up_and_no_mosaic() -> None:
    short = check(epochs=12)
    assert (short["warmup_epochs"], short["close_mosaic"]) == (1.2, 2)
    assert check(epochs=12, warmup_epochs=3.0)["warmup_epochs"] == 3.0
    long = check(epochs=200)
    assert (long["warmup_epochs"], long["close_mosaic"]) == (3.0, 10)


def test_whole_numbers_may_arrive_as_doubles() -> None:
    value = check(image_size=256.0)["image_size"]
    assert value == 256 and isinstance(value, int)


@pytest.mark.parametrize("name", [entry.name for entry in SCHEMA])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e10, None, [], {}, "", "x"])
def test_no_nonsense_passes(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(**{name: value})
    (violation,) = caught.value.violations
    assert violation.field == f"training.hyperparameters.{name}"
    assert violation.reason in ("OUT_OF_RANGE", "WRONG_TYPE")
    assert "must be" in violation.description


@given(st.dictionaries(st.text(max_size=8), st.floats() | st.booleans() | st.text(max_size=3)))
def test_any_input_is_resolved_or_refused_with_a_violation_each(given: dict[str, Any]) -> None:
    names = {entry.name for entry in SCHEMA}
    try:
        values = check(**given) if not {"batch_size", "epochs"} & set(given) else check()
    except InvalidArgument as error:
        fields = {
            violation.field.removeprefix("training.hyperparameters.")
            for violation in error.violations
        }
        assert fields >= set(given) - names
    else:
        assert set(values) == names


def test_thousands_of_unknown_keys_are_counted_but_not_all_explained() -> None:
    keys = {f"key_{number:05}": 1 for number in range(30_000)}
    with pytest.raises(InvalidArgument) as caught:
        resolve(keys, model=V8N, batch_size=16, epochs=10)
    assert len(caught.value.violations) == 100
    assert caught.value.total == 30_000
