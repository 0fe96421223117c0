"""Closes connections of clients that say nothing, or stop halfway through a request; makes room for many others."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

IDLE_SECONDS = 65.0  # more than what clients and proxies keep a connection for, lest they use one that just closed
BODY_SECONDS = 60.0  # that the body of a request may take


class Connection(AutoHTTPProtocol):  # pyright: ignore[reportGeneralTypeIssues]
    """A connection that is closed if it begins no request for `IDLE_SECONDS`, or up to twice as long.

    uvicorn waits without end for a connection's first request, and for the head of one that has begun.
    """

    cycle: Any
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._last: Any = None
        self._look = self.loop.call_later(IDLE_SECONDS, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and self.cycle is self._last:
            self.transport.close()
            return
        self._last = self.cycle
        self._look = self.loop.call_later(IDLE_SECONDS, self._close_if_idle)


def allow_many_connections() -> None:
    """Raises this process's soft limit of open files, of which each connection is one, to the hard limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
