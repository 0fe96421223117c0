"""The mesh, and which array lies how on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxchat.config import MeshConfig, OptimizerConfig
from jaxchat.devices.mesh import BATCH_SPEC, make_mesh, param_specs, put_batch, shardings
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.optim.optimizer import make_optimizer

BLOCK = {
    "attn": {"q": (128, 128), "k": (128, 6), "v": (128, 6), "o": (128, 128)},
    "mlp": {"up": (128, 512), "down": (512, 128)},
}
SHAPES = {"embed": {"embedding": (256, 128)}, "blocks": {"0": BLOCK, "1": BLOCK}, "head": {"kernel": (128, 256)}}
COLUMN, ROW = P("fsdp", "tensor"), P("tensor", "fsdp")


def params():
    return jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))


@pytest.mark.parametrize(
    "config, shape",
    [
        (MeshConfig(), (4, 1, 1)),
        (MeshConfig(fsdp=2), (2, 2, 1)),
        (MeshConfig(fsdp=2, tensor=2), (1, 2, 2)),
        (MeshConfig(data=2, tensor=2), (2, 1, 2)),
    ],
)
def test_data_takes_what_the_others_leave(config, shape):
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_devices_can_be_chosen():
    assert list(make_mesh(MeshConfig(), jax.devices()[2:3]).devices.flat) == jax.devices()[2:3]


@pytest.mark.parametrize(
    "config, says",
    [
        (MeshConfig(fsdp=3), "does not divide the 4 devices here; choose a product among 1, 2, 4"),
        (MeshConfig(fsdp=4, tensor=2), "is 8, which does not divide the 4 devices"),
        (MeshConfig(data=2), "is 2 devices, and 4 are here; set mesh.data to 4, or to -1"),
        (MeshConfig(data=8, fsdp=2), "is 16 devices, and 4 are here; set mesh.data to 2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, says):
    with pytest.raises(UserError, match=says):
        make_mesh(config)


def test_every_parameter_has_its_spec():
    block = {"attn": {"q": COLUMN, "k": COLUMN, "v": COLUMN, "o": ROW}, "mlp": {"up": COLUMN, "down": ROW}}
    expected = {"embed": {"embedding": ROW}, "blocks": {"0": block, "1": block}, "head": {"kernel": COLUMN}}
    assert param_specs(params()) == expected


def test_every_parameter_of_the_model_is_in_the_table():
    def checked(path, leaf, spec):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        wide = any(part in name for part in ("attn/o", "mlp/down", "embed/"))
        assert spec == (ROW if wide else COLUMN), name

    model = abstract_params(GPTConfig(depth=2, vocab_size=256))
    jax.tree.map_with_path(checked, model, param_specs(model))


def test_a_dimension_that_does_not_divide_is_replicated():
    placed = shardings(make_mesh(MeshConfig(tensor=4)), params())
    attn = placed["blocks"]["1"]["attn"]
    assert attn["k"].spec == P("fsdp", None) and attn["q"].spec == COLUMN


def test_optimizer_state_lies_as_the_parameters_do():
    optimizer = make_optimizer(OptimizerConfig(), GPTConfig(depth=2, vocab_size=256), lambda count: 1.0)
    state = jax.eval_shape(optimizer.init, params())
    placed = shardings(make_mesh(MeshConfig(fsdp=2, tensor=2)), {"opt_state": state, "step": jnp.zeros(())})
    expected = {(256, 128): ROW, (128, 256): COLUMN, (128, 512): COLUMN, (512, 128): ROW, (128, 6): COLUMN, (): P()}
    checked = set()
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed["opt_state"]), strict=True):
        if leaf.shape in expected:
            checked.add(leaf.shape)
            assert sharding.spec == expected[leaf.shape]
        else:
            assert sharding.spec in (COLUMN, ROW)
    assert checked == set(expected)
    assert placed["step"].spec == P()


def test_batches_are_split_by_rows_and_whole_again():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    rows = np.arange(8 * 3).reshape(8, 3)
    batch = put_batch(mesh, rows)
    np.testing.assert_array_equal(batch, rows)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    accumulated = put_batch(mesh, rows.reshape(2, 4, 3), P(None, *BATCH_SPEC))
    assert {shard.data.shape for shard in accumulated.addressable_shards} == {(2, 1, 3)}


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(fsdp=2, tensor=2), MeshConfig(tensor=4)])
def test_sharded_training_math_equals_one_device(config):
    """The table changes where things lie, never what they are."""
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 10, jnp.float32), params())
    tokens = rng.integers(0, 256, size=(4, 5))

    def loss(tree, tokens):
        x = tree["embed"]["embedding"][tokens]
        for block in tree["blocks"].values():
            x = x + jnp.tanh(x @ block["attn"]["q"]) @ block["attn"]["o"]
            x = x + jax.nn.relu(x @ block["mlp"]["up"]) @ block["mlp"]["down"]
        return jnp.mean(jax.nn.logsumexp(x @ tree["head"]["kernel"], axis=-1))

    expected, expected_grads = jax.value_and_grad(loss)(tree, tokens)
    mesh = make_mesh(config)
    placed = jax.device_put(tree, shardings(mesh, tree))
    got, grads = jax.jit(jax.value_and_grad(loss))(placed, put_batch(mesh, tokens))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-5), grads, expected_grads)
