"""The candidate kernels against plain formulas, interpreted; on a GPU `benchmarks/decode_candidates.py` runs them."""

import decode_candidates
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from candidates import attention, lowest_within, relay

from jaxchat.ops import triton
from jaxchat.ops.decode import attend_next
from jaxchat.ops.dispatch import Level
from jaxchat.ops.few_rows import between_attentions
from jaxchat.ops.linear import Quantized
from jaxchat.ops.lowest_within import Mass, _from_bits, total_mass
from jaxchat.ops.lowest_within import lowest_within as lowest
from jaxchat.ops.pages import PAGE, Place
from jaxchat.ops.rope import rope_tables
from tests.ops.test_decode import cache, close, numbers
from tests.ops.test_few_rows import HOPPER, operands
from tests.ops.test_lowering import KERNEL
from tests.ops.test_lowest_within import K, logits_of

MESH = jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)
FEW = 256, 256, 1024, 768


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", True)


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "size", "window", "splits", "dtype"),
    [
        (3, 2, 1, 128, 70, 2, jnp.bfloat16),
        (5, 2, 2, 64, None, 1, jnp.bfloat16),
        (5, 16, 1, 64, None, 1, jnp.bfloat16),  # the new key is the seventeenth row
        (4, 4, 4, 64, 33, 1, jnp.float8_e4m3fn),
    ],
)
def test_attention(interpreted, rows, heads, kv_heads, size, window, splits, dtype):
    pool, table, draw = cache(rows, kv_heads, size, 4, dtype)
    start = draw.integers(0, 4 * PAGE, rows)
    start[:3] = [PAGE, PAGE - 1, 0]
    busy = np.arange(rows) != 2  # what is computed for an idle row means nothing
    place = Place(table, jnp.asarray(start, jnp.int32), jnp.asarray(busy, jnp.int32))
    given = numbers(20, rows, (heads + 2 * kv_heads) * size), rope_tables(place.start[:, None], size, 1e4), pool, place
    got, got_pool = jax.jit(attention.attend, static_argnums=(4, 5))(*given, window, splits)
    expected, expected_pool = attend_next.formula(*given, window)
    close(got[busy], expected[busy], atol=0.08 if dtype == jnp.bfloat16 else 0.3)
    for name in "kv":
        close(got_pool[name], expected_pool[name], atol=0.03 if dtype == jnp.bfloat16 else 0.5)
        changed = (np.asarray(got_pool[name] != pool[name])).any((1, 3))
        assert set(zip(*np.nonzero(changed), strict=True)) <= {
            (int(table[row, start[row] // PAGE]), int(start[row] % PAGE)) for row in np.flatnonzero(busy)
        }


@pytest.mark.parametrize("rows, shape", [(1, FEW), (2, (384, 128, 1536, 640))])
def test_the_relay(interpreted, rows, shape):
    given = operands(rows, *shape, jnp.bfloat16)
    mail, results = relay.mailbox(given[0], *given[2:]), []
    for layer in (0, 1, relay.TAGS):  # with an empty mailbox, and with one that others have used
        *result, mail = relay.relayed(*given, mail, jnp.int32(layer))
        results.append(result)
    formula = between_attentions.formula(*(array.astype(jnp.float32) for array in given))
    for got, expected in zip(results[0], formula, strict=True):
        close(got, expected, atol=0.02 * float(jnp.max(jnp.abs(expected))))
    for again in results[1:]:
        assert all(bool(jnp.all(one == other)) for one, other in zip(results[0], again, strict=True))
    assert bool(jnp.all(mail & 0xFF == 1))  # every word has the last layer's tag


def test_what_is_not_a_number_stays_so_in_the_mailbox(interpreted):
    given = operands(1, *FEW, jnp.bfloat16)
    given[1] = given[1].at[0, 3].set(jnp.nan)
    x, heads, _ = relay.relayed(*given, relay.mailbox(given[0], *given[2:]), jnp.int32(0))
    assert bool(jnp.isnan(x).all()) and bool(jnp.isnan(heads).all())


def test_what_the_relay_does_not_take(monkeypatch):
    few = operands(2, *FEW, jnp.bfloat16)
    assert relay.mailbox(few[0], *few[2:]) is None  # on a CPU
    monkeypatch.setattr(relay, "highest_level", lambda *_: Level.HOPPER)
    monkeypatch.setattr(relay, "multiprocessors", lambda: 132)
    assert relay.mailbox(few[0], *few[2:]) is not None
    for rows, width, hidden in ((3, 256, 1024), (2, 240, 1024), (2, 256, 133 * 128 + 32)):
        other = operands(rows, width, 256, hidden, 768, jnp.bfloat16)
        assert relay.mailbox(other[0], *other[2:]) is None
    assert relay.mailbox(few[0], few[2], few[3].astype(jnp.float32), *few[4:]) is None
    assert relay.mailbox(few[0], *few[2:5], Quantized(few[5].astype(jnp.int8), jnp.ones(768))) is None


@pytest.mark.parametrize("runs", [1, lowest_within.CHUNK + 3])
def test_where_top_k_and_top_p_cut(interpreted, runs):
    logits = logits_of(3, 3, runs, 2.0, False)
    tops = logits.max(-1)
    weights = jnp.where(logits > -1e29, jnp.round(jnp.exp(logits - tops[..., None]) * 2**24), 0).astype(jnp.uint32)
    flat = Mass(jnp.full_like(weights, 1 << 24), jnp.ones_like(tops))  # a run's sum is 2^31
    uneven = Mass(weights, jnp.exp(tops - tops.max(-1, keepdims=True)))
    for mass in (None, uneven, flat):
        whole = jnp.full(3, runs * K * 1.0) if mass is None else total_mass(logits, mass)
        for part in (0.01, 0.6):
            needed = jnp.ceil(part * whole)
            got = _from_bits(lowest_within.kernel(logits, mass, needed))
            np.testing.assert_array_equal(got, lowest(logits, mass, needed, on_cpu=True))
            some = lowest_within.kernel(logits, mass, needed.at[1].set(0))
            np.testing.assert_array_equal(_from_bits(some)[::2], got[::2])
            assert some[1] == 0  # the row does not ask


def test_all_are_lowered_for_a_gpu(monkeypatch):
    monkeypatch.setattr(relay, "highest_level", lambda *_: Level.HOPPER)
    few = operands(1, *FEW, jnp.bfloat16)
    pool, table, _ = cache(2, 2, 64, 2, jnp.bfloat16)
    place = Place(table, jnp.array([70, 3]), jnp.array([1, 1]))
    attended = numbers(3, 2, 6 * 64), rope_tables(place.start[:, None], 64, 1e4), pool, place
    logits = logits_of(0, 2, 3, 1.0, False)
    mass = Mass(jnp.ones(logits.shape, jnp.uint32), jnp.ones(logits.shape[:2]))
    with jax.sharding.use_abstract_mesh(MESH):
        mail = relay.mailbox(few[0], *few[2:])
        for function, shapes in (
            (lambda *given: attention.attend(*given, None, 1), attended),
            (relay.relayed.__wrapped__, (*few, mail, jnp.int32(0))),
            (lambda *given: lowest_within.kernel(*given), (logits, None, jnp.ones(2))),
            (lambda *given: lowest_within.kernel(*given), (logits, mass, jnp.ones(2))),
        ):
            program = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
            assert program.count(KERNEL) == 1


def test_the_comparison(capsys):
    assert decode_candidates.main(["--only", "products"]) == 0
    assert "| a layer | 1 |" in capsys.readouterr().out
    assert triton.INTERPRET is False
