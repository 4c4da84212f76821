"""Field masks of Update methods (AIP-134)."""

from __future__ import annotations

import re

from google.protobuf.field_mask_pb2 import FieldMask

from detflow.errors import InvalidArgument, Violation

_KEY = r"\.[a-z][a-z0-9_-]{0,62}"


def check_mask(mask: FieldMask, *fields: str) -> None:
    """Checks that a mask names nothing but the fields that can be changed, or all ("*").

    Args:
        mask: Mask of the request.
        fields: Those that can be changed; "labels.KEY" stands for any one entry of a map.

    Raises:
        InvalidArgument: BAD_FIELD_MASK; a violation for each wrong path.
    """
    allowed = [re.compile(field.replace(".KEY", _KEY)) for field in (*fields, r"\*")]
    wrong = [path for path in mask.paths if not any(a.fullmatch(path) for a in allowed)]
    if wrong:
        problem = f"cannot be changed; only {', '.join(fields)} can"
        raise InvalidArgument(
            f"update_mask: {', '.join(map(repr, wrong))} {problem}",
            reason="BAD_FIELD_MASK",
            violations=[Violation(f"update_mask.{p}", "BAD_FIELD_MASK", problem) for p in wrong],
        )
