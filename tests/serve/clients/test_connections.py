"""Connections that are left open cannot keep others out."""

import json
import os
import resource
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from jaxchat.serve.http import connections, fields
from jaxchat.serve.http.errors import ApiError, on_api_error
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.start import Web, listen


@pytest.fixture
def web(monkeypatch):
    """A server that waits for a fifth of a second, and answers with the body's fields."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(fields, "BODY_SECONDS", 0.2)

    async def echo(request):
        return PlainTextResponse(json.dumps((await fields.read_json(request)).values))

    app = Starlette(routes=[Route("/", echo, methods=["POST"])], exception_handlers={ApiError: on_api_error})
    web = Web(app, listen("127.0.0.1", 0))
    yield web
    web.stop()


def received(web, *pieces):
    """What comes for some bytes, sent one after the other, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", web.port), timeout=20) as connection:
        answer = b""
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.02)
        while more := connection.recv(1 << 16):
            answer += more
        return answer


WHOLE = b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n{"a": 1}'


@pytest.mark.parametrize("begun", [b"", b"POST / HT", WHOLE[:30]], ids=["silence", "half a line", "half a head"])
def test_a_request_that_never_begins(web, begun):
    assert received(web, begun) == b""


def test_a_second_request_that_never_begins(web):
    assert received(web, WHOLE, WHOLE[:30]).count(b"HTTP/1.1 200") == 1


def test_a_body_that_never_comes(web):
    answer = received(web, WHOLE[:-4])
    assert answer.startswith(b"HTTP/1.1 408") and b'"invalid_request_error"' in answer


def test_a_request_in_pieces_is_answered(web):
    assert b'{"a": 1}' in received(web, WHOLE[:10], WHOLE[10:30], WHOLE[30:-3], WHOLE[-3:])


def test_an_idle_server_ends_although_the_signal_takes_long():
    """Its main thread waits for jobs when the signal comes, whose handler may wait for another thread."""
    asked = []

    def handler(number, frame):
        time.sleep(0.5)
        asked.append(number)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        Service(SimpleNamespace(busy=False, rows=1)).run(lambda: bool(asked), drain_seconds=0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked


def test_as_many_open_files_as_the_system_allows(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        connections.allow_many_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
