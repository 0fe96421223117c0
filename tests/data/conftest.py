"""A hub for the tests of downloads, and a small text."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from jaxchat.data.text.shards import TextFiles
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


@pytest.fixture(scope="module")
def side(tmp_path_factory) -> TextFiles:
    """Two shards of three row groups of three documents."""
    folder = tmp_path_factory.mktemp("text")
    texts = [f"the {i} cat sat " * (i % 4 + 1) for i in range(18)]
    files = tuple(folder / f"shard_{shard}.parquet" for shard in range(2))
    for shard, path in enumerate(files):
        pq.write_table(pa.table({"text": texts[9 * shard : 9 * shard + 9]}), path, row_group_size=3)
    return TextFiles(files)
