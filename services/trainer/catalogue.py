"""Models and hyper-parameters as the API shows them."""

from __future__ import annotations

from google.protobuf.struct_pb2 import Value

from detflow.v1 import trainer_pb2
from services.trainer.hyperparameter import Hyperparameter, Type
from services.trainer.models import Model


def model_message(model: Model) -> trainer_pb2.Model:
    """Returns a model as the API shows it."""
    return trainer_pb2.Model(
        name=f"models/{model.id}",
        display_name=model.display_name,
        family=model.family,
        input_size_px=model.input_size_px,
        num_parameters=model.num_parameters,
        licence=model.licence,
    )


def hyperparameter_message(entry: Hyperparameter) -> trainer_pb2.Hyperparameter:
    """Returns a hyper-parameter as the API shows it."""
    message = trainer_pb2.Hyperparameter(
        name=entry.name,
        type=trainer_pb2.Hyperparameter.Type.Value(entry.type.name),
        minimum=entry.range.minimum if entry.range else None,
        maximum=entry.range.maximum if entry.range else None,
        multiple_of=entry.range.multiple_of if entry.type is Type.INTEGER and entry.range else 0,
        choices=entry.choices,
        families=entry.families,
        help_en=entry.help_en,
        help_ko=entry.help_ko,
    )
    for family in entry.families:
        if allowed := entry.family_ranges.get(family):
            message.family_ranges[family].CopyFrom(
                trainer_pb2.HyperparameterRange(
                    minimum=allowed.minimum,
                    maximum=allowed.maximum,
                    multiple_of=allowed.multiple_of,
                )
            )
    for family, default in entry.defaults().items():
        message.defaults[family].CopyFrom(_value(default))
    return message


def _value(value: float | bool | str) -> Value:
    if isinstance(value, bool):
        return Value(bool_value=value)
    return Value(string_value=value) if isinstance(value, str) else Value(number_value=value)
