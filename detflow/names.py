"""Resource ids and names (AIP-122)."""

import os
import time

_BASE32_HEX = "0123456789abcdefghijklmnopqrstuv"  # sorts as its values do


def new_id() -> str:
    """Makes a 16-character id: a letter, 43 bits of milliseconds, 32 random bits, in base 32.

    Ids sort by the time they were made, so keyset pagination on the id is pagination by age.
    """
    value = (time.time_ns() // 1_000_000 << 32) | int.from_bytes(os.urandom(4), "big")
    return "d" + "".join(_BASE32_HEX[(value >> shift) & 31] for shift in range(70, -1, -5))


def last_segment(name: str) -> str:
    """Returns the id at the end of a resource name."""
    return name.rsplit("/", 1)[-1]


def project_of(name: str) -> str:
    """Returns the project id of a resource name such as projects/p/versions/v."""
    return name.split("/", 2)[1]
