import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import MeshConfig, OptimizerConfig
from jaxchat.devices.mesh import BATCH_SPEC, make_mesh, put_batch
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.model.parameters import shardings
from jaxchat.ops import attention, dispatch, triton
from jaxchat.ops.compute import Compute
from jaxchat.ops.dispatch import Level
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.train.loss import CROSS_ENTROPY
from jaxchat.train.step import init_state, make_train_step

CONFIG = GPTConfig(depth=2, sequence_len=16, vocab_size=120)


def batches(count, accumulation=1, rows=4, length=16, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        tokens = random.integers(0, CONFIG.vocab_size, (accumulation, rows, length + 1), dtype=np.int32)
        targets = np.where(random.random(tokens[..., 1:].shape) < 0.3, -1, tokens[..., 1:])
        yield {"inputs": tokens[..., :-1], "targets": targets}


def losses(mesh_config, devices, steps=4, accumulation=1, config=CONFIG):
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    optimizer = make_optimizer(
        OptimizerConfig(), config, optax.constant_schedule(1.0), mesh=mesh, newton_schulz_dtype=jnp.float32
    )
    state = init_state(init_params(config, jax.random.key(0)), optimizer)
    placed = shardings(mesh, state)
    state = jax.device_put(state, placed)
    step = make_train_step(config, optimizer, Compute(mesh=mesh), state_shardings=placed)
    seen = []
    for batch in batches(steps, rows=4):
        batch = {k: v.reshape(accumulation, -1, v.shape[-1]) for k, v in batch.items()}
        batch = {k: put_batch(mesh, v, jax.sharding.PartitionSpec(None, *BATCH_SPEC)) for k, v in batch.items()}
        state, metrics = step(state, batch)
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert step._cache_size() == 1, "the step compiled more than once"
    return np.array(seen)


@pytest.fixture(scope="module")
def one_device():
    return losses(MeshConfig(), 1)


@pytest.mark.parametrize(
    "mesh, devices",
    [
        (MeshConfig(), 2),
        (MeshConfig(), 4),
        (MeshConfig(fsdp=4), 4),
        (MeshConfig(tensor=2), 2),
        (MeshConfig(fsdp=2, tensor=2), 4),
    ],
    ids=["data2", "data4", "fsdp4", "tensor2", "fsdp2tensor2"],
)
@pytest.mark.slow
def test_any_mesh_gives_the_losses_of_one_device(mesh, devices, one_device):
    np.testing.assert_allclose(losses(mesh, devices), one_device, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_any_mesh_gives_the_losses_of_one_device_with_windows(one_device, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)  # the window of 4 goes through in blocks
    windows = dataclasses.replace(CONFIG, window_pattern="SL")
    expected = losses(MeshConfig(), 1, config=windows)
    assert np.abs(expected - one_device).max() > 1e-3
    spread = losses(MeshConfig(fsdp=2, tensor=2), 4, config=windows)
    np.testing.assert_allclose(spread, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_in_a_block_fsdp_moves_weights_and_their_gradients_alone(fp8, monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", True)  # with the kernels, whose split the compiler must be told
    monkeypatch.setattr(dispatch, "highest_level", lambda _, fp8=False: Level.FP8 if fp8 else Level.HOPPER)
    jax.clear_caches()
    mesh = make_mesh(MeshConfig(fsdp=4))
    optimizer = make_optimizer(OptimizerConfig(), CONFIG, lambda count: 1.0, mesh=mesh)
    state = jax.eval_shape(lambda: init_state(init_params(CONFIG, jax.random.key(0)), optimizer))
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, shardings(mesh, state)
    )
    place = jax.NamedSharding(mesh, jax.P(None, *BATCH_SPEC))
    tokens = jax.ShapeDtypeStruct((1, 12, 17), jnp.int32, sharding=place)
    compute = Compute(jnp.bfloat16, mesh, fp8=True) if fp8 else Compute(mesh=mesh)
    places = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(CONFIG, optimizer, compute, state_shardings=places)
    hlo = step.lower(state, {"inputs": tokens, "targets": tokens}).compile().as_text()
    jax.clear_caches()
    kinds = r" = (.*) (?:all-\w+|collective-permute|reduce-scatter)(?:-start)?\(.*_run_block"
    sizes = {int(n) for dims in re.findall(r"\[([\d,]+)\]", str(re.findall(kinds, hlo))) for n in dims.split(",")}
    assert CONFIG.width in sizes and not sizes & {3, 12, 17}


def test_accumulation_gives_the_losses_of_one_large_batch(one_device):
    np.testing.assert_allclose(losses(MeshConfig(), 1, accumulation=4), one_device, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_batch_can_be_overfitted():
    schedule = optax.linear_schedule(1.0, 0.0, 120)
    optimizer = make_optimizer(OptimizerConfig(), CONFIG, schedule, newton_schulz_dtype=jnp.float32)
    state = init_state(init_params(CONFIG, jax.random.key(0)), optimizer)
    step = make_train_step(CONFIG, optimizer)
    (batch,) = batches(1)
    first = None
    for _ in range(120):
        state, metrics = step(state, batch)
        first = float(metrics["loss"]) if first is None else first
    assert first == pytest.approx(np.log(CONFIG.vocab_size), rel=1e-4)  # a head of zeros: the uniform distribution
    assert float(metrics["loss"]) < 0.02


@pytest.mark.slow
def test_a_batch_that_teaches_nothing_changes_nothing():
    """Else momentum would: Muon's at full length."""
    optimizer = make_optimizer(OptimizerConfig(), CONFIG, lambda count: 1.0)
    step = make_train_step(CONFIG, optimizer, objective=CROSS_ENTROPY)
    (batch,) = batches(1)
    batch["shares"] = np.ones(batch["targets"].shape, np.float32)
    state, _ = step(init_state(init_params(CONFIG, jax.random.key(0)), optimizer), batch)
    before = jax.device_get(state)
    state, metrics = step(state, {**batch, "shares": np.zeros_like(batch["shares"])})
    assert float(metrics["grad_norm"]) == 0 and int(state["step"]) == 2
    jax.tree.map(np.testing.assert_array_equal, state["params"], before["params"])
    counts = [x for x in jax.tree.leaves(state["opt_state"]) if x.dtype == np.int32]
    assert counts and all(int(count) == 2 for count in counts)
    state, _ = step(state, batch)
    assert np.abs(state["params"]["head"]["kernel"] - before["params"]["head"]["kernel"]).max() > 0


def test_shares_scale_the_loss_and_ignored_targets_do_not_count():
    optimizer = optax.sgd(0.1)
    steps = {given: make_train_step(CONFIG, optimizer, objective=given) for given in (None, CROSS_ENTROPY)}
    (batch,) = batches(1)
    params = init_params(CONFIG, jax.random.key(0))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    shares = np.random.default_rng(0).normal(size=batch["targets"].shape).astype(np.float32)

    def run(batch, objective=None):
        return steps[objective](jax.tree.map(jnp.copy, init_state(params, optimizer)), batch)[1]

    plain, shared = run(batch), run({**batch, "shares": shares}, CROSS_ENTROPY)
    doubled = run({**batch, "shares": 2 * shares}, CROSS_ENTROPY)
    assert float(doubled["loss"]) == pytest.approx(2 * float(shared["loss"]), rel=1e-5)
    count = (batch["targets"] >= 0).sum()
    assert int(plain["targets"]) == count
    mean = run({**batch, "shares": np.full_like(shares, 1 / count)}, CROSS_ENTROPY)
    assert float(mean["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-5)
    assert float(mean["grad_norm"]) == pytest.approx(float(plain["grad_norm"]), rel=1e-5)
    empty = run({**batch, "targets": np.full_like(batch["targets"], -1)})
    assert float(empty["loss"]) == 0 and float(empty["grad_norm"]) == 0
