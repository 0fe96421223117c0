"""A server as users start it, of the tiny run that has memorized a few conversations."""

import contextlib
import os

import pytest

from benchmarks.serving.server import serving

HELLO = [{"role": "user", "content": "Hello?"}]
GREETING = "Grüße, 日本 🙂!"  # the memorized answer
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
