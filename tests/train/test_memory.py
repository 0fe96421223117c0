"""How many rows a step computes at once and what it recomputes, and that this changes nothing but memory."""

import dataclasses
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import DataConfig, Experiment, MeshConfig, TokenizerConfig
from jaxchat.devices.mesh import make_mesh, set_xla_flags
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params, hidden_states, init_params
from jaxchat.ops.compute import Compute
from jaxchat.stages.workspace import planned_model
from jaxchat.train import memory
from jaxchat.train.budget import batch_plans
from jaxchat.train.choice import Choice, by_preference
from jaxchat.train.memory import (
    GIB,
    LEVELS,
    CompiledStep,
    OutOfMemory,
    StepMemory,
    TrainStep,
    compile_step,
    levels,
    plan_step,
    usable_memory,
)
from jaxchat.train.step import abstract_batch, init_state

CONFIG = GPTConfig(depth=2, sequence_len=64, vocab_size=128)
BATCH = 8  # rows of an optimizer step


# What a step of all rows might take on a GPU. XLA for the CPU undoes rematerialisation.
MEMORIES = {"none": StepMemory(GIB, 8 * GIB), "mlp": StepMemory(GIB, 4 * GIB), "full": StepMemory(GIB, 2 * GIB)}
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
PLANS = {plan.device_rows: plan for plan in batch_plans(BATCH * 64, "auto", 64, 1)}


OPTIMIZER = optax.sgd(0.3)  # which compiles in a moment


@pytest.fixture(scope="module")
def planned():
    return plan_step(CONFIG, OPTIMIZER, abstract_params(CONFIG), Compute(mesh=MESH))


def batch_of(rows):
    return abstract_batch(MESH, (PLANS[rows].accumulation, rows, 64))


def compiled(planned, limit, rows=(BATCH,), which=LEVELS, **options):
    return compile_step(planned, by_preference(rows, 64, which), limit, batch_of, **options)


@pytest.fixture(scope="module")
def on_cpu(planned):
    """The step that is compiled, by the rows that a device computes at once."""
    return {rows: compiled(planned, None, (rows,), ("none",)) for rows in PLANS}


class OnGpu(jax.stages.Compiled):
    """A step of a level that takes what it might on a GPU, lowered, compiled and analysed."""

    def __init__(self, level, rows=BATCH):
        self.level, self.rows = level, rows

    def lower(self, state, batch):
        return OnGpu(self.level, batch["inputs"].shape[1])

    def compile(self):
        return self

    def memory_analysis(self):
        memory = MEMORIES[self.level]
        return SimpleNamespace(
            argument_size_in_bytes=memory.held,
            output_size_in_bytes=memory.held,
            alias_size_in_bytes=memory.held,
            temp_size_in_bytes=memory.used * self.rows // BATCH,
        )


@pytest.fixture(scope="module")
def on_gpu(planned):
    row = {level: memory.used / BATCH / 64 for level, memory in MEMORIES.items()}
    return dataclasses.replace(planned, make=OnGpu, token_bytes=row)


class Refused:
    """A lowered step that the compiler refuses, with the words of a TPU's."""

    WHY = "Ran out of memory on HBM, the total memory required for HLO temporaries (17.91G) exceeds available HBM"

    def lower(self, *arguments):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.WHY} (15.75G).\nmore lines")


def refusing(planned, *refused):
    """The step, at some levels refused by the compiler."""
    return dataclasses.replace(planned, make=lambda level: Refused() if level in refused else planned.make(level))


def test_a_level_that_the_compiler_refuses_does_not_fit(on_gpu):
    step = compiled(refusing(on_gpu, "none"), None)
    assert step.choice == (BATCH, "mlp") and list(step.memories) == [(BATCH, "mlp")] and step.fits


