"""A hub for the tests of downloads."""

import pytest
from huggingface_hub import constants

from tests.data.hub_server import REPO, SHARDS, HubServer


@pytest.fixture
def server(monkeypatch):
    with HubServer() as running:
        running.repos[REPO] = dict(SHARDS)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running
        running.gate.set()
        running.shutdown()
