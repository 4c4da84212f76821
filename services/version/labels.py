"""Labels of versions: what they may hold, and how an update changes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from detflow.errors import bad_field

MAX_LABELS = 64

_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Checks what the rules in the protos don't say of labels.

    Raises:
        InvalidArgument: BAD_LABEL: a value holds control characters.
    """
    for key, value in labels.items():
        if _NO_TEXT.search(value):
            raise bad_field(
                f"version.labels.{key}",
                "BAD_LABEL",
                "must be one line without control or bidirectional-override characters; take them"
                " out",
            )
    return dict(labels)


def change_labels(
    before: Mapping[str, str], given: Mapping[str, str], paths: Collection[str]
) -> dict[str, str]:
    """Returns the labels after an update of all of them, or of single keys.

    Raises:
        InvalidArgument: TOO_MANY_LABELS.
    """
    if {"labels", "*"} & set(paths):
        return dict(given)
    labels = dict(before)
    for key in (path.removeprefix("labels.") for path in paths if path.startswith("labels.")):
        labels.pop(key, None)
        if key in given:
            labels[key] = given[key]
    if len(labels) > MAX_LABELS:
        raise bad_field(
            "version.labels",
            "TOO_MANY_LABELS",
            f"a version has at most {MAX_LABELS} labels, and this would make"
            f" {len(labels)}; remove some",
        )
    return labels
