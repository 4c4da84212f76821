"""Field masks of Update methods (AIP-134)."""

from __future__ import annotations

from google.protobuf.field_mask_pb2 import FieldMask

from detflow.errors import InvalidArgument, Violation


def check_mask(mask: FieldMask, field: str) -> None:
    """Checks that a mask names nothing but the one field that can be changed, or all.

    Raises:
        InvalidArgument: BAD_FIELD_MASK; a violation for each wrong path.
    """
    wrong = [path for path in mask.paths if path not in (field, "*")]
    if wrong:
        problem = f"cannot be changed; only {field} can"
        raise InvalidArgument(
            f"update_mask: {', '.join(map(repr, wrong))} {problem}",
            reason="BAD_FIELD_MASK",
            violations=[Violation(f"update_mask.{p}", "BAD_FIELD_MASK", problem) for p in wrong],
        )
