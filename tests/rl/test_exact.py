"""Sampling and training against exact numbers: a model of which every answer can be listed, and whole training steps.

The model is a GPT. Its head is made so that after each beginning of an answer only four tokens are likely, one of which
ends the answer.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxchat.config import MeshConfig, RLConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.infer.engine import Engine
from jaxchat.model import reference
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params
from jaxchat.model.parameters import shardings
from jaxchat.ops.compute import FP32, Compute
from jaxchat.rl.objectives import PolicyObjective
from jaxchat.rl.rollouts import Rollouts, questions_of
from jaxchat.tasks.base import ListTask
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.step import init_state, make_train_step

MODEL = GPTConfig(depth=1, sequence_len=32, vocab_size=265)
TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
LETTERS, STOP = [ord(letter) for letter in "abc"], TOKENIZER.encode_special("<|assistant_end|>")
OUTPUT = TOKENIZER.encode_special("<|output_start|>")
LONGEST = 3  # tokens
CONVERSATION = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "a"}]}
PROMPT = TOKENIZER.render_for_completion(CONVERSATION)
BEGINNINGS = [ids for count in range(LONGEST) for ids in itertools.product(LETTERS, repeat=count)]
ANSWERS = [(*ids, STOP) for ids in BEGINNINGS] + list(itertools.product(LETTERS, repeat=LONGEST))


def moved(seed=1):
    """Parameters without zeros: the gradient is somewhere else everywhere."""
    leaves, tree = jax.tree.flatten(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    added = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, added)


@pytest.fixture(scope="module")
def params():
    """Four tokens with logits of about 1; those of the others are near -15, and that of <|output_start|> is 1."""
    params = moved()
    rows = np.zeros((len(BEGINNINGS), MODEL.sequence_len), np.int32)
    ends = [len(PROMPT) + len(ids) for ids in BEGINNINGS]
    for row, ids in zip(rows, BEGINNINGS, strict=True):
        row[: len(PROMPT) + len(ids)] = [*PROMPT, *ids]
    hidden = np.asarray(hidden_states(MODEL, params, jnp.array(rows)))[np.arange(len(rows)), np.array(ends) - 1]
    # A direction in which all of these states are alike.
    along = np.linalg.lstsq(hidden.astype(np.float64), np.ones(len(rows)), rcond=None)[0]
    head = np.repeat(-40 * along[:, None], params["head"]["kernel"].shape[1], axis=1)
    head[:, [*LETTERS, STOP]] = np.random.default_rng(0).normal(size=(len(along), 4)) / 6
    head[:, OUTPUT] = along
    return {**params, "head": {"kernel": jnp.array(head, jnp.float32)}}


def distributions(params, temperature=1.0, drawn=None):
    """The logarithms of the probabilities after each beginning, by the NumPy model."""
    found = {}
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for ids in BEGINNINGS:
        scores = reference.logits(MODEL, weights, np.array([*PROMPT, *ids]))[-1][:drawn] / temperature
        found[ids] = scores - np.log(np.sum(np.exp(scores)))
    return found


def cut_to(log_p, top_k):
    """The distribution over the likeliest alone."""
    kept = np.where(log_p >= np.sort(log_p)[-top_k], np.exp(log_p), 0.0)
    return kept / kept.sum()


def probabilities(after):
    """Of all answers, given the probabilities after each beginning."""
    return np.array(
        [np.prod([after[answer[:n]][answer[n]] for n in range(len(answer))]) for answer in ANSWERS]
    )  # fmt: skip


def written(completion):
    return (*completion.tokens, *([completion.stop] if completion.finished else []))


def distance(counts, p, total):
    """χ², and what it exceeds once in ten thousand times; what is expected less than five times is one cell."""
    expected, counts = np.append(p, 1 - p.sum()) * total, np.append(counts, total - counts.sum())
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    apart = np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-9))
    return apart, stats.chi2.ppf(0.9999, len(expected) - 1)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.6, None), (1.0, 2)])
def test_answers_come_as_often_as_they_should(params, temperature, top_k):
    drawn, total = TOKENIZER.without_output, 2048
    engine = Engine(MODEL, params, TOKENIZER, dtype="float32", drawn=drawn)
    options = {"max_new_tokens": LONGEST, "temperature": temperature, "top_k": top_k, "seed": 1, "logprobs": True}
    completions = engine.generate([PROMPT] * total, **options)
    found = [written(completion) for completion in completions]
    counts = np.array([found.count(answer) for answer in ANSWERS])
    log_p = distributions(params, temperature, drawn)
    after = {ids: cut_to(values, top_k) if top_k else np.exp(values) for ids, values in log_p.items()}
    apart, most = distance(counts, probabilities(after), total)
    assert apart < most
    other = {ids: np.exp(values) for ids, values in distributions(params, 0.8, drawn).items()}
    assert distance(counts, probabilities(other), total)[0] > 3 * most  # another temperature would be noticed
    assert not any(OUTPUT in completion.tokens for completion in completions)
    # Of the whole vocabulary, whatever was cut off.
    for answer, completion in list(zip(found, completions, strict=True))[:200]:
        if answer in ANSWERS:
            exact = [log_p[answer[:n]][id] for n, id in enumerate(answer)]
            np.testing.assert_allclose(completion.logprobs, exact, atol=5e-5)


def test_the_ids_before_those_of_an_output():
    assert TOKENIZER.without_output == OUTPUT == 263
    other = Tokenizer([bytes([i]) for i in range(256)])
    swapped = {"<|output_start|>": TOKENIZER.bos_token_id, "<|bos|>": OUTPUT}
    other.special_tokens = {**other.special_tokens, **swapped}
    assert other.without_output == 265  # another order, as a foreign vocabulary may have


class Lowercase(ListTask):
    def score(self, conversation, completion, *, cut=False):
        return sum("a" <= c <= "z" for c in completion) / max(1, len(completion))


def rollouts(params, dtype="float32", drawn=None, **settings):
    settings = {"questions_per_step": 3, "samples_per_question": 4, "max_new_tokens": 8, **settings}
    messages = ({"role": "user", "content": text} for text in ("go", "say it", "well?"))
    task = Lowercase("lowercase", [{"messages": [m, {"role": "assistant", "content": "a"}]} for m in messages])
    engine = Engine(MODEL, params, TOKENIZER, dtype=dtype, drawn=drawn)
    questions, mesh = questions_of([task], TOKENIZER, MODEL.sequence_len), make_mesh(MeshConfig(), jax.devices()[:1])
    return Rollouts(RLConfig(**settings), questions, engine, mesh=mesh, seed=3)


@functools.cache
def still(objective, dtype):
    """A step that changes nothing."""
    return make_train_step(MODEL, optax.sgd(0.0), Compute(jnp.dtype(dtype)), objective=objective)


def measured(objective, batch, params, dtype="float32"):
    state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.0))
    return still(objective, dtype)(state, jax.device_get(batch))[1]


def test_training_knows_that_outputs_are_never_sampled(params):
    source = rollouts(params, drawn=TOKENIZER.without_output)
    batch, extra = source.next_batch(0, params)
    assert extra["forged"] == 0
    metrics = measured(source.objective, batch, params)
    assert metrics["logprob_difference"] < 2e-5 and abs(metrics["kl_from_sampling"]) < 1e-6
    everything = dataclasses.replace(source.objective, drawn=None)
    assert measured(everything, batch, params)["logprob_difference"] > 0.02
    # The samples of a question read it once.
    lengths = [len(TOKENIZER.render_for_completion(conversation)) for _, conversation in source.questions]
    engine = source.engine
    assert (engine.prefix_queries, engine.prefix_hits) == (4 * sum(lengths), 3 * sum(lengths))


def test_the_precision_of_sampling_is_measured():
    """bf16 differs by rounding; other parameters by more than that."""
    params = moved()
    params["head"] = {"kernel": jax.random.normal(jax.random.key(5), params["head"]["kernel"].shape) / 3}
    before = len([array for array in jax.live_arrays() if array.dtype == jnp.bfloat16])
    source = rollouts(params, "bfloat16", temperature=0.7)
    batch, _ = source.next_batch(0, params)
    # Between two samplings there is no second copy of the parameters.
    assert len([array for array in jax.live_arrays() if array.dtype == jnp.bfloat16]) == before
    metrics = measured(source.objective, batch, params, "bfloat16")
    assert 0 < metrics["probability_difference"] < 0.005 and metrics["ratio_outside"] < 0.1
    assert metrics["kl_from_sampling"] > 0
    other = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(6), leaf.shape), params)
    assert measured(source.objective, batch, other, "bfloat16")["probability_difference"] > 0.01


# --- whole steps, on batches written by hand --------------------------------------------------------------------------


def batch_of(length=16, rows=4, seed=0):
    """Rows [1, rows, length] of a prompt, sampled tokens, forced ones and sampled ones; the last is left out."""
    rng = np.random.default_rng(seed)
    batch = {
        "inputs": np.zeros((rows, length), np.int32),
        "targets": np.full((rows, length), -1, np.int32),
        **{name: np.zeros((rows, length), np.float32) for name in ("advantages", "behaviour", "reference", "shares")},
    }
    ends = [16 if row == 0 else 10 + row for row in range(rows)]
    for row, end in enumerate(ends):
        batch["inputs"][row, :end] = rng.integers(0, 256, end)
        if row == rows - 1:
            continue
        for place in [3, 4, 5, *range(8, end)]:
            batch["targets"][row, place] = batch["inputs"][row, place + 1] if place + 1 < end else STOP
            batch["behaviour"][row, place] = rng.normal() / 2 - 5.5
            batch["reference"][row, place] = batch["behaviour"][row, place] - 0.3
        batch["advantages"][row] = rng.normal()
        batch["shares"][row] = 1 / 40
    return batch, ends


def gradient(objective, batch, params, compute=FP32, accumulation=1):
    """Of a step, by all of the batch's rows: what plain SGD at a rate of 1 subtracts."""
    optimizer = optax.sgd(1.0)
    places = None
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    if compute.mesh is not None:
        places = shardings(compute.mesh, state)
        state = jax.device_put(state, places)
    step = make_train_step(MODEL, optimizer, compute, objective=objective, state_shardings=places)
    parts = {name: array.reshape(accumulation, -1, array.shape[-1]) for name, array in batch.items()}
    after, metrics = step(state, parts)
    changes = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after["params"], params)
    return jax.tree.leaves(changes), metrics


