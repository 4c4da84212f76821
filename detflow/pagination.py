"""Page sizes and page tokens (AIP-158)."""

import base64
import binascii
import hashlib

import orjson

from detflow.errors import InvalidArgument, Violation

_DEFAULT_SIZE = 50
_MAX_SIZE = 1000


def page_size(requested: int) -> int:
    """Returns the number of items of a page: 50 if not stated, never above 1000."""
    return min(requested or _DEFAULT_SIZE, _MAX_SIZE)


def encode_token(query: str, *key: str | int) -> str:
    """Makes the token of the page that begins after `key`, valid for this query only.

    The token is no secret: it holds a position within what the caller may list anyway. The digest
    keeps it from being used with another query or edited by accident.
    """
    payload = orjson.dumps(key)
    return base64.urlsafe_b64encode(_digest(query, payload) + payload).decode().rstrip("=")


def decode_token(
    token: str, query: str, kind: type[str] | type[int] = str
) -> list[str | int] | None:
    """Returns the key a token was made of, or None for an empty token.

    Args:
        token: Page token of the request.
        query: The query it must have been made for.
        kind: Type of each part of the key: the digest is no secret, so anybody can make a token.

    Raises:
        InvalidArgument: BAD_PAGE_TOKEN, if the token was changed or belongs to another query.
    """
    if not token:
        return None
    try:
        raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except (binascii.Error, ValueError):
        raw = b""
    digest, payload = raw[:8], raw[8:]
    key = _parse(payload, kind) if payload and digest == _digest(query, payload) else None
    if not key:
        raise bad_token()
    return key


def bad_token() -> InvalidArgument:
    """Makes the error for a token that no page of this query ended with."""
    problem = "take next_page_token from the answer to the same query, or leave it empty"
    return InvalidArgument(
        f"page_token is not valid here: {problem}",
        reason="BAD_PAGE_TOKEN",
        violations=[Violation("page_token", "BAD_PAGE_TOKEN", problem)],
    )


def _parse(payload: bytes, kind: type[str] | type[int]) -> list[str | int] | None:
    """Reads a key; None if it is none that `encode_token` could have been given."""
    try:
        key = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(key, list) or not all(type(part) is kind for part in key):
        return None
    fits = all(part.isprintable() if kind is str else abs(part) < 1 << 63 for part in key)
    return key if fits else None


def _digest(query: str, payload: bytes) -> bytes:
    return hashlib.sha256(query.encode() + b"\0" + payload).digest()[:8]
