"""Products of a few rows: their formulas against NumPy, and the kernel against the formulas where there is a Hopper GPU
(`JAX_PLATFORMS=cuda pytest tests/ops`). Elsewhere this version of JAX lowers the kernels, which are not run."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxchat.config import MeshConfig
from jaxchat.devices.gpu import capability
from jaxchat.devices.mesh import make_mesh
from jaxchat.ops import dispatch, few_rows, one_row
from jaxchat.ops.decode import Splits
from jaxchat.ops.dispatch import Level
from jaxchat.ops.few_rows import after_attention, between_attentions, decode_block, new_counters, norm_product
from jaxchat.ops.one_row_attention import Share
from jaxchat.ops.pages import PAGE, Place
from jaxchat.ops.product_chain import COUNTERS
from jaxchat.ops.rope import rope_tables
from jaxchat.ops.warpgroup import NOTHING

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def draw(seed, *shape, dtype=jnp.float32):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x / (shape[0] ** 0.5 if seed > 1 else 1), dtype)


def operands(rows, width, attention, hidden, heads, dtype=jnp.float32):
    """x, mixed, o, up, down and the next block's joint matrix."""
    shapes = [(rows, width), (rows, attention), (attention, width), (width, hidden), (hidden, width), (width, heads)]
    return [draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]


def split(mixed):
    """Three splits of attention, whose values these are."""
    weights = jnp.asarray([0.5, 0.0, 3.0])[:, None, None] + jnp.arange(mixed.shape[1]) / mixed.shape[1]
    rest = jnp.asarray([1.0, -0.25, -0.75])[:, None, None]
    return Splits(jnp.broadcast_to(weights, (3, *mixed.shape)), mixed.astype(jnp.float32) * weights + rest)


def norm(x):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)


def test_the_formulas():
    arrays = operands(3, 8, 6, 20, 10)
    x, mixed, o, up, down, joint = (np.asarray(array, np.float64) for array in arrays)
    between = x + mixed @ o
    after = between + np.maximum(norm(between) @ up, 0) ** 2 @ down
    counters = new_counters(1, arrays[0], *arrays[2:4])
    np.testing.assert_allclose(norm_product(arrays[0], arrays[5]), norm(x) @ joint, atol=1e-5)
    for attended in (arrays[1], split(arrays[1])):
        got, same = after_attention(arrays[0], attended, *arrays[2:5], counters, 0)
        assert same is counters
        np.testing.assert_allclose(got, after, atol=1e-5)
        *results, same = between_attentions(arrays[0], attended, *arrays[2:], counters, 0)
        assert same is counters
        for got, expected in zip(results, (after, norm(after) @ joint), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-4)


def layers(x, mixed, o, up, down, joint, shared=True):
    """Four layers and their counters. The third is not between two attentions; to it and the second come splits."""
    counters, results = new_counters(4, x, o, up), []
    for layer in range(4):
        if layer in (1, 2):
            mixed = split(mixed)
        if not shared:
            counters, layer = new_counters(1, x, o, up), 0
        if len(results) == 4:
            x, counters = after_attention(x, mixed, o, up, down, counters, layer)
            heads = norm_product(x, joint)
        else:
            x, heads, counters = between_attentions(x, mixed, o, up, down, joint, counters, layer)
        mixed = heads[:, : len(o)]
        results += [x, heads]
    return results, counters


def steps(*given):
    """Two steps, each with counters that its layers share."""
    return jax.lax.scan(lambda carry, _: (carry, layers(*carry)), given, length=2)[1]


