"""The candidate kernels against plain formulas, interpreted where that is possible, and their comparison, run dry."""

import os

import decode_candidates
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from candidates import attention, chain, measures, relay, shares
from candidates.variants import ATTENTION, IN_USE, PRODUCTS, STEPS, VARIANTS

from jaxchat.ops import decode, dispatch, triton
from jaxchat.ops.dispatch import Level
from jaxchat.ops.few_rows import between_attentions
from jaxchat.ops.linear import Quantized
from jaxchat.ops.pages import PAGE, Place
from jaxchat.ops.rope import rope_tables
from tests.ops.test_decode import close
from tests.ops.test_few_rows import HOPPER, operands
from tests.ops.test_lowering import KERNEL

MESH = jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)
FEW = 256, 256, 1024, 768


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", True)


def assert_right(results, given):
    """All of the results are the same, and what the plain formula says."""
    formula = between_attentions.formula(*(array.astype(jnp.float32) for array in given))
    for got, expected in zip(results[0], formula, strict=True):
        close(got, expected, atol=0.02 * float(jnp.max(jnp.abs(expected))))
    for again in results[1:]:
        assert all(bool(jnp.all(one == other)) for one, other in zip(results[0], again, strict=True))


@pytest.mark.parametrize("rows, shape", [(1, FEW), (2, (384, 128, 1536, 640))])
def test_the_relay(interpreted, rows, shape):
    given = operands(rows, *shape, jnp.bfloat16)
    mail, results = relay.mailbox(given[0], *given[2:]), []
    for layer in (0, 1, relay.TAGS):  # with an empty mailbox, and with one that others have used
        *result, mail = relay.relayed(*given, mail, jnp.int32(layer))
        results.append(result)
    assert_right(results, given)
    assert bool(jnp.all(mail & 0xFF == 1))  # every word has the last layer's tag


@pytest.mark.parametrize("by_rows, ahead", [(True, 1), (False, 0), (True, 2)])
def test_the_relay_in_equal_shares(interpreted, monkeypatch, by_rows, ahead):
    for name, value in (("UP_BY_ROWS", by_rows), ("DOWN_AHEAD", ahead), ("JOINT_AHEAD", ahead)):
        monkeypatch.setattr(shares, name, value)
    jax.clear_caches()
    given = operands(1, *FEW, jnp.bfloat16)
    mail, results = shares.mailbox(*given[2:]), []
    for tag in (1, 2, 255):  # with an empty mailbox, and with one that others have used
        *result, mail = shares.shared(*given, mail, jnp.int32(tag))
        results.append(result)
    assert_right(results, given)
    assert bool(jnp.all(mail & 0xFF == 255))  # every word has the last tag


