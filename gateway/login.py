"""How a browser signs in and out: by a link that counts once, or with the OIDC issuer.

A ticket is not redeemed by opening its link, but by the button on the page there. Mail and chat
programs open links to look into them, browsers open them ahead of time, and either would use the
ticket up before its owner comes; and nobody can be signed in as somebody else by a mere link.
Where a sign-in leads to is always the console: no address is taken from the request.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl

import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from detflow import telemetry
from detflow.errors import DetflowError, InvalidArgument, Unauthenticated
from detflow.settings import Settings
from detflow.v1 import access_pb2
from gateway import body, credentials, oidc, pages, security
from gateway.sessions import Sessions

log = telemetry.get_logger(__name__)

Page = Callable[[Request], Awaitable[Response]]

CALLBACK = "/login/callback"
"""Where the issuer sends a browser back to."""

_COOKIE_SECONDS = 7 * 86400
"""How long a browser keeps a session's token: as long as a session that is used can last. Whether
it counts is said by the version service, which moves the end of a session on."""
_TICKET = re.compile(r"[A-Za-z0-9_-]{1,128}")
_MAX_PARAMETERS = 20
_PAGE_HEADERS = {
    "content-security-policy": security.page_policy(pages.STYLE, forms=True),
    "cache-control": "no-store",
}


class Login:
    """The pages of signing in and out; close with `await close()`.

    Args:
        sessions: Begins and ends sessions.
        settings: With the issuer, if there is one.
        address: Where browsers reach the gateway.

    Raises:
        InvalidArgument: MISSING_SETTING or BAD_SETTING.
    """

    def __init__(self, sessions: Sessions, settings: Settings, address: security.Address) -> None:
        self._sessions = sessions
        self._address = address
        self._issuer: oidc.Issuer | None = None
        if settings.oidc_issuer:
            if not (address.public or address.loopback):
                settings.require("public_url")
            self._issuer = oidc.Issuer(settings)

    async def close(self) -> None:
        """Closes the connections to the issuer."""
        if self._issuer is not None:
            await self._issuer.close()

    def pages(self) -> dict[str, dict[str, Page]]:
        """Returns what answers, by path and method."""
        return {
            "/login": {"GET": self._show},
            "/login/session": {"POST": self._redeem},
            "/login/options": {"GET": self._list_options},
            "/login/oidc": {"GET": self._leave_for_issuer},
            CALLBACK: {"GET": self._return_from_issuer},
            "/logout": {"POST": self._end},
        }

    async def _show(self, request: Request) -> Response:
        ticket = request.query_params.get("ticket", "")
        if not ticket:
            return RedirectResponse("/", 303)  # the console says how to sign in
        if not _TICKET.fullmatch(ticket):
            return self._problem(request, 400, "link")
        return _page(request, 200, pages.sign_in(ticket, _language(request)))

    async def _redeem(self, request: Request) -> Response:
        data = await body.read(dict(request.headers.raw), request.receive)
        try:
            pairs = parse_qsl(data.decode("ascii"), max_num_fields=_MAX_PARAMETERS)
        except ValueError:
            pairs = []
        ticket = dict(pairs).get("ticket", "")
        if not _TICKET.fullmatch(ticket):
            return self._problem(request, 400, "link")
        try:
            return await self._begin(request, access_pb2.CreateSessionRequest(ticket=ticket))
        except DetflowError as error:
            if error.reason == "BAD_TICKET":
                return self._problem(request, 410, "link")
            return self._away(request, error)

    async def _list_options(self, _request: Request) -> Response:
        issuer = self._issuer
        options = {"oidc": {"path": "/login/oidc", "name": issuer.name} if issuer else None}
        return Response(orjson.dumps(options), media_type="application/json")

    async def _leave_for_issuer(self, request: Request) -> Response:
        if self._issuer is None:
            return self._problem(request, 404, "no_issuer")
        try:
            url, secret = await self._issuer.begin(self._redirect_uri(request))
        except oidc.OidcError as error:
            return self._away(request, error)
        return self._redirect(url, credentials.LOGIN, secret, oidc.COOKIE_SECONDS, lax=True)

    async def _return_from_issuer(self, request: Request) -> Response:
        if self._issuer is None:
            return self._problem(request, 404, "no_issuer")
        secret = credentials.read_cookie(
            dict(request.headers.raw), credentials.LOGIN, self._address
        )
        try:
            token = await self._issuer.finish(
                secret, request.query_params, self._redirect_uri(request)
            )
            proof = access_pb2.CreateSessionRequest(id_token=token, nonce=oidc.nonce_of(secret))
            answer = await self._begin(request, proof)
        except oidc.OidcError as error:
            if not error.is_refusal:
                return self._away(request, error)
            log.warning("no sign-in", error=str(error))
            answer = self._problem(request, 403, "refused")
        except (InvalidArgument, Unauthenticated) as error:
            log.warning("no sign-in", error=error.message, reason=error.reason)
            answer = self._problem(request, 403, "refused")
        except DetflowError as error:
            return self._away(request, error)
        self._add_cookie(answer, credentials.LOGIN, "", 0, lax=True)
        return answer

    async def _end(self, request: Request) -> Response:
        token = credentials.read_cookie(
            dict(request.headers.raw), credentials.SESSION, self._address
        )
        if token:
            await self._sessions.end(token, request.scope["detflow.request_id"])
        return self._redirect("/", credentials.SESSION, "", 0)

    async def _begin(self, request: Request, proof: access_pb2.CreateSessionRequest) -> Response:
        session = await self._sessions.begin(proof, request.scope["detflow.request_id"])
        return self._redirect("/", credentials.SESSION, session.token, _COOKIE_SECONDS)

    def _redirect_uri(self, request: Request) -> str:
        """Returns the address to come back to; without a public URL the Host is one of loopback."""
        here = f"{request.scope['scheme']}://{request.headers['host']}"
        return f"{self._address.public or here}{CALLBACK}"

    def _redirect(
        self, url: str, cookie: str, value: str, seconds: int, *, lax: bool = False
    ) -> Response:
        answer = RedirectResponse(url, 303)
        self._add_cookie(answer, cookie, value, seconds, lax=lax)
        return answer

    def _add_cookie(
        self, answer: Response, name: str, value: str, seconds: int, *, lax: bool = False
    ) -> None:
        cookie = credentials.set_cookie(name, value, seconds, self._address, lax=lax)
        answer.headers.append("set-cookie", cookie)

    def _problem(self, request: Request, code: int, problem: str) -> Response:
        return _page(request, code, pages.problem(problem, _language(request)))

    def _away(self, request: Request, error: Exception) -> Response:
        log.warning("sign-in is away", error=repr(error)[:2000])
        return self._problem(request, 503, "away")


def _page(request: Request, code: int, text: str) -> Response:
    headers = _PAGE_HEADERS | {"content-language": _language(request)}
    return Response(text, code, media_type="text/html", headers=headers)


def _language(request: Request) -> str:
    """Returns which of our languages a browser prefers."""
    given = request.headers.get("accept-language", "").lower()
    first = given.partition(",")[0].strip()
    return "ko" if first.startswith("ko") else "en"
