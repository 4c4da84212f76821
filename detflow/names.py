"""Resource ids and names (AIP-122), and the names people see."""

import os
import time
import unicodedata

from detflow.errors import bad_field

MAX_NAME_LENGTH = 63
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


def check_display_name(name: str, field: str) -> str:
    """Checks what the rules in the protos don't say of a display name; returns it.

    Args:
        name: The name.
        field: Its path in the request.

    Raises:
        InvalidArgument: BAD_NAME: nothing of it can be seen, or it breaks the line.
    """
    problem = ""
    categories = [unicodedata.category(c) for c in name]
    if "Cc" in categories or "Cs" in categories:
        problem = "must be text in UTF-8 without control characters; take them out"
    elif all(k[0] in "ZC" or _is_blank(c) for c, k in zip(name, categories, strict=True)):
        problem = "must not be empty or blank; give 1 to 63 characters that can be seen"
    elif len(name) > MAX_NAME_LENGTH:
        problem = f"must have at most {MAX_NAME_LENGTH} characters, not {len(name)}; shorten it"
    elif "\u2028" in name or "\u2029" in name:
        problem = "must be one line; take out the line separators"
    if problem:
        raise bad_field(field, "BAD_NAME", problem)
    return name


def _is_blank(character: str) -> bool:
    """Whether a letter or symbol shows nothing: Hangul fillers, the empty Braille cell, ..."""
    return character in "\u115f\u1160\u3164\uffa0\u2800" or unicodedata.name(
        character, ""
    ).startswith("VARIATION SELECTOR")
