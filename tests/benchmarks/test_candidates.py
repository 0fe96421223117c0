"""The candidate kernel against the plain formula, interpreted; on a GPU `benchmarks/decode_candidates.py` runs it."""

import decode_candidates
import jax
import jax.numpy as jnp
import pytest
from candidates import relay

from jaxchat.ops import triton
from jaxchat.ops.dispatch import Level
from jaxchat.ops.few_rows import between_attentions
from jaxchat.ops.linear import Quantized
from tests.ops.test_decode import close
from tests.ops.test_few_rows import HOPPER, operands
from tests.ops.test_lowering import KERNEL

MESH = jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)
FEW = 256, 256, 1024, 768


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", True)


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


def test_it_is_lowered_for_a_gpu(monkeypatch):
    monkeypatch.setattr(relay, "highest_level", lambda *_: Level.HOPPER)
    few = operands(1, *FEW, jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(MESH):
        shapes = *few, relay.mailbox(few[0], *few[2:]), jnp.int32(0)
        program = jax.jit(relay.relayed.__wrapped__).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert program.count(KERNEL) == 1


@pytest.mark.parametrize("part, line", [("products", "| a layer | 1 |"), ("steps", "| a step | 1 |")])
def test_the_comparison(capsys, part, line):
    assert decode_candidates.main(["--only", part]) == 0
    assert line in capsys.readouterr().out
    assert triton.INTERPRET is False