def test_what_has_equal_shares(interpreted):
    shapes = (1280, 1280), (1280, 5120), (5120, 1280), (1280, 3840)
    o, up, _, joint = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    plan = shares._plan(o, up, joint)
    assert (plan.parts, plan.tiles, plan.units, plan.places, plan.blocks) == (5, 20, 100, 256, 4)
    narrow = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((768, 256), (768, 3072), (768, 2304))]
    with pytest.raises(ValueError, match="768"):
        shares._plan(*narrow)


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


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this JAX cannot lower the kernel")
@pytest.mark.parametrize("ahead", [0, 200_000])
def test_the_chain_is_lowered(monkeypatch, ahead):
    monkeypatch.setattr(dispatch, "highest_level", lambda *_, **__: Level.HOPPER)
    monkeypatch.setattr(chain, "AHEAD", ahead)
    jax.clear_caches()
    given = operands(5, *FEW, jnp.bfloat16)

    def two_layers(positions, *given):
        counters = chain.new_counters(positions)
        x, heads = chain.between_attentions(*given, counters, 0, given[2:5])
        return chain.between_attentions(x, heads[:, :256], *given[2:], counters, 1, given[2:5])

    with jax.sharding.use_abstract_mesh(MESH):
        text = jax.jit(two_layers).trace(jnp.zeros(5, jnp.int32), *given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2


def test_how_much_the_chain_looks_ahead(monkeypatch):
    weights = [jnp.zeros(shape, jnp.bfloat16) for shape in ((256, 256), (256, 1024))]
    for slots, expected in ((0, [0, 0]), (3, [3, 0]), (11, [8, 3]), (99, [8, 32])):
        monkeypatch.setattr(chain, "AHEAD", slots * 128 * 64 * 2 + 5)
        assert chain._slots(weights) == expected


@pytest.mark.parametrize(
    "rows, kv_heads, group, pages, warm", [(1, 2, 1, 5, 0), (2, 2, 3, 4, 3 << 14), (32, 8, 1, 2, 3 << 14)]
)
def test_attention_that_adds_up(interpreted, monkeypatch, rows, kv_heads, group, pages, warm):
    monkeypatch.setattr(attention, "WARM", warm)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    joint = draw(rows, kv_heads * (group + 2) * 64)
    pool = {name: draw(rows * pages, kv_heads, PAGE, 64) for name in "kv"}
    start = jnp.full(rows, PAGE * pages - 9, jnp.int32)
    table = jnp.asarray(rng.permutation(rows * pages).reshape(rows, pages), jnp.int32)
    place = Place(table, start, jnp.ones(rows, jnp.int32))
    rope = rope_tables(start[:, None], 64, 10_000.0)
    expected, pages_then = decode.attend(joint, rope, pool, place, None, decode.splits_of(rows, kv_heads))
    counters = attention.arrivals(rows, kv_heads)
    for _ in range(2):  # with new counters, and with used ones
        got, written, counters = attention.attend(
            joint, rope, pool, place, None, 1.0, counters, [jnp.ones((128, 128)), jnp.ones((64, 256))]
        )
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(written["k"], pages_then["k"])


def test_what_attention_warms(monkeypatch):
    weights = [jnp.zeros(shape, jnp.bfloat16) for shape in ((1280, 1280), (1280, 5120), (5120, 1280))]
    for megabytes in (1, 10, 20):
        monkeypatch.setattr(attention, "WARM", megabytes << 20)
        shares = attention._shares(weights)
        assert sum(share.programs for share in shares) <= attention.WARMERS
        read = [2 * share.programs * share.steps * attention.AT_ONCE for share in shares]
        assert 0.97 * attention.WARM < sum(read) <= attention.WARM
        assert all(size <= 2 * weight.size for size, weight in zip(read, weights, strict=False))


def test_constants_of_variants_are_those_of_modules():
    for variant in (*PRODUCTS.values(), *ATTENTION.values(), *STEPS.values()):
        with measures.applied(variant):
            pass
    assert all(next(iter(variants)) == IN_USE for variants in VARIANTS.values())


def test_the_comparison(capsys):
    """In the processes that it runs on a GPU too."""
    chosen = "chain + adds up", "adds up, warms 10 MB"
    command = ["--rows", "1", "--only", "attention", "step", "--processes", "2", "--limit", "60", "--variants", *chosen]
    assert decode_candidates.main(command) == 0
    told = capsys.readouterr()
    for line in ("| attention | 1 | adds up, warms 10 MB |", "| step | 1 | chain + adds up |", "| step | 1 | in use |"):
        assert line in told.out
    assert "programs compiled" in told.err


def test_right_and_wrong_products(capsys, monkeypatch):
    before = triton.INTERPRET
    tasks = [["check", "relay", 1], ["products", "o in 5 parts", 1], ["check", "no such variant", 1], ["step", "x", 1]]
    try:
        assert decode_candidates._work("time", [tuple(task) for task in tasks]) == 1
    finally:
        triton.INTERPRET = before
    right, timed, wrong = map(decode_candidates.json.loads, capsys.readouterr().out.splitlines())
    assert right["difference"] < 1e-3 and "time" not in right
    assert timed["time"] > 0 and timed["difference"] == 0
    assert "no such variant" in wrong["error"]  # and the process does not go on
    monkeypatch.setitem(decode_candidates.ALLOWED, "check", -1.0)
    assert decode_candidates._print("check", [1], {("check", "relay", 1): right}) == 1
    assert "WRONG" in capsys.readouterr().out


def test_one_that_hangs_does_not_keep_the_others(monkeypatch):
    tasks = [("check", IN_USE, 1), ("check", "relay", 1)]
    assert list(decode_candidates._lines("time", tasks, dict(os.environ), 0.01)) == [{"error": "not done in 0 s"}]
    calls = []

    def lines(work, left, environment, limit):
        calls.append(list(left))
        yield {"error": "not done"} if len(calls) == 1 else {"difference": 0.0}

    monkeypatch.setattr(decode_candidates, "_lines", lines)
    found = decode_candidates._measure(tasks, {}, 1)
    assert calls == [tasks, tasks[1:]] and found[tasks[1]] == {"difference": 0.0}


def test_a_profile(capsys):
    before = triton.INTERPRET
    try:
        assert decode_candidates._work("profile", [("step", IN_USE, 1)]) == 0
    finally:
        triton.INTERPRET = before
    text = decode_candidates.json.loads(capsys.readouterr().out)["text"]
    assert "1 rows:" in text and "µs a step, idle" in text and "| all others | |" in text
