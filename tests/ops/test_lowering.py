"""On a machine without a GPU too, this version of JAX makes programs for one of the kernels: they are not run here."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxchat.ops import fp8, gpu, hopper, kernels, programs

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
KERNEL = "__gpu$xla.gpu.triton"
PRODUCT = "mosaic_gpu_v2"
LENGTH, WIDTH, HEADS = 256, 384, 3


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


X, TABLE = array(2, LENGTH, WIDTH), array(LENGTH, 64, dtype=jnp.float32)
SQUARE, UP, DOWN = array(WIDTH, WIDTH), array(WIDTH, 4 * WIDTH), array(4 * WIDTH, WIDTH)
HIDDEN_HEADS = array(2, LENGTH, HEADS, 128)
ROWS = 64


def loss(scores, targets):
    return kernels.cross_entropy_rows(scores, targets, 1000, 15.0)


@pytest.mark.parametrize(
    "function, arguments, count",
    [
        (kernels.norm_branch, [X], 2),
        (kernels.rope_norm, [HIDDEN_HEADS, TABLE, TABLE], 2),
        (kernels.relu_squared, [X], 2),
        (fp8.add_mlp, [X, UP, DOWN], 5),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_kernels_and_their_gradients(monkeypatch, function, arguments, count):
    monkeypatch.setattr(gpu, "INTERPRET", False)

    def forward_and_back(*arguments):
        result, pull = jax.vjp(function, *arguments)
        return result, pull(result)

    assert lowered(forward_and_back, arguments).count(KERNEL) >= count


@pytest.mark.parametrize(
    "function, arguments",
    [(loss, [array(ROWS, 1024), array(ROWS, dtype=jnp.int32)]), (kernels._stack(3), [SQUARE] * 3)],
    ids=["loss", "stack"],
)
def test_kernels_without_a_gradient(monkeypatch, function, arguments):
    monkeypatch.setattr(gpu, "INTERPRET", False)
    assert lowered(function, arguments).count(KERNEL) == 1


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.parametrize(
    "function, arguments, count",
    [
        (hopper.relu_squared_product, [X, UP], 1),
        (hopper.relu_squared_gradient_product, [X, UP, array(2, LENGTH, 4 * WIDTH)], 1),
        (hopper.product_sum(2), [X, array(512, WIDTH), X, array(512, WIDTH)], 1),
        (hopper.rope_norm_product, [X, array(WIDTH, 4, 128), array(LENGTH, 256)], 1),
        (partial(hopper.gram, tall=False), [array(2, 256, 512)], 1),
        (partial(hopper.gram, tall=True), [array(2, 512, 256)], 1),
        (partial(hopper.symmetric_product, a=2.0, b=-5.0), [array(2, 256, 256), array(2, 256, 256)], 1),
        (hopper.stack_product, [array(2, 256, 256), array(2, 256, 512)], 1),
    ],
    ids=["relu2", "relu2's gradient", "sum", "heads", "gram, wide", "gram, tall", "symmetric", "stacks"],
)
def test_products(monkeypatch, function, arguments, count):
    monkeypatch.setattr(hopper, "capability", lambda: 9.0)
    assert lowered(function, arguments).count(PRODUCT) == count


@pytest.fixture
def kept_programs(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_kernel_is_lowered_once_for_all_processes(monkeypatch, kept_programs):
    monkeypatch.setattr(gpu, "INTERPRET", False)
    monkeypatch.setattr(programs, "_LOWERED", {})
    lower, made = programs._lower, []
    monkeypatch.setattr(programs, "_lower", lambda key, *rest: made.append(key) or lower(key, *rest))

    def copy(factor):
        def kernel(x_ref, y_ref):
            index = jnp.arange(64)
            gpu.store(y_ref, index, factor * gpu.load(x_ref, index))

        return gpu.launch(kernel, (1,), [array(64)], warps=1)

    def program(factor):
        call = copy(factor)
        return lowered(lambda x: [programs.lowered_once(call, [x], KERNEL) for _ in range(3)], [array(64)])

    assert KERNEL in program(2.0) and len(made) == 1
    program(3.0)
    assert len(set(made)) == 2  # another kernel, though of the same name and shapes
    programs._LOWERED.clear()  # as another process
    assert KERNEL in program(2.0) and len(made) == 2
    for file in (kept_programs / "kernels").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    programs._LOWERED.clear()
    assert KERNEL in program(2.0) and made[2:] == made[:1]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_kernel_is_lowered_for_a_device_s_part_not_for_what_several_share(monkeypatch):
    monkeypatch.setattr(hopper, "capability", lambda: 9.0)
    monkeypatch.setattr(programs, "_LOWERED", {})
    monkeypatch.setattr(programs, "_lower", lambda *_: pytest.fail("lowered"))
    product = hopper.product_sum(2)

    def part(*operands):
        return hopper._product([operands[:2], operands[2:]], flipped=True)

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
