"""Bits per byte against its definition, in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.eval.bpb import evaluate_bpb
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.model.parameters import shardings
from jaxchat.ops.compute import Compute

CONFIG = GPTConfig(depth=2, sequence_len=16, vocab_size=200)
TOKEN_BYTES = np.array([0 if i % 7 == 0 else 1 + i % 5 for i in range(200)], np.int32)


@pytest.fixture(scope="module")
def params():
    params = init_params(CONFIG, jax.random.key(0))
    kernel = params["head"]["kernel"]
    return {**params, "head": {"kernel": jax.random.normal(jax.random.key(1), kernel.shape) / 4}}


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    made = []
    for _ in range(3):
        row = rng.integers(0, CONFIG.vocab_size, (4, 17)).astype(np.int32)
        targets = np.where(rng.random((4, 16)) < 0.3, -1, row[:, 1:]).astype(np.int32)
        made.append({"inputs": row[:, :-1], "targets": targets})
    return made


def by_definition(params, batches):
    nats = size = 0.0
    for batch in batches:
        scores = np.asarray(
            logits(CONFIG, params, hidden_states(CONFIG, params, jnp.asarray(batch["inputs"]))), np.float64
        )
        for row, targets in zip(scores, batch["targets"], strict=True):
            for score, target in zip(row, targets, strict=True):
                if target >= 0 and TOKEN_BYTES[target] > 0:
                    nats += np.log(np.exp(score[: CONFIG.vocab_size]).sum()) - score[target]
                    size += TOKEN_BYTES[target]
    return nats / math.log(2) / size


def test_agrees_with_its_definition(params, batches):
    expected = by_definition(params, batches)
    assert evaluate_bpb(params, CONFIG, batches, TOKEN_BYTES) == pytest.approx(expected, rel=1e-6)
    # A ratio of sums, which a mean over batches is not.
    means = [evaluate_bpb(params, CONFIG, [batch], TOKEN_BYTES) for batch in batches]
    assert np.mean(means) != pytest.approx(expected, rel=1e-6)


def test_a_mesh_changes_nothing(params, batches):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    spread = jax.device_put(params, shardings(mesh, params))
    one = evaluate_bpb(params, CONFIG, batches, TOKEN_BYTES)
    assert evaluate_bpb(spread, CONFIG, batches, TOKEN_BYTES, compute=Compute(mesh=mesh)) == pytest.approx(
        one, rel=1e-6
    )


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(batches):
    params = init_params(CONFIG, jax.random.key(0))  # its head is zero: all tokens are equally likely
    size = np.ones(CONFIG.vocab_size, np.int32)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        assert evaluate_bpb(params, CONFIG, batches, size, compute=Compute(dtype)) == pytest.approx(
            math.log2(200), rel=tolerance
        )


def test_nothing_to_predict_is_not_a_number(params, batches):
    empty = [{"inputs": batches[0]["inputs"], "targets": np.full((4, 16), -1, np.int32)}]
    assert math.isnan(evaluate_bpb(params, CONFIG, empty, TOKEN_BYTES))
    assert math.isnan(evaluate_bpb(params, CONFIG, [], TOKEN_BYTES))
