"""The mesh, and how arrays are laid out on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import BATCH_SPEC, make_mesh, put_batch
from jaxchat.errors import UserError
from jaxchat.model.parameters import shardings

BLOCK = {
    "attn": {"q": {"kernel": (128, 128)}, "o": {"kernel": (128, 128)}},
    "mlp": {"up": {"kernel": (128, 512)}, "down": {"kernel": (512, 128)}},
}
SHAPES = {"embed": {"embedding": (256, 128)}, "blocks": {"0": BLOCK, "1": BLOCK}, "head": {"kernel": (128, 256)}}


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
def test_data_takes_what_the_other_axes_leave(config, shape):
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_devices_can_be_chosen():
    assert list(make_mesh(MeshConfig(), jax.devices()[2:3]).devices.flat) == jax.devices()[2:3]


@pytest.mark.parametrize(
    "config, says",
    [
        (MeshConfig(fsdp=3), "does not divide the number of devices, 4; choose a product among 1, 2, 4"),
        (MeshConfig(fsdp=4, tensor=2), "is 8, which does not divide the number of devices, 4"),
        (MeshConfig(data=2), "is 2 devices, but there are 4; set mesh.data to 4, or to -1"),
        (MeshConfig(data=8, fsdp=2), "is 16 devices, but there are 4; set mesh.data to 2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, says):
    with pytest.raises(UserError, match=says):
        make_mesh(config)


def test_batches_are_split_by_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    rows = np.arange(8 * 3).reshape(8, 3)
    batch = put_batch(mesh, rows)
    np.testing.assert_array_equal(batch, rows)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    accumulated = put_batch(mesh, rows.reshape(2, 4, 3), P(None, *BATCH_SPEC))
    assert {shard.data.shape for shard in accumulated.addressable_shards} == {(2, 1, 3)}


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(fsdp=2, tensor=2), MeshConfig(tensor=4)])
def test_sharded_training_math_equals_one_device(config):
    """The shardings change where values lie, never the values."""
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 10, jnp.float32), params())
    tokens = rng.integers(0, 256, size=(4, 5))

    def loss(tree, tokens):
        x = tree["embed"]["embedding"][tokens]
        for block in tree["blocks"].values():
            x = x + jnp.tanh(x @ block["attn"]["q"]["kernel"]) @ block["attn"]["o"]["kernel"]
            x = x + jax.nn.relu(x @ block["mlp"]["up"]["kernel"]) @ block["mlp"]["down"]["kernel"]
        return jnp.mean(jax.nn.logsumexp(x @ tree["head"]["kernel"], axis=-1))

    expected, expected_grads = jax.value_and_grad(loss)(tree, tokens)
    mesh = make_mesh(config)
    placed = jax.device_put(tree, shardings(mesh, tree))
    got, grads = jax.jit(jax.value_and_grad(loss))(placed, put_batch(mesh, tokens))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-5), grads, expected_grads)
