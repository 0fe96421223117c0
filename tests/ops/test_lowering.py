"""On a machine without a GPU too, this version of JAX makes programs for one of the kernels: they are not run here."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxchat.ops import dispatch, hopper, lowering, triton
from jaxchat.ops.cross_entropy import cross_entropy_rows
from jaxchat.ops.dispatch import Level
from jaxchat.ops.linear import product_sum
from jaxchat.ops.mlp import add_mlp, relu_squared, relu_squared_gradient_product, relu_squared_product
from jaxchat.ops.norm import norm_branch
from jaxchat.ops.qkv import rope_norm_product
from jaxchat.ops.rope import rope_norm
from jaxchat.ops.stack import gram, stack_of, stack_product, symmetric_product

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
KERNEL = "__gpu$xla.gpu.triton"
PRODUCT = "mosaic_gpu_v2"
LENGTH, WIDTH, HEADS = 256, 384, 3


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


X, TABLE = array(2, LENGTH, WIDTH), array(1, LENGTH, 1, 64, dtype=jnp.float32)
SQUARE, UP, DOWN = array(WIDTH, WIDTH), array(WIDTH, 4 * WIDTH), array(4 * WIDTH, WIDTH)
HIDDEN_HEADS = array(2, LENGTH, HEADS, 128)
ROWS = 64


def loss(scores, targets):
    return cross_entropy_rows(scores, targets, 1000, 15.0)


def loss_with_entropy(scores, targets):
    return cross_entropy_rows(scores, targets, 1000, 15.0, with_entropy=True, dtype=jnp.bfloat16)


def loss_of_several(scores, targets, shares):
    return cross_entropy_rows(scores, targets, 1000, 15.0, shares=shares)


@pytest.mark.parametrize(
    "function, arguments, count",
    [
        (norm_branch, [X], 2),
        (rope_norm, [HIDDEN_HEADS, TABLE, TABLE], 2),
        (relu_squared, [X], 2),
        (partial(add_mlp, fp8=True), [X, UP, DOWN], 5),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_kernels_and_their_gradients(monkeypatch, function, arguments, count):
    monkeypatch.setattr(dispatch, "highest_level", lambda _, fp8=False: Level.FP8 if fp8 else Level.TRITON)

    def forward_and_back(*arguments):
        result, pull = jax.vjp(function, *arguments)
        return result, pull(result)

    assert lowered(forward_and_back, arguments).count(KERNEL) >= count


@pytest.mark.parametrize(
    "function, arguments",
    [
        (loss, [array(ROWS, 1024), array(ROWS, dtype=jnp.int32)]),
        (loss_with_entropy, [array(ROWS, 1024, dtype=jnp.float32), array(ROWS, dtype=jnp.int32)]),
        (loss_of_several, [array(ROWS, 1024), array(ROWS, 3, dtype=jnp.int32), array(ROWS, 3, dtype=jnp.float32)]),
        (stack_of(3), [SQUARE] * 3),
    ],
    ids=["loss", "loss with entropy", "loss of several targets", "stack"],
)
def test_kernels_without_a_gradient(monkeypatch, function, arguments):
    monkeypatch.setattr(triton, "INTERPRET", False)
    assert lowered(function, arguments).count(KERNEL) == 1


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.parametrize(
    "function, arguments, count",
    [
        (relu_squared_product, [X, UP], 1),
        (relu_squared_gradient_product, [X, UP, array(2, LENGTH, 4 * WIDTH)], 1),
        (product_sum(2), [X, array(512, WIDTH), X, array(512, WIDTH)], 1),
        (rope_norm_product, [X, array(WIDTH, 4, 128), array(LENGTH, 256)], 1),
        (lambda x: gram(x, False), [array(2, 256, 512)], 1),
        (lambda x: gram(x, True), [array(2, 512, 256)], 1),
        (lambda x, y: symmetric_product(x, y, 2.0, -5.0), [array(2, 256, 256), array(2, 256, 256)], 1),
        (stack_product, [array(2, 256, 256), array(2, 256, 512)], 1),
    ],
    ids=["relu2", "relu2's gradient", "sum", "heads", "gram, wide", "gram, tall", "symmetric", "stacks"],
)
def test_products(monkeypatch, function, arguments, count):
    monkeypatch.setattr(dispatch, "capability", lambda: 9.0)
    assert lowered(function, arguments).count(PRODUCT) == count


@pytest.fixture
def kept_programs(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_kernel_is_lowered_once_for_all_processes(monkeypatch, kept_programs):
    monkeypatch.setattr(triton, "INTERPRET", False)
    monkeypatch.setattr(lowering, "_lowered", {})
    lower, made = lowering._lower, []
    monkeypatch.setattr(lowering, "_lower", lambda key, *rest: made.append(key) or lower(key, *rest))

    def copy(factor):
        def kernel(x_ref, y_ref):
            index = jnp.arange(64)
            triton.store(y_ref, index, factor * triton.load(x_ref, index))

        return triton.launch(kernel, (1,), [array(64)], warps=1)

    def program(factor):
        call = copy(factor)
        return lowered(lambda x: [lowering.lowered_once(call, [x], KERNEL) for _ in range(3)], [array(64)])

    assert KERNEL in program(2.0) and len(made) == 1
    program(3.0)
    assert len(set(made)) == 2  # another kernel, though of the same name and shapes
    lowering._lowered.clear()  # as another process
    assert KERNEL in program(2.0) and len(made) == 2
    for file in (kept_programs / "kernels").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    lowering._lowered.clear()
    assert KERNEL in program(2.0) and made[2:] == made[:1]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_kernel_is_lowered_for_a_device_s_part_not_for_what_several_share(monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda: 9.0)
    monkeypatch.setattr(lowering, "_lowered", {})
    monkeypatch.setattr(lowering, "_lower", lambda *_: pytest.fail("lowered"))
    product = product_sum(2)

    def part(*operands):
        return hopper.product([operands[:2], operands[2:]], flipped=True)

    operands = [X, array(512, WIDTH), X, array(512, WIDTH)]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)):
        jax.eval_shape(product, *operands)
        with pytest.raises(pytest.fail.Exception, match="lowered"):
            jax.eval_shape(part, *operands)


def lowered(function, arguments):
    """The program for the GPU, as text."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (KERNEL, PRODUCT)]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)
        return exported(*arguments).mlir_module()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this JAX cannot trace the kernel")
def test_kernels_differ_by_what_their_code_takes_from_outside(monkeypatch):
    """A number within the code of a thread is in no trace."""
    monkeypatch.setattr(lowering, "multiprocessors", lambda: 132)
    of_threads, seen = plgpu.Layout.WG_STRIDED((128,), vec_size=1), []
    monkeypatch.setattr(lowering, "_lower", lambda key, *_: seen.append(key) or jax.export.export(jax.jit(jnp.sin))(x))
    x = jnp.zeros(128)

    def times(factor):
        def scaled(x):
            return x * factor

        def body(x, result):
            @plgpu.inline_mgpu(
                arg_types=(of_threads,), return_type=plgpu.ShapeDtypeStruct((128,), jnp.float32, layout=of_threads)
            )
            def product(_, x):
                return scaled(x)

            result[...] = product(plgpu.load(x, layout=of_threads, optimized=False))

        return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((128,), jnp.float32))

    for factor in (2.0, 3.0, 2.0):
        lowering.lowered_once(times(factor), [x], PRODUCT)
    assert len(seen) == len(set(seen)) == 2
