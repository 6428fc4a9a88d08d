"""Who may ask a server: by the names it is asked under, the pages that ask, and a token."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfmodel.serve.metrics import Metrics

TOKEN = "a token is needed: open the address that the server showed at its start, with ?token=…"
OPEN = ("/healthz",)  # asked for by load balancers, and says nothing
HEADERS = {
    # Nothing from elsewhere, in no frame of another page.
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Tells whether a name or an address is this machine's own for itself alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware that refuses: a host that the server does not go by, which a name that was
    pointed here would be (DNS rebinding); an origin that is not the server's own nor one of
    `origins`; and with a token everything that does not bring it, as `Authorization: Bearer`, as
    the cookie that `/?token=…` leaves, or in that query.

    token: None for a server that listens on loopback alone, which goes by loopback's names."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, token: str | None = None, origins: Sequence[str] = ()
    ) -> None:
        self.app, self.metrics, self.token = app, metrics, token
        self.origins = [_origin(each) for each in origins]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        answer = self._answer(scope, Headers(scope=scope))
        if answer is None:
            await self.app(scope, receive, _with_headers(scope, send))
        elif scope["type"] == "http":
            await answer(scope, receive, _with_headers(scope, send))
        else:  # which answers 403, whatever the reason
            await send({"type": "websocket.close", "code": 1008})

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        """Answer that takes the place of the application's; None to let it pass."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.token is None and not is_loopback(_origin(f"//{host}")[0]):
            return self._refused(421, "host", f"this server does not go by the name {host[:80]!r}")
        if origin is not None and _origin(origin) not in (_origin(f"//{host}"), *self.origins):
            return self._refused(403, "origin", "pages of another origin may not ask this server")
        if self.token is None or scope["path"] in OPEN:
            return None
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        # Cookies do not tell ports apart: each server of a machine has one of its own.
        name = f"sfmodel-token-{(scope.get('server') or ('', ''))[1]}"
        brought = (asked, bearer if kind.lower() == "bearer" else "", _cookie(headers, name))
        if not any(hmac.compare_digest(each.encode(), self.token.encode()) for each in brought):
            return self._refused(401, "token", TOKEN)
        if asked and scope["type"] == "http" and scope["path"] == "/":
            # The token leaves the address, where histories and pictures of screens would keep it.
            there = RedirectResponse("/", 303)
            # Lax: the address may have been followed from a mail; pages of others are refused.
            there.set_cookie(name, self.token, httponly=True, samesite="lax")
            return there
        return None

    def _refused(self, status: int, why: str, sentence: str) -> Response:
        self.metrics.refused.labels(why).inc()
        return PlainTextResponse(sentence + "\n", status)


def _origin(said: str) -> tuple[str, int | None]:
    """Host and port of an origin, or of a Host header after two slashes."""
    try:
        parts = urlsplit(said)
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
        return (parts.hostname or "", None if port in (80, 443) else port)
    except ValueError:
        return ("", -1)


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _with_headers(scope: Scope, send: Send) -> Send:
    """`send`, with HEADERS in the answer to a request."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *more]
        await send(message)

    return sending
