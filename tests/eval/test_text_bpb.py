"""Bits per byte of texts against their definition, in NumPy, and against the rule for windows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.eval.text_bpb import Bpb, DocumentBpb, rolling_windows, text_bpb
from jaxchat.model import reference
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.model.parameters import shardings
from jaxchat.ops.compute import Compute
from jaxchat.tokenizer import Tokenizer

LENGTH = 24
TEXTS = [
    ("a.txt", "the cat sat on the mat"),
    ("b.txt", "Grüße, 日本 🙂!"),
    ("a.txt", ""),
    ("a.txt", "one two three four five six seven eight nine ten " * 3),
    ("b.txt", "x"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["the cat sat on the mat, one two three four five six seven. " * 5], 290)


@pytest.fixture(scope="module")
def config(tokenizer):
    return GPTConfig(depth=1, sequence_len=LENGTH, vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def params(config):
    params = init_params(config, jax.random.key(0))
    kernel = params["head"]["kernel"]
    return {**params, "head": {"kernel": jax.random.normal(jax.random.key(1), kernel.shape) / 4}}


def nats_by_definition(config, params, ids):
    """Of the targets after <|bos|>, a window at a time, with the NumPy model."""
    total, at = 0.0, 1
    while at < len(ids):
        end = min(at + LENGTH, len(ids))
        inputs = np.array(ids[max(0, end - 1 - LENGTH) : end - 1])
        scores = reference.logits(config, params, inputs)
        for place in range(at, end):
            score = scores[len(inputs) - (end - place)]
            total += np.log(np.exp(score).sum()) - score[ids[place]]
        at = end
    return total


def test_agrees_with_its_definition(config, params, tokenizer):
    done = []
    found = text_bpb(config, params, tokenizer, TEXTS, progress=done.append)
    kept = [(source, text) for source, text in TEXTS if text]
    assert [(one.source, one.beginning, one.index) for one in found.documents] == [
        ("a.txt", TEXTS[0][1], 0), ("b.txt", TEXTS[1][1], 0), ("a.txt", TEXTS[3][1][:80], 2), ("b.txt", "x", 1),
    ]  # fmt: skip
    nats = []
    for document, (_, text) in zip(found.documents, kept, strict=True):
        ids = tokenizer.encode(text, prepend="<|bos|>")
        nats.append(nats_by_definition(config, jax.tree.map(np.asarray, params), ids))
        assert (document.bytes, document.tokens) == (len(text.encode()), len(ids) - 1)
        assert document.nats == pytest.approx(nats[-1], rel=1e-5)
        assert document.bits_per_byte == pytest.approx(nats[-1] / math.log(2) / len(text.encode()), rel=1e-5)
    assert found.documents[2].tokens > 2 * LENGTH, "longer than two windows"
    sizes = [len(text.encode()) for _, text in kept]
    assert found.total.bits_per_byte == pytest.approx(sum(nats) / sum(sizes) / math.log(2), rel=1e-5)
    assert found.total.bits_per_byte != pytest.approx(np.mean([one.bits_per_byte for one in found.documents]), rel=1e-3)
    assert found.sources["b.txt"].bits_per_byte == pytest.approx(
        (nats[1] + nats[3]) / (sizes[1] + sizes[3]) / math.log(2), rel=1e-5
    )
    assert (found.total.documents, found.total.bytes) == (4, sum(sizes)) and done[-1] == pytest.approx(sum(sizes))


def test_a_mesh_changes_nothing(config, params, tokenizer):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    spread = jax.device_put(params, shardings(mesh, params))
    one = text_bpb(config, params, tokenizer, TEXTS)
    shared = text_bpb(config, spread, tokenizer, TEXTS, compute=Compute(mesh=mesh))
    for here, there in zip(one.documents, shared.documents, strict=True):
        assert there.nats == pytest.approx(here.nats, rel=1e-6)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(config, tokenizer):
    params = init_params(config, jax.random.key(0))  # its head is zero: all tokens are equally likely
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        found = text_bpb(config, params, tokenizer, TEXTS, compute=Compute(dtype)).total
        assert found.bytes == sum(len(text.encode()) for _, text in TEXTS)
        expected = found.tokens * math.log2(tokenizer.vocab_size) / found.bytes
        assert found.bits_per_byte == pytest.approx(expected, rel=tolerance)


def test_nothing_to_predict_is_not_a_number(config, params, tokenizer):
    found = text_bpb(config, params, tokenizer, [("a", "")])
    assert math.isnan(found.total.bits_per_byte) and found.documents == () and found.sources == {}


@given(st.integers(2, 200), st.integers(1, 40))
def test_windows_predict_each_token_once(count, length):
    ids = np.arange(count, dtype=np.int32)
    windows = [*rolling_windows(ids, length)]
    assert [int(target) for _, targets in windows for target in targets] == [*range(1, count)]
    for inputs, targets in windows:
        assert 1 <= len(targets) <= len(inputs) <= length
        assert len(inputs) == min(length, count - 1), "as much context as there is"
        assert inputs.tolist() == [*range(targets[-1] - len(inputs), targets[-1])]


def test_the_interval_covers_the_ratio_of_the_population():
    """In nineteen of twenty samples of documents, about."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 5000, 40_000)
    nats = sizes * rng.normal(0.8, 0.2, 40_000)
    truth = nats.sum() / sizes.sum() / math.log(2)
    covered = 0
    for _ in range(400):
        chosen = rng.choice(len(sizes), 60)
        found = Bpb.of([DocumentBpb("a", int(i), "", float(nats[i]), int(sizes[i]), 1) for i in chosen])
        covered += found.low <= truth <= found.high
    assert 0.91 < covered / 400 < 0.98
    assert Bpb.of([DocumentBpb("a", 0, "", 1.0, 1, 1)]).low is None
