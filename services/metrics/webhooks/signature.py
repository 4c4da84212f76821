"""How messages to webhooks are signed: https://www.standardwebhooks.com, version 1.

The signature is HMAC-SHA256 of "{id}.{timestamp}.{body}". While a secret is replaced there are
several: a receiver takes the message if one of them is by the secret it knows.
"""

from __future__ import annotations

import base64
import hmac
import secrets

from services.metrics.webhooks.domain import Message

_PREFIX = "whsec_"
_KEY_BYTES = 32


def new_key() -> bytes:
    """Makes a key of 32 random bytes."""
    return secrets.token_bytes(_KEY_BYTES)


def to_secret(key: bytes) -> str:
    """Returns a key as receivers configure it."""
    return _PREFIX + base64.b64encode(key).decode()


def sign(message: Message) -> dict[str, str]:
    """Returns the headers that let the receiver check who sent a message, and when."""
    timestamp = str(int(message.time.timestamp()))
    signed = f"{message.id}.{timestamp}.".encode() + message.body
    signatures = [
        "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
        for key in message.keys
    ]
    return {
        "webhook-id": message.id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(signatures),
    }
