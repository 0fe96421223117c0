"""The arithmetic of the measurements, against the known figures of d20, and against itself; no timing is asserted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.analysis.generation import (
    Requests,
    Timing,
    Work,
    bench,
    copy_speed,
    queue,
    random_model,
    step_bytes,
    tables,
    timed,
)
from jaxchat.infer.engine import Engine
from jaxchat.infer.quantized import quantize
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.tokenizer.base import SPECIAL_TOKENS

D20 = GPTConfig(depth=20, sequence_len=2048, vocab_size=65_536)
TINY = GPTConfig(depth=1, sequence_len=64, vocab_size=300)


def abstract(config, dtype="bfloat16"):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), abstract_params(config))


@pytest.fixture(scope="module")
def engine():
    params, tokenizer = random_model(TINY)
    return Engine(TINY, params, tokenizer, dtype="float32", rows=3)


@pytest.mark.parametrize(
    ("rows", "gigabytes", "tokens_per_second"), [(1, 1.02, 4217), (32, 3.05, 45_095), (128, 9.34, 58_912)]
)
def test_bytes_of_a_step_of_d20(rows, gigabytes, tokens_per_second):
    """393.2 M parameters in blocks and 83.9 M in the head, 2 bytes each, and 102,400 bytes of cache a token."""
    size = step_bytes(D20, abstract(D20), Work(rows, 512, 256), 2)
    assert size == 2 * (393_216_000 + 83_886_080) + rows * (2 * 1280 + 640 * 102_400)
    assert size / 1e9 == pytest.approx(gigabytes, abs=0.006)
    assert rows * 4.3e12 / size == pytest.approx(tokens_per_second, rel=1e-4)


def test_bytes_in_8_bits():
    kept = jax.eval_shape(lambda params: quantize(params, "bfloat16"), abstract_params(D20))
    scales = 4 * (20 * (4 * 1280 + 4 * 1280 + 1280) + 65_536)
    expected = 393_216_000 + 83_886_080 + scales + 2 * 1280 + 640 * 51_200
    assert step_bytes(D20, kept, Work(1, 512, 256), 1) == expected


def test_bytes_with_windows_and_shared_heads():
    """A layer with a window of 512 reads 513 tokens, and the last layer all 640; 2 of 10 heads are cached."""
    config = GPTConfig(depth=20, sequence_len=2048, vocab_size=65_536, window_pattern="S", num_kv_heads=2)
    one = 2 * 2 * 128 * 2  # bytes of a token in a layer
    without = GPTConfig(depth=20, sequence_len=2048, vocab_size=65_536, num_kv_heads=2)
    saved = [step_bytes(c, abstract(c), Work(8, 512, 256), 2) for c in (without, config)]
    assert saved[0] - saved[1] == pytest.approx(8 * one * 19 * (640 - 513))


@pytest.mark.parametrize("size", [300, 65_536, 70_000])
def test_random_model_has_a_tokenizer_of_its_size(size):
    config = GPTConfig(depth=1, sequence_len=16, vocab_size=size)
    params, tokenizer = random_model(config)
    assert tokenizer.vocab_size == size and tokenizer.decode(tokenizer.encode("Grüße!")) == "Grüße!"
    assert tokenizer.bos_token_id == size - len(SPECIAL_TOKENS)
    assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(params))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 200), st.booleans())
def test_mixed_requests_fit_and_have_the_means(context, new, room, mixed_settings):
    sequence_len = context + new + room
    requests = Requests(300).mixed(Work(4, context, new), sequence_len, settings=mixed_settings)
    drawn = list(itertools.islice(requests, 400))
    prompts, limits = (
        np.array(sizes) for sizes in zip(*((len(r.prompt), r.max_new_tokens) for r in drawn), strict=True)
    )
    assert prompts.min() >= 1 and limits.min() >= 1 and (prompts + limits).max() <= sequence_len
    assert prompts.mean() == pytest.approx(context, rel=0.15) and limits.mean() == pytest.approx(new, rel=0.15)
    assert all(r.stop_tokens == () for r in drawn), "none ends early"
    kinds = {repr(r.sampling).partition("seed")[0] for r in drawn}
    assert len(kinds) == (9 if mixed_settings else 1)


def test_samples_share_a_prompt_and_rows_of_their_own_do_not():
    requests, work = Requests(300), Work(5, 9, 4)
    samples, own = requests.samples(work), requests.uniform(work)
    assert len({tuple(request.prompt) for request in samples}) == 1
    assert sorted(request.sampling.number for request in samples) == list(range(5))
    assert len({tuple(request.prompt) for request in own}) == 5
    assert {request.max_new_tokens for request in own + samples} == {4}


def test_timed_counts_every_token_once(engine):
    timing = timed(engine, Requests(300).uniform(Work(3, 5, 20)))
    assert timing.tokens == 60 and 0 < timing.first_token < timing.first_token + timing.decoding <= timing.total
    assert 0 < timing.decoded <= 57
    assert not engine.busy


def test_a_single_token_leaves_nothing_to_decode(engine):
    timing = timed(engine, Requests(300).uniform(Work(2, 5, 1)))
    assert timing == Timing(timing.first_token, 0.0, 0, timing.total, 2)


def test_a_queue_counts_what_was_generated_and_leaves_the_engine_empty(engine):
    figures = queue(engine, Requests(300).mixed(Work(3, 6, 6), 64, settings=False), 3, 0.2)
    assert figures["seconds"] >= 0.2 and figures["requests"] >= 1
    assert figures["tokens_per_second"] == pytest.approx(figures["tokens"] / figures["seconds"])
    assert not engine.busy


def test_copy_speed_is_that_of_a_memory():
    assert 1e8 < copy_speed() < 1e14


def test_bench_is_consistent_and_has_a_table(engine):
    works, said = [Work(1, 4, 12), Work(3, 8, 12)], []
    result = bench(engine, works, repeats=2, queue_seconds=0.1, cache_itemsize=4, say=said.append)
    assert [(one["rows"], one["context"], one["new"]) for one in result["measured"]] == [(1, 4, 12), (3, 8, 12)]
    for one, work in zip(result["measured"], works, strict=True):
        assert one["step_bytes"] == step_bytes(TINY, engine.params, work, 4)
        limit = one["rows"] * result["copy_bytes_per_second"] / one["step_bytes"]
        assert one["limit_tokens_per_second"] == pytest.approx(limit)
        assert one["bandwidth_share"] == pytest.approx(one["tokens_per_second"] / limit)
        assert set(one["samples_of_one_prompt"]) == {
            "first_token_seconds", "tokens_per_second", "tokens_per_second_with_prompts",
        }  # fmt: skip
    uniform = result["measured"][-1]["tokens_per_second_with_prompts"]
    assert list(result["mixed_queue"]) == ["lengths", "lengths_and_settings"]
    for figures in result["mixed_queue"].values():
        assert figures["share_of_uniform"] == pytest.approx(figures["tokens_per_second"] / uniform)
    machine = {"device_kind": "a device", "jax": "0"}
    about = {"model": {"depth": 1, "parameters": 5}, "weights": "w", "kv_cache": "c", "machine": machine}
    lines = tables({**result, **about, "bits_per_byte": {"tokens": 10, "in_w": 1.5, "with_both": 1.53}}).splitlines()
    assert sum(line.startswith("| 1 |") for line in lines) == 1 == sum(line.startswith("| 3 |") for line in lines)
    assert lines[-1] == "Bits per byte of 10 tokens of validation text: 1.5000 in w, 1.5300 with both (+2.00%)"
    assert said[0] == "the speed of memory" and len(said) == 1 + 2 * 2 * 3 + 2
