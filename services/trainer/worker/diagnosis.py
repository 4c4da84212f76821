"""Why a training waits for its images, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

_MUCH = 0.2
"""Share of an epoch's time from which on waiting is worth a word."""

_REMEDIES: Mapping[str, str] = {
    "read": "put DETFLOW_DATA_DIR on a faster disk",
    "decode": (
        "create a version with smaller images (--max-side, not above image_size is enough), or "
        "give the machine the memory to keep them decoded"
    ),
    "augment": "lower mosaic, or leave the processor to fewer trainings (DETFLOW_NUM_CPU_SLOTS)",
    "batch": "leave the processor to fewer trainings (DETFLOW_NUM_CPU_SLOTS)",
}


def diagnose(wait_share: float, loader_shares: Mapping[str, float]) -> list[str]:
    """Explains an epoch's waiting.

    Args:
        wait_share: Share of the epoch's time in which the training waited for images, 0..1.
        loader_shares: What making images takes time for, by name: shares of that time.

    Returns:
        A line for the log; none if little time was lost.
    """
    if wait_share < _MUCH or not loader_shares:
        return []
    slowest = max(loader_shares, key=lambda name: loader_shares[name])
    return [
        f"{wait_share:.0%} of the time waits for images, which take {loader_shares[slowest]:.0%} "
        f"of their time to {slowest}: {_REMEDIES[slowest]}"
    ]
