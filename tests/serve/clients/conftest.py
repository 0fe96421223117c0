"""A server as users start it, of the tiny run that has memorized a few conversations."""

import asyncio
import contextlib
import os

import pytest

from benchmarks.serving.http1 import fault_of_error
from benchmarks.serving.server import serving

HELLO = [{"role": "user", "content": "Hello?"}]
GREETING = "Grüße, 日本 🙂!"  # the memorized answer
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SUM = [{"role": "user", "content": "What is 34 + 58?"}]  # answered by means of the calculator


@contextlib.contextmanager
def served(directory, *options):
    """A server on one device, as on the machine of a user."""
    kept = os.environ.pop("JAX_NUM_CPU_DEVICES", None)
    try:
        with serving(directory, *options) as server:
            yield server
    finally:
        if kept is not None:
            os.environ["JAX_NUM_CPU_DEVICES"] = kept


@pytest.fixture(scope="session")
def server(run_dir):
    """Serves the chat model; once all tests are over it must drain and end well."""
    with served(run_dir, "--name", "quickstart") as running:
        yield running


@pytest.fixture(scope="session")
def base_server(run_dir):
    """Serves the base model, which has memorized a story."""
    with served(run_dir, "--stage", "pretrain") as running:
        yield running


@pytest.fixture
def still_well(server):
    """After the test the server answers as before, and nothing is left running."""
    yield
    assert asyncio.run(server.idle()), "a request is still running"
    assert answer(server) == GREETING


@pytest.fixture
def ask(server):
    return lambda *arguments: asyncio.run(server.address.ask(*arguments))


def answer(server):
    reply = asyncio.run(server.address.ask("POST", CHAT, {"messages": HELLO, "temperature": 0}))
    return reply.json["choices"][0]["message"]["content"]


def refused(reply, status=400):
    """The error of a response with `status`, which must have OpenAI's form."""
    assert reply.status == status, reply.body
    assert fault_of_error(reply) is None
    return reply.json["error"]
