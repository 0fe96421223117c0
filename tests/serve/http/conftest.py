"""Servers in this process: a small model, the real application, and uvicorn on a port of its own."""

import contextlib
import json
import time

import httpx
import pytest

from jaxchat.infer.trained import load_model
from jaxchat.serve.http.app import build_app
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.serving import Served, Server
from jaxchat.serve.http.start import Web, listen
from jaxchat.tools.calculator import calculate

QUESTION = [{"role": "user", "content": "What is 34 + 58?"}]
HELLO = [{"role": "user", "content": "Hello?"}]
GREEDY = {"temperature": 0}


class Client(httpx.Client):
    """A client with short names for what the tests do again and again."""

    def chat(self, messages=HELLO, **fields):
        return self.post("/v1/chat/completions", json={"messages": messages, **GREEDY, **fields})

    def complete(self, prompt, **fields):
        return self.post("/v1/completions", json={"prompt": prompt, **GREEDY, **fields})

    def frames(self, path, **fields):
        """The frames of a stream, which must end with [DONE]."""
        with self.stream("POST", path, json={**GREEDY, **fields, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            return frames_of("".join(response.iter_text()))


def frames_of(text):
    """The frames in the text of a stream."""
    *events, last, end = text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


@contextlib.contextmanager
def web(server):
    """A client of `server`, which is started and stopped."""
    http = Web(build_app(server), listen("127.0.0.1", 0))
    try:
        with Client(base_url=http.url, timeout=60) as client:
            yield client
    finally:
        http.stop()


def served(engine, stage="sft", **facts):
    return Served.of(engine, **{"name": "tiny", "stage": stage, "tool": calculate, "tool_name": "calculator", **facts})


@pytest.fixture(scope="session")
def engine(run_dir):
    return load_model(run_dir, "sft").engine(rows=4)


@pytest.fixture(scope="session")
def service(engine):
    with Service(engine) as service:
        yield service


@pytest.fixture(scope="session")
def client(service, run_dir):
    """A client of a chat model."""
    with web(Server(service, served(service.engine), run_dir=str(run_dir))) as client:
        yield client


@pytest.fixture(scope="session")
def base_client(service, run_dir):
    """A client of a base model."""
    with web(Server(service, served(service.engine, "pretrain"), run_dir=str(run_dir))) as client:
        yield client


@pytest.fixture
def slow(service, monkeypatch):
    """Makes each step of the engine take a while, so that requests are still in flight when a test looks."""
    step = service.engine.step

    def slow_step():
        time.sleep(0.1)
        return step()

    monkeypatch.setattr(service.engine, "step", slow_step)


def wait_until(condition, seconds=10):
    """Waits until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come true"
        time.sleep(0.01)