@pytest.mark.gpu
@pytest.mark.skipif(capability() != 9.0, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "rows, width, attention, hidden, heads",
    [
        (1, 256, 256, 1024, 768), (1, 384, 128, 1536, 640), (1, 512, 1024, 2560, 1536), (1, 1280, 1280, 5120, 3840),
        (5, 384, 128, 1536, 640), (32, 1280, 1280, 5120, 3840), (64, 512, 1024, 2048, 1536),
    ],
)  # fmt: skip
def test_the_kernel(rows, width, attention, hidden, heads):
    arrays = operands(rows, width, attention, hidden, heads, jnp.bfloat16)
    in_splits = [arrays[0], split(arrays[1]), *arrays[2:]]
    counters = new_counters(3, arrays[0], *arrays[2:4])
    for operation, given, more in (
        (norm_product, (arrays[0], arrays[5]), ()),
        (after_attention, arrays[:5], (counters, 0)), (after_attention, in_splits[:5], (counters, 1)),
        (between_attentions, arrays, (counters, 2)), (between_attentions, in_splits, (counters, 0)),
    ):  # fmt: skip
        assert operation.choose(*given, *more) is not operation.formula

        def floats(results):
            return [array for array in jax.tree.leaves(results) if array.dtype != jnp.int32]

        results = floats(jax.jit(operation)(*given, *more))
        formula = floats(operation.formula(*jax.tree.map(lambda array: array.astype(jnp.float32), given), *more))
        for got, expected in zip(results, formula, strict=True):
            largest = float(jnp.max(jnp.abs(expected)))
            np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.02 * largest)
        again = floats(jax.jit(operation)(*given, *more))
        assert all(bool(jnp.all(one == other)) for one, other in zip(results, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(capability() != 9.0, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [1, 32])
def test_layers_that_share_counters(rows):
    given = operands(rows, 1280, 1280, 5120, 3840, jnp.bfloat16)
    results, counters = jax.jit(steps)(*given)
    alone, _ = jax.jit(functools.partial(layers, shared=False))(*given)
    for step in range(2):
        for number, expected in enumerate(alone):
            np.testing.assert_array_equal(results[number][step], expected, err_msg=f"{step}, {number}")
        counted, more = counters[step, :, :3].tolist(), int(counters[step, :, 3:COUNTERS].max())
        if rows == 1:  # nobody counts; how many have left what others read
            assert not counters[step, :, :COUNTERS].any()
            left = (counters[step, :, COUNTERS:] != NOTHING).sum(1).tolist()
            assert left == [5 * 1280 + 5120 + 4 * 1280] * 4
        else:
            assert counted == [[20, 80, 20], [20, 80, 20], [20, 80, 0], [20, 80, 20]]  # nobody waits for the last
            assert more == 3  # the parts of down that its last part waits for


SIZE = 128  # of a head


def block(seed, heads, width, hidden):
    """A block's x and heads of one row, and its o, up and down, with the next block's joint matrix."""
    x, mixed, *weights = operands(1, width, heads * SIZE, hidden, 3 * heads * SIZE, jnp.bfloat16)
    return x, draw(seed, 1, 3 * heads * SIZE, dtype=jnp.bfloat16), weights


def pool(heads, start, window, unseen):
    """Pages whose tokens that a row does not see are `unseen`, and the row's place."""
    count = start // PAGE + 1
    table = np.random.default_rng(3).permutation(count + 2)[:count]
    position = np.full((count + 2) * PAGE, -1)
    position.reshape(-1, PAGE)[table] = np.arange(count * PAGE).reshape(-1, PAGE)
    seen = (position >= (0 if window is None else start - window)) & (position >= 0) & (position < start)
    seen = jnp.asarray(seen.reshape(-1, 1, PAGE, 1))
    pages = {name: draw(i, count + 2, heads, PAGE, SIZE, dtype=jnp.bfloat16) for i, name in enumerate("kv")}
    table = np.pad(table, (0, 5), constant_values=table[0])[None]
    place = Place(jnp.asarray(table, jnp.int32), jnp.array([start], jnp.int32), jnp.array([1], jnp.int32))
    return {name: jnp.where(seen, array, unseen) for name, array in pages.items()}, place


@pytest.mark.gpu
@pytest.mark.skipif(capability() != 9.0, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "heads, start, window, scale",
    [
        (2, 0, None, 1.0), (2, 63, None, 1.44), (4, 64, None, 1.0), (10, 700, None, 1.0), (10, 2047, None, 1.44),
        (10, 2047, 500, 1.0), (10, 300, 1, 1.0), (6, 1500, 64, 1.44), (22, 130, None, 1.0),
    ],
)  # fmt: skip
def test_a_block_of_one_row_with_its_attention(heads, start, window, scale):
    """By one kernel, which adds nothing of what the row does not see."""
    width, hidden = 1280, 2560
    x, joint, (o, up, down, following) = block(4, heads, width, hidden)
    identity = jnp.eye(heads * SIZE, width, dtype=jnp.bfloat16)
    clean, place = pool(heads, start, window, 0.0)
    counters = new_counters(2, x, o, up)
    dirty, _ = pool(heads, start, window, jnp.nan)
    rope = rope_tables(place.start[:, None], SIZE, 10_000.0)

    def run(function, pages, x, o, down, following):
        return function(x, joint, rope, pages, place, window, scale, o, up, down, following, counters, 1)

    # The last of these has attention's values alone as its result.
    for given in ((x, o, down, following), (x, o, down, None), (0 * x, identity, 0 * down, None)):
        chosen = run(decode_block.choose, dirty, *given)
        assert chosen is not decode_block.formula
        got = jax.jit(functools.partial(run, chosen))(dirty, *given)
        expected = jax.jit(functools.partial(run, decode_block.formula))(clean, *given)
        for one, other in zip(got[:2], expected[:2], strict=True):
            if other is not None:
                largest = float(jnp.max(jnp.abs(other)))
                np.testing.assert_allclose(
                    np.asarray(one, np.float32), np.asarray(other, np.float32), atol=0.02 * largest
                )
        page, slot = int(place.table[0, start // PAGE]), start % PAGE
        for name in "kv":
            own = np.asarray(got[2][name][page, :, slot], np.float32)
            np.testing.assert_allclose(own, np.asarray(expected[2][name][page, :, slot], np.float32), atol=0.03)
            kept = got[2][name].at[page, :, slot].set(dirty[name][page, :, slot])
            np.testing.assert_array_equal(np.asarray(kept, np.float32), np.asarray(dirty[name], np.float32))


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    start=st.integers(0, 5000), window=st.one_of(st.none(), st.integers(1, 3000)), splits=st.integers(1, 16)
)
@hypothesis.example(start=0, window=None, splits=16)
@hypothesis.example(start=128, window=64, splits=2)
def test_blocks_share_the_keys_that_a_row_sees(start, window, splits):
    """Each of them is one block's, and the new token's page too."""

    def shares(active):
        of = functools.partial(Share.of, jnp.int32(start), jnp.bool(active), window, splits=splits)
        return np.stack(jax.vmap(lambda split: of(split=split))(jnp.arange(splits)), 1)

    seen, owners = [], 0
    for begin, end, low, high, owns in shares(True):
        seen += [key for key in range(begin * PAGE, max(begin, end) * PAGE) if low <= key < high]
        owners += owns
        assert not owns or begin <= start // PAGE < end
    assert seen == list(range(0 if window is None else max(0, start - window), start))
    assert owners == 1
    assert all(begin >= end and not owns for begin, end, *_, owns in shares(False))  # an idle row has no pages


@pytest.mark.gpu
@pytest.mark.skipif(capability() != 9.0, reason="needs a Hopper GPU")
def test_an_idle_row_writes_nothing():
    x, joint, (o, up, down, following) = block(4, 10, 1280, 5120)
    pages, place = pool(10, 700, None, 0.0)
    place = place._replace(count=jnp.zeros(1, jnp.int32), start=jnp.array([10_000], jnp.int32))
    rope = rope_tables(place.start[:, None], SIZE, 10_000.0)
    given = x, joint, rope, pages, place, None, 1.0, o, up, down, following, new_counters(1, x, o, up), 0
    assert decode_block.choose(*given) is not decode_block.formula
    _, _, got, _ = jax.jit(lambda pages: decode_block(*given[:3], pages, *given[4:]))(pages)
    for name in "kv":
        np.testing.assert_array_equal(np.asarray(got[name], np.float32), np.asarray(pages[name], np.float32))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this JAX cannot lower the kernel")
@pytest.mark.parametrize("rows, parts", [(1, {}), (5, {}), (24, {}), (5, {"o": 2, "up": 2, "down": 8, "joint": 2})])
def test_the_kernel_is_lowered(monkeypatch, rows, parts):
    monkeypatch.setattr(dispatch, "highest_level", lambda *_, **__: Level.HOPPER)
    monkeypatch.setattr(few_rows, "PARTS", few_rows.PARTS | parts)
    jax.clear_caches()  # of traces with other parts
    arrays = operands(rows, 256, 512, 1024, 768, jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)):
        text = jax.jit(steps).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@mosaic_gpu_v2(" in line]
    # The three kernels; for one row, that between two attentions with and without splits. Those that count do so in
    # memory that they get and pass on.
    kernels = {kernel for call in calls for kernel in re.findall('kernel_hash = "(.*?)", module', call)}
    assert len(kernels) == (4 if rows == 1 else 3)
    counting = [call for call in calls if "output_operand_aliases = [#" in call]
    memory = new_counters(4, arrays[0], *arrays[2:4])
    assert (memory.shape[1] == COUNTERS) == (rows > 1)
    assert [f"tensor<4x{memory.shape[1]}xi32>)" in call for call in calls] == [call in counting for call in calls]
    assert len(calls) == len(counting) + 1  # norm_product's
    assert sum("tensor<3x512xf32>" in call for call in calls) == (2 if rows == 1 else 0)  # splits


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this JAX cannot lower the kernel")
def test_attention_is_lowered_with_the_products(monkeypatch):
    monkeypatch.setattr(dispatch, "highest_level", lambda *_, **__: Level.HOPPER)
    x, joint, (o, up, down, following) = block(4, 2, 256, 1024)
    pages, place = pool(2, 100, None, 0.0)
    rope = rope_tables(place.start[:, None], SIZE, 10_000.0)

    def run(pages, after, scale):
        counters = new_counters(1, x, o, up)
        return decode_block(x, joint, rope, pages, place, None, scale, o, up, down, after, counters, 0)

    kernels = set()
    for after, scale in ((following, 1.0), (None, 1.0), (None, 1.44)):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)):
            text = jax.jit(functools.partial(run, scale=scale)).trace(pages, after).lower(lowering_platforms=("cuda",))
        (call,) = [line for line in text.as_text().splitlines() if "@mosaic_gpu_v2(" in line]
        assert call.count("#stablehlo.output_operand_alias<") == 3  # of keys, values and counters
        kernels.update(re.findall('kernel_hash = "(.*?)", module', call))
    assert len(kernels) == 3


def test_what_attention_in_the_kernel_is_not_for(monkeypatch):
    monkeypatch.setattr(dispatch, "highest_level", lambda *_, **__: Level.HOPPER)
    monkeypatch.setattr("jaxchat.ops.few_rows.multiprocessors", lambda: 132)
    monkeypatch.setattr("jaxchat.ops.product_chain.multiprocessors", lambda: 132)
    monkeypatch.setattr("jaxchat.ops.one_row.multiprocessors", lambda: 132)
    x, joint, weights = block(4, 2, 256, 1024)
    pages, place = pool(2, 100, None, 0.0)

    def chosen(joint=joint, pages=pages, scale=1.0, x=x):
        given = x, joint, None, pages, place, None, scale, *weights, new_counters(1, x, *weights[:2]), 0
        return decode_block.choose(*given) is not decode_block.formula

    assert chosen()
    assert not chosen(scale=8.0)  # exponentials would overflow
    assert not chosen(joint=joint[:, : 4 * SIZE], pages={name: array[:, :1] for name, array in pages.items()})  # groups
    assert not chosen(pages={name: array.astype(jnp.float8_e4m3fn) for name, array in pages.items()})
    assert not chosen(x=jnp.repeat(x, 2, 0))


def test_what_the_kernel_does_not_take(monkeypatch):
    monkeypatch.setattr(dispatch, "highest_level", lambda *_, **__: Level.HOPPER)
    monkeypatch.setattr("jaxchat.ops.few_rows.multiprocessors", lambda: 132)
    few = operands(2, 256, 256, 1024, 768, jnp.bfloat16)
    assert between_attentions.choose(*few, new_counters(1, few[0], *few[2:4]), 0) is not between_attentions.formula
    for rows, width, hidden in ((65, 256, 1024), (2, 192, 1024), (2, 256, 133 * 64)):
        given = operands(rows, width, 256, hidden, 768, jnp.bfloat16)
        assert (
            between_attentions.choose(*given, new_counters(1, given[0], *given[2:4]), 0) is between_attentions.formula
        )


@pytest.mark.parametrize(
    "rows, width, attention, alone",
    [(1, 256, 256, True), (2, 256, 256, False), (1, 384, 256, False), (1, 256, 128, False)],
)
def test_one_row_has_a_kernel_of_its_own_where_threads_can_read_it_in_pairs(monkeypatch, rows, width, attention, alone):
    monkeypatch.setattr(dispatch, "highest_level", lambda *_, **__: Level.HOPPER)
    monkeypatch.setattr(few_rows, "multiprocessors", lambda: 132)
    taken = []

    def take(x, mixed, *_):
        taken.append([array.shape for array in jax.tree.leaves(mixed)])
        return (x,)

    monkeypatch.setattr(*((one_row, "row_chain") if alone else (few_rows, "_several_rows")), take)
    x, mixed, *weights = operands(rows, width, attention, 1024, 768, jnp.bfloat16)
    for attended in (mixed, split(mixed)):
        counters = new_counters(1, x, *weights[:2])
        after_attention(x, attended, *weights[:3], counters, 0)
        between_attentions(x, attended, *weights, counters, 0)
    one = [(rows, attention)]
    splits = [(3, rows, attention)] * 2 if alone else one
    assert taken == [one, one, splits, splits]


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_weights_that_are_split_over_devices_stay_with_the_compiler(monkeypatch):
    monkeypatch.setattr(dispatch, "highest_level", lambda *_, **__: Level.HOPPER)
    monkeypatch.setattr("jaxchat.ops.few_rows.multiprocessors", lambda: 132)
    given = operands(2, 256, 256, 1024, 768, jnp.bfloat16)
    chosen = []

    def choose(*arrays):
        chosen.append(
            between_attentions.choose(*arrays, new_counters(1, arrays[0], *arrays[2:4]), 0)
            is not between_attentions.formula
        )
        return arrays

    for tensor, kernel in ((1, True), (2, False)):
        mesh = make_mesh(MeshConfig(data=4 // tensor, tensor=tensor), jax.devices()[:4])
        manual = {"data", "fsdp", "tensor"} if tensor == 1 else {"data", "fsdp"}
        jax.eval_shape(
            jax.shard_map(choose, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=manual, check_vma=False), *given
        )
        assert chosen.pop() == kernel
