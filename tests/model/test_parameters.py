"""The table of parameters: each parameter has one row, and a new one needs a line in the module and a line here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import MeshConfig, OptimizerConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.model import gpt, parameters
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params, init_params
from jaxchat.model.parameters import (
    TABLE,
    Parameter,
    count_parameters,
    export_name,
    groups_of,
    named_parameters,
    row_of,
    shardings,
)
from jaxchat.ops.compute import Compute
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.train.step import init_state, make_train_step

CONFIG = GPTConfig(depth=4, sequence_len=16, vocab_size=250, num_kv_heads=1)
PARTS = dict.fromkeys(("residual_scales", "value_embeddings", "smear", "bigrams", "backout"), True)
COLUMN, ROW = P("fsdp", "tensor"), P("tensor", "fsdp")


def test_every_parameter_has_one_row_and_every_row_a_parameter():
    rows = [row_of(path) for path, _ in named_parameters(abstract_params(dataclasses.replace(CONFIG, **PARTS)))]
    assert set(rows) == set(TABLE)


def test_what_an_optimizer_keeps_for_itself_is_replicated():
    mesh = make_mesh(MeshConfig(tensor=4))
    assert shardings(mesh, {"opt_state": {"table": jnp.ones((8, 8))}})["opt_state"]["table"].spec == P()
    with pytest.raises(LookupError, match="params/table has 0 rows"):
        shardings(mesh, {"params": {"table": jnp.ones((8, 8))}})


@pytest.mark.parametrize("path", ["blocks/0/attn/q", "blocks/x/attn/q/kernel", "extra", "blocks/0/attn/q/kernel/0"])
def test_a_parameter_without_a_row_is_an_error(path):
    with pytest.raises(LookupError, match="has 0 rows in jaxchat/model/parameters.py"):
        row_of(path)


def test_a_parameter_with_two_rows_is_an_error(monkeypatch):
    monkeypatch.setattr(parameters, "TABLE", (*TABLE, row_of("head/kernel")))
    with pytest.raises(LookupError, match="head/kernel has 2 rows"):
        groups_of(abstract_params(CONFIG))


def test_muon_takes_matrices_alone(monkeypatch):
    monkeypatch.setattr(parameters, "TABLE", (Parameter("gain", "matrix", P(), "gain"),))
    with pytest.raises(ValueError, match=r"parameter gain has shape \(3,\)"):
        groups_of({"gain": jnp.ones(3)})


@pytest.mark.parametrize("path, group, spec", [
    ("embed/embedding", "embedding", ROW), ("head/kernel", "head", COLUMN),
    *((f"blocks/1/attn/{name}/kernel", "matrix", COLUMN) for name in "qkv"), ("blocks/1/attn/o/kernel", "matrix", ROW),
    ("blocks/1/mlp/up/kernel", "matrix", COLUMN), ("blocks/1/mlp/down/kernel", "matrix", ROW),
])  # fmt: skip
def test_groups_and_shardings(path, group, spec):
    """Matrices that follow each other split the dimension between them alike."""
    params = abstract_params(CONFIG)
    placed = shardings(make_mesh(MeshConfig(fsdp=2, tensor=2)), params)
    assert dict(named_parameters(groups_of(params)))[path] == group
    assert dict(named_parameters(placed))[path].spec == spec


def test_a_dimension_that_does_not_divide_is_replicated():
    params = abstract_params(dataclasses.replace(CONFIG, depth=1, num_kv_heads=None))
    params["blocks"]["0"]["attn"]["k"]["kernel"] = jax.ShapeDtypeStruct((64, 6), jnp.float32)
    attn = shardings(make_mesh(MeshConfig(tensor=4)), params)["blocks"]["0"]["attn"]
    assert attn["k"]["kernel"].spec == P("fsdp", None) and attn["q"]["kernel"].spec == COLUMN


def test_optimizer_state_is_placed_like_its_parameters():
    optimizer = make_optimizer(OptimizerConfig(), CONFIG, lambda count: 1.0)
    params = abstract_params(CONFIG)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(shardings(mesh, params)), strict=True)
    specs = {leaf.shape: sharding.spec for leaf, sharding in leaves if leaf.shape[0] != leaf.shape[1]}
    state = {"opt_state": jax.eval_shape(optimizer.init, params), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    placed = shardings(mesh, state)
    seen = set()
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        if leaf.ndim == 0:
            assert sharding.spec == P()
        elif leaf.shape in specs:
            seen.add(leaf.shape)
            assert sharding.spec == specs[leaf.shape]
    assert seen == set(specs)


def test_counts():
    """By hand: d4 has width 256 and 2 heads of 128, of which keys and values have 1."""
    count = count_parameters(CONFIG)
    assert count.embedding == count.head == 256 * 256
    assert count.matrices == 4 * (2 * 256 * 256 + 2 * 256 * 128 + 2 * 256 * 1024)
    sizes = [leaf.size for path, leaf in named_parameters(abstract_params(CONFIG)) if row_of(path).counted]
    assert count.total == count.counted == sum(sizes) == count.embedding + count.matrices + count.head
    assert count.value_embedding == count.others == 0


def test_counts_of_the_parts():
    """By hand: tables of 256 values for layers 1 and 3, gates of one head for each, 2 scales a block, 25 to smear, and
    5 times as many bigrams as tokens."""
    plain, count = count_parameters(CONFIG), count_parameters(dataclasses.replace(CONFIG, **PARTS))
    assert count.value_embedding == 2 * 256 * 128 + 5 * 256 * 256
    assert count.others == 2 * 12 + 2 * 4 + 25 + 1
    assert count.counted == plain.counted == count.total - count.value_embedding - count.others


def test_what_does_not_count_is_left_out_of_the_horizon(monkeypatch):
    uncounted = tuple(dataclasses.replace(row, counted=row.group != "embedding") for row in TABLE)
    before = count_parameters(CONFIG)
    monkeypatch.setattr(parameters, "TABLE", uncounted)
    assert count_parameters(CONFIG) == dataclasses.replace(before, counted=before.counted - before.embedding)


def test_export_names_are_those_of_transformers_nanochat():
    names = [export_name(path) for path, _ in named_parameters(abstract_params(CONFIG))]
    assert len(set(names)) == len(names)
    projections = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.fc1", "mlp.fc2"]
    expected = {f"model.layers.{i}.{name}.weight" for i in range(4) for name in projections}
    assert set(names) >= expected | {"model.embed_tokens.weight", "lm_head.weight"}


class Gain(gpt.Block):
    """A block with a scalar on its result."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, *args):
        x = super().__call__(*args)
        return x * self.gain[...].astype(x.dtype)


