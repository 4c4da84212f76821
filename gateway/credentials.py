"""Who a request is from: its Authorization header, or the cookie of a browser that is signed in.

The gateway looks into neither. A session's token becomes the token of the call, which the services
check as any other. Over HTTPS the cookie's name begins with __Host-: such a cookie cannot be set by
another host of the same domain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from gateway.security import Address

SESSION = "detflow_session"
"""Cookie with the token of a session."""
LOGIN = "detflow_login"
"""Cookie of a browser that is on its way to the issuer and back."""

_HOST = "__Host-"
_VALUE = re.compile(r"[A-Za-z0-9_-]{1,128}")
_AUTHORIZATION = b"authorization"


def cookie_name(name: str, address: Address) -> str:
    """Returns what a cookie is called here."""
    return f"{_HOST}{name}" if address.is_secure else name


def read_cookie(headers: Mapping[bytes, bytes], name: str, address: Address) -> str:
    """Returns the value of one of our cookies, or "" if there is none that could be ours."""
    wanted = cookie_name(name, address)
    for one in headers.get(b"cookie", b"").decode("latin-1").split(";"):
        key, _, value = one.strip().partition("=")
        if key == wanted and _VALUE.fullmatch(value):
            return value
    return ""


def use_cookie(headers: MutableMapping[bytes, bytes], address: Address) -> bool:
    """Takes the token of the call from the cookie, where no header has one; whether it did."""
    token = "" if _AUTHORIZATION in headers else read_cookie(headers, SESSION, address)
    if token:
        headers[_AUTHORIZATION] = f"Bearer {token}".encode()
    return bool(token)


def set_cookie(name: str, value: str, seconds: int, address: Address, *, lax: bool = False) -> str:
    """Renders Set-Cookie; 0 seconds take the cookie away.

    Args:
        name: SESSION or LOGIN.
        value: What it holds.
        seconds: How long the browser keeps it.
        address: Where browsers reach the gateway.
        lax: Whether it comes along when a page of another site leads here, as the issuer's does.
    """
    parts = [
        f"{cookie_name(name, address)}={value}",
        "Path=/",
        "HttpOnly",
        f"SameSite={'Lax' if lax else 'Strict'}",
        f"Max-Age={seconds}",
    ]
    return "; ".join([*parts, "Secure"] if address.is_secure else parts)
