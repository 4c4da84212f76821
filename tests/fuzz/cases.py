"""What a fuzzed call is, and what may come of it."""

from dataclasses import dataclass, field
from random import Random

NUM_CASES_AT_ONCE = 16
PATIENCE_SECONDS = 20.0
"""How long a call is waited for; that a loaded machine needs longer is no fault."""


def rng_of(seed: int, number: int) -> Random:
    """Returns what decides a case: cases can be repeated one by one."""
    return Random(f"{seed}/{number}")


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        what: Method and answer, e.g. "GetVersion NOT_FOUND"; counted.
        problem: What is wrong with the answer; empty if nothing is.
        sent: What was sent, to be shown where there is a problem.
    """

    what: str
    problem: str = ""
    sent: str = field(default="", repr=False)
