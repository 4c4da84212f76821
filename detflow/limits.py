"""How many calls one principal may begin, and have under way, in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from detflow.errors import ResourceExhausted

_MAX_KNOWN = 10_000


@dataclass(slots=True)
class _Use:
    left: float  # calls that may begin now
    time: float  # monotonic, when `left` was right
    num_open: int = 0


class Limits:
    """A token bucket and a count of open calls for each principal.

    Args:
        calls_per_second: Calls that may begin each second, twice as many after a pause; 0: any.
        open_calls: Calls that may be under way; 0: any.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        calls_per_second: float,
        open_calls: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = calls_per_second
        self._burst = max(calls_per_second * 2, 1.0)
        self._open_calls = open_calls
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def enter(self, subject: str) -> None:
        """Counts a call that begins.

        Raises:
            ResourceExhausted: RATE_LIMIT or TOO_MANY_CALLS; it is not counted then.
        """
        now = self._clock()
        use = self._uses.get(subject)
        if use is None:
            if len(self._uses) >= _MAX_KNOWN:
                self._forget_idle(now)
            use = self._uses[subject] = _Use(self._burst, now)
        if self._open_calls and use.num_open >= self._open_calls:
            raise ResourceExhausted(
                f"{subject} has {use.num_open} calls under way here, and no more are allowed: end"
                " watches that are not needed, or raise DETFLOW_OPEN_CALLS",
                reason="TOO_MANY_CALLS",
                retry_seconds=1,
            )
        if self._rate:
            use.left = min(self._burst, use.left + (now - use.time) * self._rate)
            use.time = now
            if use.left < 1:
                raise ResourceExhausted(
                    f"{subject} calls more than {self._rate:g} times a second: call less often, or"
                    " raise DETFLOW_CALLS_PER_SECOND",
                    reason="RATE_LIMIT",
                    retry_seconds=math.ceil((1 - use.left) / self._rate),
                )
            use.left -= 1
        use.num_open += 1

    def leave(self, subject: str) -> None:
        """Counts a call that has ended."""
        self._uses[subject].num_open -= 1

    def _forget_idle(self, now: float) -> None:
        """Drops those who could begin as many calls as if they had never called."""
        full = self._burst / self._rate if self._rate else 0
        for subject in [s for s, u in self._uses.items() if not u.num_open and now > u.time + full]:
            del self._uses[subject]
