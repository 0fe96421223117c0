"""Bits per byte through pages, against bits per byte of whole rows."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxchat.analysis.rounding import paged_bpb
from jaxchat.eval.bpb import evaluate_bpb
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params

CONFIG = GPTConfig(depth=2, sequence_len=80, vocab_size=300, window_pattern="SL")


@pytest.fixture(scope="module")
def params():
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(
        lambda leaf: leaf + jax.random.normal(next(keys), leaf.shape) / len(leaf) ** 0.5,
        init_params(CONFIG, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def batches():
    draw = np.random.default_rng(0)
    batches = []
    for _ in range(2):
        tokens = draw.integers(0, 300, (3, 81)).astype(np.int32)
        targets = np.where(draw.random((3, 80)) < 0.1, -1, tokens[:, 1:])
        batches.append({"inputs": tokens[:, :-1], "targets": targets})
    return batches


BYTES = np.array([*range(1, 296), 0, 0, 0, 0, 0], np.int32)  # the last ids are special


def test_bits_per_byte_are_those_of_whole_rows(params, batches):
    expected = evaluate_bpb(params, CONFIG, batches, BYTES)
    assert paged_bpb(params, CONFIG, batches, BYTES, dtype="float32") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"weights": "int8"}, {"kv_cache": "fp8"}, {"weights": "int8", "kv_cache": "fp8"}], ids=str
)
def test_8_bits_cost_something_and_not_much(params, batches, options):
    expected = evaluate_bpb(params, CONFIG, batches, BYTES)
    rounded = paged_bpb(params, CONFIG, batches, BYTES, dtype="float32", **options)
    assert rounded != pytest.approx(expected, rel=1e-6)
    assert rounded == pytest.approx(expected, rel=0.01)


def test_the_optional_parts_go_through_the_pages_too(batches):
    config = dataclasses.replace(
        CONFIG, attention_scale=1.4, residual_scales=True, value_embeddings=True, smear=True, bigrams=True, backout=True
    )
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(
        lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), init_params(config, jax.random.key(0))
    )
    expected = evaluate_bpb(params, config, batches[:1], BYTES)
    assert paged_bpb(params, config, batches[:1], BYTES, dtype="float32") == pytest.approx(expected, rel=1e-5)


def test_without_bytes_there_is_nothing_to_say(params, batches):
    assert np.isnan(paged_bpb(params, CONFIG, batches[:1], np.zeros(300, np.int32), dtype="float32"))
