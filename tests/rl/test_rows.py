"""Rows of a batch: what is a target, how rows share the devices' positions, and that the gradient does not notice."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.config import MeshConfig, RLConfig
from jaxchat.devices.mesh import make_mesh, put_whole
from jaxchat.infer.engine import Completion
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.ops.compute import Compute
from jaxchat.rl.objectives import PolicyObjective, shares
from jaxchat.rl.rows import FULL, NOWHERE, Packing, Row, pack, row_of
from jaxchat.stages.rl import reference_of
from jaxchat.train.step import MICRO_BATCH_SPEC, init_state, make_train_step

CONTEXT, STOP = 32, 9
MODEL = GPTConfig(depth=1, sequence_len=CONTEXT, vocab_size=50)
BORDERED = dataclasses.replace(MODEL, border_token=7)  # which a sampled answer may well have


@given(st.lists(st.integers(1, 64), max_size=40), st.integers(1, 4))
def test_each_size_has_one_place_and_no_row_is_too_full(sizes, shared):
    length = shared * 64
    rows = pack(sizes, length)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in row) <= length for row in rows)
    assert sum(len(row) < shared for row in rows) <= 1
    assert len(rows) <= math.ceil(len(sizes) / shared)


def packing(devices=1, sequence_len=CONTEXT, prompt=9, **settings):
    settings = {"questions_per_step": 3, "samples_per_question": 4, "max_new_tokens": 22, **settings}
    config, mesh = RLConfig(**settings), make_mesh(MeshConfig(), jax.devices()[:devices])
    found = Packing(config, PolicyObjective.of(config), mesh, sequence_len, prompt)
    return found, found.plans()[0]


def test_micro_batches_are_a_small_part_of_a_batch():
    layout, plan = packing(questions_per_step=32, samples_per_question=8)
    assert [plan.device_rows for plan in layout.plans()] == [4, 2, 1] and plan.accumulation == 64
    layout, plan = packing(device_rows=5)
    assert layout.plans() == (plan,) and (plan.rows, plan.accumulation) == (5, 3)


def test_only_sampled_tokens_and_the_stop_are_targets():
    rows = [
        # A tool forced 11 and 12 in.
        row_of(
            [1, 2, 3],
            Completion([10, 11, 12, 13], [True, False, False, True], STOP, [-1.0, np.nan, np.nan, -2.0, -3.0]),
            0.5,
            True,
        ),
        row_of([4, 5], Completion([20, 21], [True, True], None, [-4.0, -5.0]), -1.0, True),  # ran out of tokens
        row_of([6, 7, 8, 9], Completion([30], [True], STOP, [-6.0, -7.0]), np.nan, True),  # left out
        row_of([3], Completion([31], [True], STOP, [-8.0, -9.0]), 0.0, False),  # as good as the others
    ]
    layout, plan = packing(device_rows=2)
    arrays, tokens, positions = layout.batch(rows, plan)
    assert (tokens, positions) == (7 + 3 + 2, 2 * CONTEXT) and arrays.pop("micro_batches") == 1
    assert {array.shape for array in arrays.values()} == {(6, 2, CONTEXT)}
    first = {name: array[0, 0, :13].tolist() for name, array in arrays.items()}
    assert first["inputs"] == [1, 2, 3, 10, 11, 12, 13, 4, 5, 20, 3, 31, 0]
    assert first["targets"] == [-1, -1, 10, -1, -1, 13, STOP, -1, 20, 21, 31, STOP, -1]
    assert first["behaviour"] == [0, 0, -1, 0, 0, -2, -3, 0, -4, -5, -8, -9, 0]
    assert first["documents"] == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 0]
    assert first["advantages"] == [0.5] * 7 + [-1.0] * 3 + [0.0] * 3
    assert arrays["shares"][arrays["targets"] >= 0].tolist() == [np.float32(1 / 5)] * 7  # of those that can teach
    assert (arrays["targets"].reshape(-1)[13:] == -1).all()


def test_a_row_that_fills_the_context_stays_within_it():
    layout, plan = packing()
    row = row_of(list(range(CONTEXT - 1)), Completion([7], [True], None, [-1.0]), 1.0, True)
    longer = row_of(list(range(CONTEXT - 1)), Completion([7, 8], [True, True], STOP, [-1.0] * 3), 1.0, True)
    arrays, tokens, _ = layout.batch([row, longer], plan)
    assert tokens == CONTEXT - 1 + CONTEXT and arrays["inputs"].shape[1:] == (1, CONTEXT)
    assert sorted(arrays["targets"][arrays["targets"] >= 0].tolist()) == [7, 7, 8]


def sampled(lengths, seed=0, prompts=(2, 9)):
    """Rows of a number of tokens each, in which the model chose most of what follows the prompt."""
    draw = np.random.default_rng(seed)
    for number, length in enumerate(lengths):
        prompt = min(int(draw.integers(*prompts)), length - 2)
        own = np.arange(length) >= prompt
        own[prompt + 1 : -1] &= draw.random(length - prompt - 2) < 0.8
        behaviour = np.where(own, -draw.uniform(2, 6, length), 0)
        yield Row(
            draw.integers(0, MODEL.vocab_size, length).tolist(),
            own.tolist(),
            behaviour.tolist(),
            float(draw.normal()),
            bool(number % 5),
        )


LENGTHS = [32, 20, 11, 7, 17, 25, 12, 9, 18, 5]


def alone(rows, config):
    """The batch with a row for each, and nothing that says so."""
    shape, every = (1, len(rows), CONTEXT), bool(config.kl or config.entropy)
    batch = {name: np.zeros(shape, np.float32) for name in ("advantages", "behaviour")}
    batch |= {"inputs": np.zeros(shape, np.int32), "targets": np.full(shape, -1, np.int32)}
    for i, row in enumerate(rows):
        for at, token in enumerate(row.tokens[1:]):
            batch["inputs"][0, i, at] = row.tokens[at]
            batch["targets"][0, i, at] = token if row.sampled[at + 1] else -1
            batch["advantages"][0, i, at], batch["behaviour"][0, i, at] = row.advantage, row.behaviour[at + 1]
    counts = np.sum(batch["targets"][0] >= 0, axis=1) * [row.taught or every for row in rows]
    own = shares(counts, config.average, config.max_new_tokens).astype(np.float32)
    return batch | {"shares": np.broadcast_to(own[:, None], shape)}


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.1, x.shape), x.dtype), abstract_params(MODEL))


SGD = optax.sgd(1e3)  # the step is then the gradient itself, and the parameters' rounding small beside it


@functools.cache
def train_step(objective, mesh, model):
    return make_train_step(model, SGD, Compute(mesh=mesh), objective=objective)


def gradient(params, batch, objective, mesh, model=BORDERED):
    state, metrics = train_step(objective, mesh, model)(init_state(jax.tree.map(jnp.copy, params), SGD), batch)
    return jax.tree.map(lambda after, before: np.asarray(after) - np.asarray(before), state["params"], params), metrics


GSPO = {"method": "gspo", "clip_low": 0.2, "clip_high": 0.3, "average": "answers", "kl": 0.1, "entropy": 0.1}
# By settings: on how many devices, in rows of how many at once, and by which factor longer; then the shapes and how
# many of the micro-batches have answers.
LAYOUTS = [
    (GSPO, {(1, 4, 2): (3, 2, 64, 2), (2, 2, 1): (3, 4, 32, 2)}),
    ({"method": "reinforce", "average": "length"}, {(1, 1, 1): (12, 1, 32, 5)}),
]


@pytest.mark.parametrize("settings, layouts", LAYOUTS, ids=["gspo", "reinforce"])
def test_the_gradient_is_that_of_a_row_for_each_answer(params, settings, layouts):
    """In one micro-batch or several, in rows of two lengths, on one device or two, with a border token or without."""
    rows = list(sampled(LENGTHS))
    assert any(BORDERED.border_token in row.tokens for row in rows)
    before = jax.tree.map(lambda x: 0.9 * x, params)  # whose log-probabilities are the reference
    config = RLConfig(max_new_tokens=22, **settings)
    objective, expected = PolicyObjective.of(config), alone(rows, config)
    if config.kl:
        everywhere = {"documents": np.ones_like(expected["inputs"]), "micro_batches": 1}
        expected["reference"] = reference_of(MODEL, before, Compute(), 1.0)({**expected, **everywhere})
    exact, measured = gradient(params, expected, objective, None, MODEL)
    for (devices, device_rows, factor), shape in layouts.items():
        layout, plan = packing(devices=devices, device_rows=device_rows, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxchat.rl.rows.FACTORS", (factor,))
            arrays = layout.batch(rows, plan).arrays
        assert (*arrays["inputs"].shape, int(arrays["micro_batches"])) == shape
        batch = {
            name: put_whole(layout.mesh, array, MICRO_BATCH_SPEC if array.ndim else NOWHERE)
            for name, array in arrays.items()
        }
        if config.kl:
            batch["reference"] = reference_of(BORDERED, before, Compute(mesh=layout.mesh), 1.0)(batch)
            assert batch["reference"].sharding == batch["targets"].sharding
        found, metrics = gradient(params, batch, objective, layout.mesh)
        for wanted, own in zip(jax.tree.leaves(exact), jax.tree.leaves(found), strict=True):
            assert np.abs(wanted).max() > 0
            np.testing.assert_allclose(own, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=str(shape))
        for name in measured:
            np.testing.assert_allclose(metrics[name], measured[name], rtol=1e-4, err_msg=name)


def test_micro_batches_beyond_their_number_are_not_computed(params):
    layout, plan = packing(device_rows=1, average="length")
    arrays = layout.batch(list(sampled(LENGTHS)), plan).arrays
    beyond = {name: np.array(array) for name, array in arrays.items()}
    for name in ("inputs", "targets", "advantages", "shares"):
        beyond[name][arrays["micro_batches"] :] = 1
    exact, found = (gradient(params, batch, layout.objective, layout.mesh)[0] for batch in (arrays, beyond))
    jax.tree.map(np.testing.assert_array_equal, exact, found)


def lengths_like(name, draw, questions, samples):
    """Tokens of the answers with their questions, as models of a few hundred steps write them."""
    if name == "equal":  # a little more than half of a row
        return np.full(questions * samples, 150)
    prompt, spread, answer, most = {"quickstart": (28, 6, 18, 64), "gsm8k": (75, 27, 95, 256)}[name]
    prompts = np.repeat(np.clip(draw.normal(prompt, spread, questions), 8, 3 * prompt), samples)
    answers = np.minimum(answer * draw.lognormal(-0.1, 0.5, questions * samples), most)
    return (prompts + answers).astype(int)


@pytest.mark.parametrize("name, context, most", [("quickstart", 128, 64), ("gsm8k", 2048, 256), ("equal", 1024, 130)])
@pytest.mark.parametrize("devices", [1, 2])
def test_most_positions_hold_tokens_in_few_shapes(name, context, most, devices):
    """Of one batch after another, of which more or fewer questions have something to teach."""
    layout, plan = packing(
        devices, context, prompt=120, max_new_tokens=most, questions_per_step=16, samples_per_question=16
    )
    draw, shapes, totals = np.random.default_rng(0), set(), np.zeros(2)
    bound = layout.abstract(plan)["inputs"].shape
    for number in range(20):
        lengths = lengths_like(name, draw, 3 + number % 14, 16)
        batch = layout.batch(list(sampled(lengths, prompts=(4, 8))), plan)
        totals += batch.tokens, batch.positions
        shape = batch.arrays["inputs"].shape
        shapes.add(shape)
        assert shape[1] * shape[2] <= bound[1] * bound[2] and math.prod(shape) <= 1.1 * math.prod(bound)
    assert totals[0] / totals[1] >= FULL
    assert len(shapes) <= 3


def test_without_answers_nothing_is_computed():
    layout, plan = packing()
    arrays, tokens, positions = layout.batch([], plan)
    assert tokens == positions == arrays["micro_batches"] == 0 and (arrays["targets"] == -1).all()
