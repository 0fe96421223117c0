"""What every request goes through: who may ask, what every response says, and the log.

A page of another site that a browser shows can send requests to a server on this machine. Without an API key these are
refused by their `Origin`. If that page's name has been made to point at this machine (DNS rebinding), then its origin
is right, but not the name that it asks for: a server on the loopback interface answers to names of that only.
"""

from __future__ import annotations

import hmac
import sys
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxchat.serve.http.errors import ApiError
from jaxchat.serve.http.fields import shown
from jaxchat.serve.http.serving import Server
from jaxchat.verbatim import one_line

SECURITY = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_SECRET = ("/v1/", "/api/")  # what an API key protects


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        name = uuid.uuid4().hex

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                for key, value in SECURITY.items():
                    headers.setdefault(key, value)
            await send(message)

        state = scope.setdefault("state", {})
        try:
            error = self._refusal(scope)
            app = self.app if error is None else error.response()
            await app(scope, receive, send_with_headers)
        except Exception:
            status = status or 500
            raise
        finally:
            _log(scope, status, state.get("usage"), time.monotonic() - begun)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why the request is not answered; None if it is."""
        server, headers = self.server, Headers(scope=scope)
        host = headers.get("host", "")
        if server.key is None:
            if server.hosts is not None and _hostname(host) not in server.hosts:
                return ApiError(403, f"this server does not answer to the host {shown(host)}", code="unknown_host")
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host and not {origin, "*"} & set(server.origins):
                return ApiError(
                    403,
                    f"requests from {shown(origin)} are refused; start the server with --allow-origin {origin} or an "
                    "API key",
                    code="unknown_origin",
                )
            return None
        if scope["method"] == "OPTIONS" or not scope["path"].startswith(_SECRET):
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), server.key.encode()):
            return ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return None


def _hostname(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _log(scope: Scope, status: int, usage: object, seconds: float) -> None:
    """A line on stderr without anything that a client has written but the path."""
    path, method = scope["path"], scope["method"]
    if status < 400 and not path.startswith("/v1/") or sys.stderr is None:
        return
    if path == "/health" and status == 503:
        return
    tokens = f"  {usage}" if usage is not None else ""
    at = time.strftime("%H:%M:%S")
    shown_path = one_line(path if len(path) <= 100 else f"{path[:100]}…")
    print(f"{at}  {method} {shown_path}  {status or 'left'}{tokens}  {seconds:.2f} s", file=sys.stderr, flush=True)