OBJECTIVES = [
    PolicyObjective(),
    PolicyObjective(method="gspo", low=0.2, high=0.3, kl=0.1, entropy=0.1, temperature=0.8),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.method)
def test_what_is_not_trained_on_changes_no_bit(objective):
    """Ids behind the end of a row, all of an answer without a reward, and what stands beside what is no target."""
    params = moved()
    batch, ends = batch_of()
    wanted, metrics = gradient(objective, batch, params)
    assert all(np.abs(leaf).max() > 0 for leaf in wanted)
    held = {name: array.copy() for name, array in batch.items()}
    rng = np.random.default_rng(9)
    for row, end in enumerate(ends):
        held["inputs"][row, end:] = rng.integers(0, 256, held["inputs"].shape[1] - end)
    held["inputs"][-1] = rng.integers(0, 256, held["inputs"].shape[1])
    for name in ("advantages", "behaviour", "reference", "shares"):
        held[name] = np.where(held["targets"] >= 0, held[name], np.float32(np.nan))
    assert not np.array_equal(held["inputs"], batch["inputs"])
    found, others = gradient(objective, held, params)
    for one, other in zip([*wanted, metrics["loss"]], [*found, others["loss"]], strict=True):
        np.testing.assert_array_equal(one, other)


def test_neither_micro_batches_nor_lengths_nor_devices_make_a_difference():
    params, objective = moved(), OBJECTIVES[1]
    batch, _ = batch_of()
    wanted, metrics = gradient(objective, batch, params)
    longer = {
        name: np.pad(array, ((0, 0), (0, 8)), constant_values=-1 if name == "targets" else 0)
        for name, array in batch.items()
    }
    two = Compute(mesh=make_mesh(MeshConfig(), jax.devices()[:2]))
    for found, others in (
        gradient(objective, batch, params, accumulation=4),
        gradient(objective, longer, params),
        gradient(objective, batch, params, compute=two),
    ):
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max() + 3e-7)  # of parameters near 1
        for name in metrics:
            np.testing.assert_allclose(metrics[name], others[name], rtol=1e-4, atol=1e-6, err_msg=name)
