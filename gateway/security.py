"""What a browser must not be talked into: headers of every answer, and who is let in at all.

There is no CORS: other origins can neither read nor write. A gateway that listens on loopback only
answers to names of loopback, so that a web page cannot reach it through a name of its own (DNS
rebinding).
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from collections.abc import Mapping

from gateway.errors import HttpError

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)

BASE_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Sent with every answer."""

CLOSED_POLICY = b"default-src 'none'; frame-ancestors 'none'"
"""Content-Security-Policy of everything that is no page."""

SANDBOX_POLICY = (
    b"default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:;"
    b" base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
)
"""Content-Security-Policy of files that are shown: an origin of their own, no scripts, no loads."""


def page_policy(style: str) -> str:
    """Content-Security-Policy of a page whose only resource is one inline style sheet."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_host(headers: Mapping[bytes, bytes], *, loopback: bool) -> None:
    """Checks the Host header.

    Raises:
        HttpError: 400 if it is malformed, 421 if a loopback gateway is called by a foreign name.
    """
    text = headers.get(b"host", b"").decode("latin-1")
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise HttpError(
            400, "INVALID_ARGUMENT", "the Host header must be a name or address", reason="BAD_HOST"
        )
    if loopback:
        name = match[1].lower().rstrip(".")
        if not (name.endswith(".localhost") or is_loopback(name)):
            raise HttpError(
                421,
                "PERMISSION_DENIED",
                "this gateway listens on loopback and answers to localhost only; to serve other "
                "names, set DETFLOW_HTTP_LISTEN to another address or let the proxy send "
                "Host: localhost",
                reason="HOST_NOT_ALLOWED",
            )


def check_origin(method: str, headers: Mapping[bytes, bytes]) -> None:
    """Refuses writes that a page of another origin sends.

    Browsers say where a request comes from in Sec-Fetch-Site, older ones in Origin; programs send
    neither.

    Raises:
        HttpError: 403.
    """
    if method in _SAFE_METHODS:
        return
    site = headers.get(b"sec-fetch-site")
    origin = headers.get(b"origin")
    if site is not None:
        allowed = site in (b"same-origin", b"none")
    elif origin is not None:
        allowed = origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower()
    else:
        allowed = True
    if not allowed:
        raise HttpError(
            403,
            "PERMISSION_DENIED",
            "pages of another origin cannot change anything here",
            reason="CROSS_ORIGIN",
        )