class Scale(gpt.Block):
    """A block with a vector on its result."""

    def __init__(self, config, window, *, rngs):
        super().__init__(config, window, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(config.width))

    def __call__(self, *args):
        x = super().__call__(*args)
        return x * self.scale[...].astype(x.dtype)


class Shift(gpt.Embedding):
    """An embedding with a second table, of what is added to each token's row."""

    def __init__(self, count, width, *, rngs, std):
        super().__init__(count, width, rngs=rngs, std=std)
        self.shift = nnx.Param(jnp.zeros((count, width)))

    def __call__(self, tokens, dtype):
        return super().__call__(tokens, dtype) + self.shift[...][tokens].astype(dtype)


NEW = {
    "a scalar in a block": ("Block", Gain, Parameter("blocks/{i}/gain", "head", P(), "model.layers.{i}.gain")),
    "a vector in a block": (
        "Block", Scale, Parameter("blocks/{i}/scale", "head", P("fsdp"), "model.layers.{i}.scale", counted=False)
    ),
    "a table": ("Embedding", Shift, Parameter("embed/shift", "embedding", ROW, "model.shift.weight")),
}  # fmt: skip


@pytest.fixture
def fresh_graphs():
    gpt._graph.cache_clear()
    yield
    gpt._graph.cache_clear()


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_a_new_parameter_trains_is_split_saved_and_restored(name, fp8, monkeypatch, tmp_path, fresh_graphs):
    module, replacement, row = NEW[name]
    monkeypatch.setattr(gpt, module, replacement)  # the line in the module
    monkeypatch.setattr(parameters, "TABLE", (*TABLE, row))  # the line in the table
    monkeypatch.setattr("jaxchat.ops.triton.INTERPRET", fp8)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    compute = Compute(jnp.bfloat16 if fp8 else jnp.float32, mesh, fp8=fp8)
    optimizer = make_optimizer(OptimizerConfig(), CONFIG, optax.constant_schedule(1.0), mesh=mesh)
    state = init_state(init_params(CONFIG, jax.random.key(0)), optimizer)
    placed = shardings(mesh, state)
    state = jax.device_put(state, placed)
    new = {path: np.asarray(leaf) for path, leaf in named_parameters(state["params"]) if row.match(path)}
    assert len(new) == (1 if module == "Embedding" else CONFIG.depth)
    assert count_parameters(CONFIG).counted == sum(
        leaf.size for path, leaf in named_parameters(state["params"]) if row_of(path).counted
    )

    step = make_train_step(CONFIG, optimizer, compute, state_shardings=placed)
    tokens = jax.random.randint(jax.random.key(1), (1, 4, 17), 0, CONFIG.vocab_size)
    losses = []
    for _ in range(3):
        state, metrics = step(state, {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    trained = dict(named_parameters(state["params"]))
    for path, before in new.items():
        assert not np.array_equal(trained[path], before), path
        assert trained[path].sharding.spec == row.spec

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state, data={}, meta={})
    checkpoints.close()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored, _, _ = Checkpoints(tmp_path / "checkpoints").restore(abstract, 3)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
