"""What the gateway says of itself: the document of its API, whether it lives, its figures."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from gateway import openapi, pages, security
from gateway.routes import Binding

Page = Callable[[Request], Awaitable[Response]]
Readiness = Callable[[], Awaitable[tuple[bool, dict[str, Any]]]]
Check = Callable[[Request], Awaitable[None]]


def documents(bindings: tuple[Binding, ...]) -> dict[str, dict[str, Page]]:
    """Returns what answers at /docs and /openapi.json."""
    document = openapi.document(bindings)
    document_bytes = orjson.dumps(document)
    etag = f'"{hashlib.sha256(document_bytes).hexdigest()[:32]}"'
    docs = pages.docs(document)
    html_headers = {
        "content-security-policy": security.page_policy(pages.STYLE),
        "cache-control": "no-cache",
    }

    async def get_docs(_request: Request) -> Response:
        return Response(docs, media_type="text/html", headers=html_headers)

    async def get_openapi(request: Request) -> Response:
        headers = {"etag": etag, "cache-control": "no-cache"}
        known = [one.strip() for one in request.headers.get("if-none-match", "").split(",")]
        if etag in known or f"W/{etag}" in known:
            return Response(status_code=304, headers=headers)
        return Response(document_bytes, media_type="application/json", headers=headers)

    return {"/docs": {"GET": get_docs}, "/openapi.json": {"GET": get_openapi}}


def probes(readiness: Readiness) -> dict[str, dict[str, Page]]:
    """Returns what answers at /healthz and /readyz."""

    async def get_healthz(_request: Request) -> Response:
        return Response(b'{"status":"ALIVE"}', media_type="application/json")

    async def get_readyz(_request: Request) -> Response:
        ready, state = await readiness()
        return Response(orjson.dumps(state), 200 if ready else 503, media_type="application/json")

    return {"/healthz": {"GET": get_healthz}, "/readyz": {"GET": get_readyz}}


def metrics(check: Check | None) -> dict[str, dict[str, Page]]:
    """Returns what answers at /metrics.

    Args:
        check: Raises for who may not read them; None lets everybody.
    """

    async def get_metrics(request: Request) -> Response:
        if check is not None:
            await check(request)
        return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})

    return {"/metrics": {"GET": get_metrics}}
