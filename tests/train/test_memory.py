"""Which level of rematerialisation a step is compiled with, and that it changes nothing but memory."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, TokenizerConfig
from jaxchat.devices.mesh import make_mesh, set_xla_flags
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params, hidden_states, init_params
from jaxchat.ops.compute import Compute
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.stages.training import abstract_batch
from jaxchat.stages.workspace import planned_model
from jaxchat.train.budget import split_batch
from jaxchat.train.memory import GIB, LEVELS, StepMemory, TrainStep, compile_step, plan_step
from jaxchat.train.step import init_state

CONFIG = GPTConfig(depth=2, sequence_len=64, vocab_size=128)


MEMORIES = {"none": StepMemory(GIB, 8 * GIB), "mlp": StepMemory(GIB, 5 * GIB), "full": StepMemory(GIB, 3 * GIB)}


@pytest.fixture(scope="module")
def planned():
    """The abstract state and batch of a step, the function that builds it, and its optimizer."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(), CONFIG, optax.constant_schedule(1.0), mesh=mesh)
    state, make_step = plan_step(CONFIG, optimizer, abstract_params(CONFIG), Compute(mesh=mesh))
    batch = abstract_batch(mesh, split_batch(4 * 64, 4, 64, 1), 64)
    return state, batch, make_step, optimizer


@pytest.fixture
def memories(monkeypatch):
    """XLA for the CPU undoes rematerialisation, so its analysis is replaced by what steps might take on a GPU."""
    levels = iter(LEVELS)
    monkeypatch.setattr(StepMemory, "of", lambda compiled: MEMORIES[next(levels)])


class Refused:
    """A lowered step that the compiler refuses, with the words of a TPU's."""

    WHY = "Ran out of memory on HBM, the total memory required for HLO temporaries (17.91G) exceeds available HBM"

    def lower(self, *arguments):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.WHY} (15.75G).\nmore lines")


def test_a_level_that_the_compiler_refuses_does_not_fit(planned):
    state, batch, make_step, _ = planned
    step = compile_step(lambda level: Refused() if level == "none" else make_step(level), "auto", None, state, batch)
    assert step.remat == "mlp" and list(step.memories) == ["mlp"] and step.fits


def test_what_no_level_fits_into_is_said_in_the_compilers_words(planned):
    state, batch, _, _ = planned
    with pytest.raises(
        UserError, match=r"does not fit into memory \(Ran out .*\(15.75G\)\); lower device-rows"
    ) as error:
        compile_step(lambda level: Refused(), "auto", None, state, batch)
    assert "\n" not in str(error.value)


def test_a_compiled_step_knows_the_memory_of_its_state(planned):
    state, batch, make_step, _ = planned
    memory = compile_step(make_step, "none", None, state, batch).memory
    arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, batch)))
    assert arrays <= memory.held < 1.01 * arrays and memory.used > 0


@pytest.mark.parametrize("level", LEVELS)
def test_the_lowest_level_that_fits_is_taken(planned, memories, level):
    state, batch, make_step, _ = planned
    step = compile_step(make_step, "auto", MEMORIES[level].total, state, batch)
    assert (step.remat, step.fits, step.memory) == (level, True, MEMORIES[level])
    assert list(step.memories) == list(LEVELS[: LEVELS.index(level) + 1])


def test_without_a_known_limit_nothing_is_recomputed(planned):
    state, batch, make_step, _ = planned
    assert compile_step(make_step, "auto", None, state, batch).remat == "none"


def test_a_step_that_does_not_fit_is_refused_in_one_line(planned, memories):
    state, batch, make_step, _ = planned
    step = compile_step(make_step, "auto", MEMORIES["full"].total - 1, state, batch)
    assert (step.remat, step.fits) == ("full", False)
    line = step.too_large("pretrain", 8)
    assert "\n" not in line and "lower pretrain.device-rows, now 8" in line and "mesh.fsdp" in line


def test_fewer_rows_are_not_advised_where_the_parameters_alone_do_not_fit(planned):
    state, batch, make_step, _ = planned
    compiled = compile_step(make_step, "none", None, state, batch)
    step = dataclasses.replace(compiled, memories={"none": StepMemory(10 * GIB, GIB)}, limit=5 * GIB, fits=False)
    assert "device-rows" not in step.too_large("pretrain", 8) and "mesh.fsdp" in step.too_large("pretrain", 8)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_the_gradient_is_the_same(level):
    params = init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(1), p.shape), params)
    tokens = jax.random.randint(jax.random.key(2), (2, 64), 0, 128)

    def loss(params, remat):
        return jnp.sum(jnp.square(hidden_states(CONFIG, params, tokens, Compute(remat=remat))[..., :7]))

    plain, again = (jax.tree.leaves(jax.jit(jax.grad(loss), static_argnums=1)(params, r)) for r in ("none", level))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_a_step_is_traced_and_compiled_once(planned):
    state, batch, make_step, optimizer = planned
    traces, accepted = [], []

    def counted(level):
        traces.append(level)
        return make_step(level)

    step = TrainStep(counted, "auto", None, accepted.append)
    state = init_state(init_params(CONFIG, jax.random.key(0)), optimizer)
    rows = {name: np.ones(x.shape, x.dtype) for name, x in batch.items()}
    rows = {name: jax.device_put(x, batch[name].sharding) for name, x in rows.items()}
    losses = []
    for _ in range(3):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    assert traces == ["none"] and len(accepted) == 1
    assert losses[2] < losses[1] < losses[0]


def test_the_users_xla_flags_come_last_and_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    for _ in range(2):
        set_xla_flags("--xla_a=1")
        flags = "--xla_gpu_enable_triton_gemm=false --xla_a=1 --xla_gpu_enable_triton_gemm=true"
        assert os.environ["XLA_FLAGS"] == flags


def test_the_planned_model_is_the_trained_one():
    """Also where attention stops at the boundary of a document, which costs memory and time."""
    for borders, expected in (("none", None), ("loss", None), ("attention", 0), ("both", 0)):
        data, tokenizer = DataConfig(path="text", mask_borders=borders), TokenizerConfig(vocab_size=300)
        model = planned_model(Experiment(data=data, tokenizer=tokenizer, model=CONFIG))
        assert model == dataclasses.replace(CONFIG, vocab_size=300, border_token=expected)