def test_what_no_level_fits_into_is_said_in_the_compilers_words(planned):
    with pytest.raises(
        UserError, match=r"does not fit into memory \(Ran out .*\(15.75G\)\); lower device-rows"
    ) as error:
        compiled(refusing(planned, *LEVELS), None)
    assert "\n" not in str(error.value)


def test_a_compiled_step_knows_the_memory_of_its_state(planned, on_cpu):
    found = on_cpu[BATCH].memory
    arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((planned.state, batch_of(BATCH))))
    assert arrays <= found.held < 1.01 * arrays and found.used > 0


@pytest.mark.parametrize("level", LEVELS)
def test_the_lowest_level_that_fits_is_taken(on_gpu, level):
    step = compiled(on_gpu, MEMORIES[level].total)
    assert (step.remat, step.fits, step.memory) == (level, True, MEMORIES[level])


def test_fewer_rows_are_taken_only_where_no_level_fits(on_gpu):
    """Half the rows, plain, and all of them with everything recomputed would both fit: as many as possible."""
    both = compiled(on_gpu, 5 * GIB - 1, (BATCH, BATCH // 2))
    assert both.choice == (BATCH, "full")
    assert compiled(on_gpu, 5 * GIB, (BATCH, BATCH // 2), ("none",)).choice == (BATCH // 2, "none")
    assert compiled(on_gpu, int(2.9 * GIB), (BATCH, BATCH // 2)).choice == (BATCH // 2, "full")
    assert str(both).startswith("8 rows, remat full: a step takes 3.00 of 5.00 GiB per device")


def test_what_was_taken_before_is_taken_again_if_it_fits(on_gpu):
    before = Choice(BATCH // 2, "mlp")
    options = {"rows": (BATCH, BATCH // 2), "first": before}
    kept = compiled(on_gpu, 100 * GIB, **options)
    assert kept.choice == before and list(kept.memories) == [before]
    assert compiled(on_gpu, int(2.4 * GIB), **options).choice == (BATCH // 2, "full")
    assert compiled(on_gpu, 100 * GIB, first=Choice(3, "none")).choice == (BATCH, "none")


def test_processes_whose_devices_differ_choose_the_same(on_gpu, monkeypatch):
    """Of two, one finds a tenth more than the other; alone, the other would recompute less."""
    of, found = StepMemory.of, []
    for own in (1.0, 1.1):
        monkeypatch.setattr(
            StepMemory, "of", lambda step, own=own: StepMemory(int(own * of(step).held), int(own * of(step).used))
        )
        monkeypatch.setattr(
            memory,
            "_in_all_processes",
            lambda number, which, own=own: float(which([number / own, number / own * 1.1])),
        )
        found.append(compiled(on_gpu, MEMORIES["mlp"].total, (BATCH, BATCH // 2)).choice)
    assert found == [(BATCH, "full")] * 2


def test_without_a_known_limit_nothing_is_recomputed(on_gpu):
    assert compiled(on_gpu, None).remat == "none"


def test_a_step_that_does_not_fit_is_refused_in_one_line(on_gpu):
    step = compiled(on_gpu, MEMORIES["full"].total - 1)
    assert (step.remat, step.fits) == ("full", False)
    line = step.too_large("pretrain")
    assert "\n" not in line and "lower pretrain.device-rows, now 8" in line and "mesh.fsdp" in line
    step = compiled(on_gpu, int(1.2 * GIB), tuple(PLANS))
    assert (step.choice, step.fits) == ((1, "full"), False)
    line = step.too_large("pretrain")
    assert "\n" not in line and "device-rows" not in line and "model.sequence-len" in line


def test_fewer_rows_are_not_advised_where_the_parameters_alone_do_not_fit(on_gpu):
    step = compiled(on_gpu, None, which=("none",))
    large = {step.choice: StepMemory(10 * GIB, GIB)}
    line = dataclasses.replace(step, memories=large, limit=5 * GIB, fits=False).too_large("pretrain")
    assert "device-rows" not in line and "mesh.fsdp" in line


def test_all_rows_at_once_and_few_have_the_same_losses(on_cpu):
    """The loss is one over the whole batch, however it is split: what fits decides only about rounding."""
    start = init_params(CONFIG, jax.random.key(0))
    tokens = np.repeat(np.random.default_rng(0).integers(0, 128, (1, BATCH, 65), np.int32), 3, axis=0)
    losses = {}
    for rows, plan in PLANS.items():
        state = init_state(jax.tree.map(jnp.copy, start), OPTIMIZER)
        losses[rows] = []
        for batch in tokens.reshape(3, rows, plan.accumulation, 65).swapaxes(1, 2):
            arrays = {"inputs": batch[..., :-1], "targets": batch[..., 1:]}
            placed = {name: jax.device_put(x, batch_of(rows)[name].sharding) for name, x in arrays.items()}
            state, metrics = on_cpu[rows].compiled(state, placed)
            losses[rows].append(float(metrics["loss"]))
    assert losses[1][2] < losses[1][0]
    for found in losses.values():
        np.testing.assert_allclose(found, losses[BATCH], rtol=1e-5)


def test_memory_is_about_linear_in_the_rows(on_cpu):
    """Which the search relies on: the step of 4 rows is predicted from those of 1 and 2."""
    one, two, four = (on_cpu[rows].memory.total for rows in (1, 2, 4))
    assert four == pytest.approx(one + 3 * (two - one), rel=0.2)


def test_a_host_that_does_not_say_how_much_memory_it_has(monkeypatch):
    """The devices of a host share what it has."""
    monkeypatch.setattr(memory, "available_memory", lambda: 40 * GIB)
    monkeypatch.setattr(jax, "local_devices", lambda: [MESH.devices.flat[0]] * 4)
    assert usable_memory() is None and usable_memory(of_host=True) == 6 * GIB
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    monkeypatch.delattr(os, "sysconf")
    assert 0 < usable_memory(of_host=True) < GIB


def test_on_a_cpu_nothing_is_recomputed_unless_it_is_asked_for():
    assert levels("auto", MESH) == ("none",) and levels("full", MESH) == ("full",)


def test_a_first_step_that_runs_out_of_memory_is_known_from_other_errors(planned):
    class Failing(jax.stages.Compiled):
        def __init__(self, message):
            self.message = message

        def __call__(self, *arguments):
            raise jax.errors.JaxRuntimeError(self.message)

    for message, error in (
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.\nmore", OutOfMemory),
        ("INTERNAL: something else", jax.errors.JaxRuntimeError),
    ):
        step = TrainStep(planned, LEVELS, None, lambda step: None)
        choice = Choice(BATCH, "none")
        step._accept(CompiledStep(choice, Failing(message), {choice: StepMemory(1, 2)}, 4, True, {}), {})
        with pytest.raises(error) as raised:
            step({}, {})
        assert "\n" not in str(raised.value)


def test_what_is_far_smaller_than_the_memory_need_not_be_compiled_to_be_known_to_fit(planned):
    def surely(limit):
        return TrainStep(planned, LEVELS, limit, lambda step: None).surely_fits(batch_of(BATCH))

    assert surely(GIB) and not surely(1 << 20) and not surely(None)


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
    traces, accepted = [], []

    def counted(level):
        traces.append(level)
        return planned.make(level)

    step = TrainStep(dataclasses.replace(planned, make=counted), LEVELS, None, accepted.append)
    step.choose([BATCH], batch_of)
    state = init_state(init_params(CONFIG, jax.random.key(0)), OPTIMIZER)
    draw = np.random.default_rng(0)
    rows = {name: draw.integers(0, 128, x.shape, x.dtype) for name, x in batch_of(BATCH).items()}
    rows = {name: jax.device_put(x, batch_of(BATCH)[name].sharding) for name, x in rows.items()}
    losses = []
    for _ in range(3):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    assert traces == ["none"] and [step.choice for step in accepted] == [(BATCH, "none")]
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
