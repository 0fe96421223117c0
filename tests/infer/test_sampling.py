"""Sampling against probabilities worked out in NumPy, one row at a time, by sorting."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxchat.infer import sampling as module
from jaxchat.infer.request import Sampling
from jaxchat.infer.sampling import add_seen, draw, logprobs, seen_of
from jaxchat.infer.settings import (
    LEVELS,
    SMALL_TOP_K,
    level_of,
    settings_of,
)
from jaxchat.ops import lowest_within as lowest
from jaxchat.ops import triton

PAD = -1e30
DRAWS = 4096
VOCAB, PADDED = 300, 384
PROMPT, ANSWER = [3, 5, 5, 290, 17], [3, 8, 8, 8, 40]
LOGITS = np.full(PADDED, PAD, np.float32)
LOGITS[:VOCAB] = 2 * np.random.default_rng(0).normal(size=VOCAB)
LOGITS[[3, 5, 8, 17, 40]] = [3.5, 3.0, 4.0, -1.0, 2.5]  # what the penalties change is likely
LOGITS[[100, 200]] = 2.75  # equal

jitted = functools.partial(jax.jit, static_argnames="level")(draw)


def probabilities(logits, s, prompt=(), answer=()):
    """What `Sampling` promises, in float64."""
    logits = np.asarray(logits, np.float64).copy()
    real = logits > PAD / 2
    for id, value in s.logit_bias.items():
        logits[id] += value
    for id in {*prompt, *answer}:
        logits[id] = logits[id] / s.repetition_penalty if logits[id] > 0 else logits[id] * s.repetition_penalty
    for id in set(answer):
        logits[id] -= s.frequency_penalty * list(answer).count(id) + s.presence_penalty
    logits[~real] = -np.inf
    if s.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]

    def softmax():
        with np.errstate(over="ignore"):  # to -inf
            shares = np.exp((logits - logits.max()) / max(s.temperature, np.finfo(np.float32).tiny))
        return shares / shares.sum()

    if s.top_k is not None and s.top_k < real.sum():
        logits[logits < np.sort(logits)[-s.top_k]] = -np.inf
    if s.top_p < 1:
        order = np.argsort(-logits)
        last = np.searchsorted(np.cumsum(softmax()[order]), s.top_p)
        logits[logits < logits[order[min(last, len(order) - 1)]]] = -np.inf
    shares = softmax()
    logits[shares < s.min_p * shares.max()] = -np.inf
    return softmax()


def rows_of(logits, count):
    return jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))


def check_frequencies(ids, expected, least=1e-4):
    """The chi-square test, with ids that few draws are expected of taken together. Seeds are fixed, so it is exact."""
    counts = np.bincount(ids, minlength=len(expected))
    assert counts[expected == 0].sum() == 0, "an id was drawn that cannot be"
    common = expected * len(ids) >= 5
    pairs = [
        (counts[common], expected[common]),
        (counts[~common].sum(keepdims=True), expected[~common].sum(keepdims=True)),
    ]
    observed, shares = map(np.concatenate, zip(*pairs, strict=True))
    observed, shares = observed[shares > 0], shares[shares > 0]
    if len(shares) > 1:
        assert chisquare(observed, shares / shares.sum() * len(ids)).pvalue > least


CASES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 6},  # the sixth and the seventh are equal
    {"top_k": 50, "temperature": 2.0},
    {"top_k": 200, "temperature": 2.0},
    {"top_k": 1000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 1.5},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.02, "temperature": 2.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7, "temperature": 2.0},
    {"frequency_penalty": 0.9},
    {"frequency_penalty": -0.5, "temperature": 2.0},
    {"presence_penalty": 1.5},
    {"logit_bias": {0: 5.0, 8: -100.0, 299: 6.5}},
    {"logit_bias": {7: 100.0}},
    {"top_k": 20, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 100, "min_p": 0.05, "temperature": 2.0},
    {"top_p": 0.9, "min_p": 0.03, "temperature": 1.3},
    {"logit_bias": {1: 4.0}, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.4,
     "temperature": 1.2, "top_k": 60, "top_p": 0.9, "min_p": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frequencies_are_the_softmax_after_each_filter(case):
    rows = [Sampling(**case, seed=7, number=number) for number in range(DRAWS)]
    seen = rows_of(seen_of(PROMPT, ANSWER, PADDED), DRAWS).astype(jnp.int32)
    drawn = jitted(rows_of(LOGITS, DRAWS), settings_of(rows), jnp.full(DRAWS, 5), seen, level="full")
    assert drawn.dtype == jnp.int32
    check_frequencies(np.asarray(drawn), probabilities(LOGITS, rows[0], PROMPT, ANSWER))


@pytest.mark.parametrize("varied", ["seed", "number", "count"])
def test_draws_are_independent_of_each_other(varied):
    values = np.arange(DRAWS)
    rows = [Sampling(**({} if varied == "count" else {varied: int(value)})) for value in values]
    count = jnp.asarray(values if varied == "count" else np.zeros(DRAWS, int))
    drawn = np.asarray(jitted(rows_of(LOGITS, DRAWS), settings_of(rows), count, level="plain"))
    expected = probabilities(LOGITS, Sampling())
    check_frequencies(drawn, expected)
    likely = expected.argmax()
    share = expected[likely]
    pairs = 2 * (drawn[:-1] == likely) + (drawn[1:] == likely)  # neighbours
    odds = np.array([(1 - share) ** 2, (1 - share) * share, share * (1 - share), share**2])
    check_frequencies(pairs[::2], odds)


def test_frequencies_over_many_blocks():
    logits = 3 * np.random.default_rng(1).normal(size=5000)
    rows = [Sampling(number=number) for number in range(DRAWS)]
    drawn = np.asarray(jitted(rows_of(logits, DRAWS), settings_of(rows), jnp.zeros(DRAWS, jnp.int32), level="plain"))
    expected = probabilities(logits, Sampling())
    check_frequencies(drawn, expected)
    check_frequencies(drawn // 100, expected.reshape(-1, 100).sum(-1))


# --- rows and levels ----------------------------------------------------------------------------------------------

MIXED = [
    {"temperature": 0.0},
    {},
    {"temperature": 1e-40},
    {"temperature": 1e300},
    {"temperature": 0.7, "top_k": 50},
    {"top_k": 1},
    {"top_k": SMALL_TOP_K},
    {"temperature": 0.0, "top_k": 3},
    {"top_k": SMALL_TOP_K + 1},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"repetition_penalty": 1.3, "temperature": 0.0},
    {"frequency_penalty": 1.0, "logit_bias": {9: 3.0}},
]


def mixed(count, size):
    rng = np.random.default_rng(2)
    logits = (2 * rng.normal(size=(count, size))).astype(np.float32)
    logits[::2] = np.round(logits[::2] * 4) / 4  # many equal ones
    rows = [Sampling(**MIXED[row % len(MIXED)], seed=row // 3, number=row) for row in range(count)]
    seen = np.stack([seen_of(rng.integers(0, size, 9), rng.integers(0, size, 9), size) for _ in range(count)])
    return jnp.asarray(logits), rows, jnp.asarray(rng.integers(0, 99, count)), jnp.asarray(seen)


@pytest.mark.parametrize("size", [7, 5000])  # of fewer and of more blocks than `SMALL_TOP_K`
def test_a_row_gets_its_token_in_any_company_and_at_any_level_that_serves_it(size):
    logits, rows, count, seen = mixed(2 * len(MIXED), size)
    together = np.asarray(jitted(logits, settings_of(rows), count, seen, level="full"))
    for level in LEVELS:
        served = [row for row in range(len(rows)) if LEVELS.index(level_of(rows[row])) <= LEVELS.index(level)]
        at = np.array(served)
        drawn = jitted(logits[at], settings_of([rows[row] for row in served]), count[at], seen[at], level=level)
        np.testing.assert_array_equal(drawn, together[at])
        for row in served[:: 4 if level == "full" else 2]:
            one = slice(row, row + 1)
            alone = jitted(logits[one], settings_of([rows[row]]), count[one], seen[one], level=level)
            assert alone.tolist() == [together[row]], rows[row]


def test_a_row_can_share_a_batch_with_rows_that_only_fill_it():
    logits, rows, count, seen = mixed(8, 300)
    given = settings_of(rows)
    filled = jax.tree.map(lambda values: np.concatenate([values, np.zeros_like(values)]), given)
    twice = [jnp.concatenate([values, jnp.zeros_like(values)]) for values in (logits, count, seen)]
    for level in LEVELS:
        expected = jitted(logits, given, count, seen, level=level)
        np.testing.assert_array_equal(jitted(twice[0], filled, *twice[1:], level=level)[:8], expected)


def test_other_settings_do_not_compile_again():
    compiled = jax.jit(lambda *arguments: draw(*arguments, level="full"))
    for case in MIXED:
        compiled(rows_of(LOGITS, 2), settings_of([Sampling(**case)] * 2), jnp.zeros(2, jnp.int32))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("level", LEVELS)
def test_the_vocabulary_is_never_sorted(level):
    size = 65_536
    shapes = jax.eval_shape(lambda: (jnp.zeros((2, size)), jnp.zeros(2, jnp.int32), jnp.zeros((2, size), jnp.int32)))
    traced = jitted.trace(shapes[0], settings_of([Sampling()] * 2), *shapes[1:], level=level)
    for platform in ("cpu", "cuda"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        sorted_shapes = re.findall(r"(?:chlo\.top_k|stablehlo\.sort|@\S*topk).*?tensor<(\d+)x(\d+)xf32>", program, re.I)
        assert bool(sorted_shapes) == (level == "top_k")
        assert all(int(length) <= size // 32 for _, length in sorted_shapes), sorted_shapes


def test_the_vocabulary_is_read_once_for_its_highest_logits():
    size = 65_536
    logits, ids, seen = jax.eval_shape(lambda: (jnp.zeros((2, size)), jnp.zeros(2, int), jnp.zeros((2, size), int)))
    drawn = jitted.trace(logits, settings_of([Sampling()] * 2), ids, seen, level="full")
    scored = jax.jit(logprobs, static_argnums=2).trace(logits, ids, 20)
    for traced, reductions in ((drawn, 1), (scored, 2)):  # for log-probabilities the exponentials are added up too
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        shapes = re.findall(r"stablehlo\.reduce\(.*: \(tensor<([\dx]+)xf32>", program)
        whole = [shape for shape in shapes if math.prod(map(int, shape.split("x"))) == 2 * size]
        assert len(whole) == reductions, whole
        # What is changed in a few places is no argument, which would be copied.
        assert not re.search(r'"stablehlo.scatter"\(%arg', program)


# --- greedy, the ends of the temperature, and padding -------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_temperature_zero_is_the_highest_logit_and_the_lowest_id_among_equals(level):
    logits = np.full((4, 1000), -1.0, np.float32)
    logits[0, [130, 131, 900]] = 2.0
    logits[1, [999, 500]] = [-0.5, -0.75]
    logits[2, 1:] = PAD
    rows = settings_of([Sampling(temperature=0.0, top_k=5, top_p=0.1, min_p=0.9, number=i) for i in range(4)])
    assert jitted(jnp.asarray(logits), rows, jnp.zeros(4, jnp.int32), level=level).tolist() == [130, 999, 0, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-6, 1e3, 1e30, 1e300])
@pytest.mark.parametrize("case", [{}, {"top_k": 5}, {"top_p": 0.499}, {"min_p": 0.5}], ids=str)
def test_every_temperature_agrees_with_numpy(temperature, case):
    logits = np.full(PADDED, PAD, np.float32)
    logits[:VOCAB] = 15 * np.tanh(np.random.default_rng(3).normal(size=VOCAB))
    logits[[20, 250]] = 14.999
    rows = [Sampling(temperature=temperature, number=number, **case) for number in range(DRAWS)]
    drawn = np.asarray(jitted(rows_of(logits, DRAWS), settings_of(rows), jnp.zeros(DRAWS, jnp.int32), level="full"))
    check_frequencies(drawn, probabilities(logits, Sampling(temperature=temperature, **case)))


@pytest.mark.parametrize("level", LEVELS[1:])  # the first serves no row that is hot
def test_padding_is_never_drawn_however_hot(level):
    logits = np.full((DRAWS, 500), PAD, np.float32)
    logits[:, [2, 3, 300]] = [-50, 30, 0]
    hot = {"temperature": 1e300, "top_k": 40, "top_p": 0.999999}
    rows = settings_of([Sampling(number=number, logit_bias={2: -100.0}, **hot) for number in range(DRAWS)])
    drawn = np.asarray(jitted(jnp.asarray(logits), rows, jnp.zeros(DRAWS, jnp.int32), level=level))
    assert set(drawn) == {2, 3, 300}


# --- the filters' bounds, bit by bit ------------------------------------------------------------------------------

floats = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, PAD])
lists = st.lists(floats, min_size=1, max_size=40).filter(lambda values: max(values) > PAD / 2)
kths = [jax.jit(functools.partial(module._kth, on_cpu=on_cpu)) for on_cpu in (True, False)]
kths.append(jax.jit(lambda _, logits, top_k: module._kth_of_few(logits, module._blocks(logits, 32).max(-1), top_k)))


@given(lists, st.integers(1, 45), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_top_k_keeps_what_sorting_keeps(values, top_k, seed):
    size = 10_000  # more blocks than `SMALL_TOP_K`
    logits = np.full((1, size), PAD, np.float32)
    logits[0, np.random.default_rng(seed).permutation(size)[: len(values)]] = values
    bound = np.sort(logits[0])[-top_k]
    for kth in kths:
        assert kth(jnp.array([True]), logits, jnp.array([top_k], jnp.int32)).tolist() == [bound]


@functools.partial(jax.jit, static_argnames="on_cpu")
def nucleus(used, logits, top_p, on_cpu):
    limits = module._Limits(jnp.ones(len(logits)), logits.max(-1), jnp.full(len(logits), PAD / 2))
    return module._nucleus(used, logits, module._tops(logits), limits, top_p, on_cpu=on_cpu)


@given(st.integers(0, 2**32), st.sampled_from([0.1, 1.0, 4.0]), st.floats(0.001, 0.999), st.booleans())
@settings(max_examples=50, deadline=None)
def test_top_p_keeps_what_sorting_keeps(seed, spread, top_p, rounded):
    rng = np.random.default_rng(seed)
    logits = (spread * rng.normal(size=(1, 2000))).astype(np.float32)
    if rounded:
        logits = np.round(logits * 2) / 2
    given = jnp.array([True]), logits, jnp.array([top_p], jnp.float32)
    found, again = (float(nucleus(*given, on_cpu)[0]) for on_cpu in (True, False))
    shares = probabilities(logits[0], Sampling())
    # Sums are exact to about 1e-5 of the highest probability.
    assert found == again and found in logits
    assert shares[logits[0] >= found].sum() >= top_p - 2e-5
    assert shares[logits[0] > found].sum() < top_p + 2e-5


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-38, 1e-20, 1e-7])
@pytest.mark.parametrize("fewest", [1, 100], ids=["kernel", "plain"])
def test_the_smallest_top_p_keeps_the_highest_logit(monkeypatch, top_p, fewest):
    rows = settings_of([Sampling(top_p=top_p, number=number) for number in range(4)])
    assert jitted(rows_of(LOGITS, 4), rows, jnp.zeros(4, jnp.int32), level="full").tolist() == [LOGITS.argmax()] * 4
    monkeypatch.setattr(triton, "INTERPRET", True)
    monkeypatch.setattr(lowest, "FEWEST", fewest)
    found = nucleus.__wrapped__(jnp.ones(4, bool), rows_of(LOGITS, 4), jnp.asarray(rows.top_p), False)
    assert found.tolist() == [LOGITS.max()] * 4


def bounds(used, logits, rows):
    """The bounds of top-k and of top-p that a device other than a CPU finds for `used` rows; -1 for the others."""
    limits = module._Limits(rows.temperature, logits.max(-1), jnp.full(len(logits), PAD / 2))
    kth = module._kth(used, logits, rows.top_k, on_cpu=False)
    nucleus = module._nucleus(used, logits, module._tops(logits), limits, rows.top_p, on_cpu=False)
    return [jnp.where(used, found, -1.0) for found in (kth, nucleus)]


@pytest.mark.parametrize("size", [384, 5000])
def test_the_kernel_finds_the_bounds_of_the_rows_that_use_them(monkeypatch, size):
    logits = jnp.asarray(2 * np.random.default_rng(8).normal(size=(6, size)), jnp.float32)
    rows = settings_of([Sampling(top_k=7 + 60 * i, top_p=0.15 * (i + 1), temperature=0.5 + i) for i in range(6)])
    rows, calls, kernel = jax.tree.map(jnp.asarray, rows), [], lowest._kernel
    used = jnp.array([True, False, False, True, True, False])
    expected = bounds(used, logits, rows)
    kth = np.sort(np.asarray(logits))[np.arange(6), -np.asarray(rows.top_k)]
    np.testing.assert_array_equal(expected[0], np.where(used, kth, -1))
    monkeypatch.setattr(triton, "INTERPRET", True)
    monkeypatch.setattr(lowest, "FEWEST", 1)
    monkeypatch.setattr(lowest, "_kernel", lambda *given: calls.append(given[2]) or kernel(*given))
    np.testing.assert_array_equal(bounds(used, logits, rows), expected)
    assert len(calls) == 2 and all(((needed > 0) == used).all() for needed in calls)
    for of_all, of_used in zip(bounds(used | True, logits, rows), expected, strict=True):
        np.testing.assert_array_equal(jnp.where(used, of_all, -1), of_used)


# --- what a row has seen ------------------------------------------------------------------------------------------


def test_seen_ids_are_counted_as_they_are_written():
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 50, size).tolist() for size in (1, 7, 30)]
    answers = rng.integers(0, 50, (3, 20))
    seen = jnp.asarray(
        np.stack([seen_of(prompt, answer[:4], 50) for prompt, answer in zip(prompts, answers, strict=True)])
    )
    add = jax.jit(add_seen, donate_argnums=0)
    for step in range(4, 20):
        seen = add(seen, jnp.asarray(answers[:, step]), jnp.array([True, step < 10, True]))
    whole = [seen_of(*row, 50) for row in zip(prompts, [answers[0], answers[1, :10], answers[2]], strict=True)]
    np.testing.assert_array_equal(seen, whole)
    for prompt, answer, row in zip(
        prompts, answers, map(functools.partial(seen_of, size=50), prompts, answers), strict=True
    ):
        assert row.tolist() == [2 * answer.tolist().count(id) + (id in prompt) for id in range(50)]


# --- log-probabilities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 1000, 20_000])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_logprobs_are_those_of_a_log_softmax(size, k):
    rng = np.random.default_rng(6)
    logits = (5 * rng.normal(size=(9, size))).astype(np.float32)
    logits[:, size - 3 :] = PAD
    ids = rng.integers(0, size - 3, 9)
    ids[:4] = logits[:4].argmax(-1)
    logprob, likeliest, values = jax.jit(logprobs, static_argnums=2)(logits, ids, k)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True)) + exact.max(-1, keepdims=True)
    order = np.argsort(-exact, axis=-1)[:, :k]
    np.testing.assert_array_equal(likeliest, order)
    np.testing.assert_allclose(values, np.take_along_axis(exact, order, axis=-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logprob, np.take_along_axis(exact, ids[:, None], axis=-1)[:, 0], rtol=1e-5, atol=1e-5)
    if k:  # the same to the last bit, by which lm-evaluation-harness tells what is greedy
        np.testing.assert_array_equal(logprob[:4], values[:4, 0])


def test_the_lower_of_equal_ids_comes_first_among_the_alternatives():
    logits = np.zeros((1, 5000), np.float32)
    logits[0, [4000, 130, 131, 2]] = 3.0
    logits[0, 1000] = 4.0
    assert logprobs(jnp.asarray(logits), jnp.array([0]), 5)[1].tolist() == [[1000, 2, 130, 131, 4000]]
