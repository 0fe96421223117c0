"""Rewards to weights, rollouts to batches, and what a step of REINFORCE does to the parameters."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxchat import stopping
from jaxchat.config import MeshConfig, OptimizerConfig, RLConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.infer.engine import Completion, Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.rl.objectives import best_of_n_weights, reinforce_weights
from jaxchat.rl.rollouts import Rollouts, questions_of, sampling, score
from jaxchat.tasks.base import ListTask
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.step import init_state, make_train_step

CONTEXT = 32
MODEL = GPTConfig(depth=1, sequence_len=CONTEXT, vocab_size=265)
rewards = hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(0, 1, width=16))


class Lowercase(ListTask):
    """Worth the share of lower-case letters in the answer: what a model can learn in a few steps."""

    def score(self, conversation, completion, *, cut=False):
        return sum("a" <= c <= "z" for c in completion) / max(1, len(completion))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture(scope="module")
def params():
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(1))
    # Some matrices begin at zero: a model that has moved on from there has a gradient everywhere.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.02 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


class Constant(ListTask):
    """Worth the same whatever the answer; three of it do not have exactly this mean."""

    def score(self, conversation, completion, *, cut=False):
        return 0.1


def rollouts(tokenizer, params, task_type: type[ListTask] = Lowercase, **settings):
    settings = {"questions_per_step": 3, "samples_per_question": 4, "max_new_tokens": 6, "device_rows": 4, **settings}
    messages = ({"role": "user", "content": text} for text in ("go", "say it", "well?", "and?"))
    task = task_type("lowercase", [{"messages": [m, {"role": "assistant", "content": "a"}]} for m in messages])
    questions, engine = questions_of([task], tokenizer, CONTEXT), Engine(MODEL, params, tokenizer, dtype="float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Rollouts(RLConfig(top_k=None, **settings), questions, engine, mesh=mesh, seed=3)


@settings(deadline=None)  # the first call compiles the type checks
@given(rewards)
def test_reinforce_weights(rewards):
    weights = reinforce_weights(rewards)
    for question in range(len(rewards)):
        if len(set(rewards[question].tolist())) == 1:
            assert (weights[question] == 0).all()
        mean = sum(rewards[question]) / len(rewards[question])
        for sample, reward in enumerate(rewards[question]):
            assert weights[question, sample] == pytest.approx(reward - mean, abs=1e-12)


@settings(deadline=None)  # the first call compiles the type checks
@given(rewards)
def test_best_of_n_weights(rewards):
    for row, weights in zip(rewards.tolist(), best_of_n_weights(rewards).tolist(), strict=True):
        if len(set(row)) == 1:
            assert np.isnan(weights).all()
        else:
            best = row.index(max(row))
            assert weights[best] == 1
            assert np.isnan(weights[:best] + weights[best + 1 :]).all()


def test_scoring_is_left_between_two_answers(tokenizer):
    """Each may be a program that runs for seconds."""

    class Slow(ListTask):
        def score(self, conversation, completion, *, cut=False):
            scored.append(completion)
            signal.raise_signal(signal.SIGTERM)
            return 0.0

    scored, question = [], {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    task = Slow("slow", [question])
    answers = [
        Completion(tokenizer.encode(text), [True], tokenizer.encode_special("<|assistant_end|>")) for text in "ab"
    ]
    with pytest.raises(stopping.Interrupted), stopping.deferred():
        score([(task, question)] * 2, answers, tokenizer)
    assert scored == ["a"]


def test_only_sampled_tokens_and_the_stop_are_targets(tokenizer, params):
    source = rollouts(tokenizer, params, device_rows=2)
    stop = tokenizer.encode_special("<|assistant_end|>")
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    completions = [
        Completion([10, 11, 12, 13], [True, False, False, True], stop),  # a tool forced 11 and 12 in
        Completion([20, 21], [True, True], None),  # ran out of tokens
        Completion([30], [True], stop),  # not trained on
    ]
    batch = source._batch(prompts, completions, np.array([0.5, -1.0, np.nan]))
    assert {array.shape for array in batch.values()} == {(2, 2, 8)}  # 3 rows filled up to 2 x 2; 7 rounded up to 8
    inputs, targets, weights = (batch[name].reshape(4, 8) for name in ("inputs", "targets", "weights"))
    assert inputs[0].tolist() == [1, 2, 3, 10, 11, 12, 13, 0]
    assert targets[0].tolist() == [-1, -1, 10, -1, -1, 13, stop, -1]
    assert inputs[1].tolist() == [4, 5, 20, 0, 0, 0, 0, 0]
    assert targets[1].tolist() == [-1, 20, 21, -1, -1, -1, -1, -1]
    assert (targets[2:] == -1).all()
    trained = targets >= 0
    assert (weights[0][trained[0]] == 0.5).all() and (weights[1][trained[1]] == -1.0).all()


def test_a_row_that_fills_the_context_stays_within_it(tokenizer, params):
    source = rollouts(tokenizer, params)
    batch = source._batch([list(range(CONTEXT - 1))], [Completion([7], [True], None)], np.array([1.0]))
    assert batch["inputs"].shape == (1, 4, CONTEXT)
    assert batch["targets"][0, 0].tolist() == [-1] * (CONTEXT - 2) + [7] + [-1]


def test_questions_that_fill_the_context_are_left_out(tokenizer):
    def conversation(length):
        return {"messages": [{"role": "user", "content": "x" * length}, {"role": "assistant", "content": "y"}]}

    # <|bos|>, <|user_start|>, the text, <|user_end|>, <|assistant_start|>
    task = Lowercase("lowercase", [conversation(CONTEXT - 4), conversation(CONTEXT - 5), conversation(1)])
    assert [q[1] for q in questions_of([task], tokenizer, CONTEXT)] == [task[1], task[2]]


def test_each_epoch_asks_every_question_once(tokenizer, params):
    source = rollouts(tokenizer, params)  # 4 questions, 3 a step
    asked = np.concatenate([source._choose(step) for step in range(8)]).reshape(-1, 4)
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in asked.tolist())
    assert len({tuple(epoch) for epoch in asked.tolist()}) > 1
    assert source._choose(5).tolist() == rollouts(tokenizer, params)._choose(5).tolist()


def test_gradient_is_reinforce(tokenizer, params):
    source = rollouts(tokenizer, params)
    batch, extra = source.next_batch(0, params)

    # The sampled tokens, and the objective written out: sum of (r - mean r) log p(token) over their number.
    asked = [source.questions[i] for i in source._choose(0) for _ in range(4)]
    prompts = [tokenizer.render_for_completion(conversation) for _, conversation in asked]
    completions = source.engine.generate(prompts, **sampling(source.config), seed=3 * 1_000_003 + 1)
    rewards = score(asked, completions, tokenizer)
    assert len(set(rewards)) > 2
    assert extra["reward"] == pytest.approx(np.mean(rewards))
    own = [c.tokens + ([c.stop] if c.finished else []) for c in completions]
    count = sum(map(len, own))

    def objective(params):
        total = 0.0
        for i, (prompt, written) in enumerate(zip(prompts, own, strict=True)):
            advantage = rewards[i] - sum(rewards[i // 4 * 4 : i // 4 * 4 + 4]) / 4
            tokens = jnp.array(prompt + written + [0] * (CONTEXT - len(prompt + written)))[None]
            scores = logits(MODEL, params, hidden_states(MODEL, params, tokens))[0]
            log_p = jax.nn.log_softmax(scores[:, : MODEL.vocab_size], axis=-1)
            places = np.arange(len(prompt), len(prompt) + len(written))
            total += advantage * jnp.sum(log_p[places - 1, tokens[0, places]])
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(objective))(params)
    optimizer = optax.sgd(1.0)  # the step is then the gradient itself
    step = make_train_step(MODEL, optimizer)
    state, metrics = step(init_state(jax.tree.map(jnp.copy, params), optimizer), jax.device_get(batch))
    assert metrics["targets"] == count
    assert float(metrics["loss"]) == pytest.approx(-float(value), rel=1e-4, abs=1e-7)
    for (path, before), after, expected in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(state["params"]),
        jax.tree.leaves(gradient),
        strict=True,
    ):
        scale = float(jnp.abs(expected).max())
        assert scale > 0, path
        np.testing.assert_allclose(after - before, expected, atol=2e-3 * scale + 2e-7, err_msg=str(path))


@pytest.mark.parametrize("method", ["reinforce", "best_of_n"])
def test_equal_rewards_change_nothing(tokenizer, params, method):
    """Neither parameters nor moments: not by rounding, momentum or weight decay."""
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), MODEL, lambda count: 1.0)
    step = make_train_step(MODEL, optimizer)
    taught = rollouts(tokenizer, params, method=method, samples_per_question=3)
    batch, _ = taught.next_batch(0, params)
    state, _ = step(init_state(jax.tree.map(jnp.copy, params), optimizer), jax.device_get(batch))
    before = jax.device_get(state)
    source = rollouts(tokenizer, params, Constant, method=method, samples_per_question=3)
    for number in range(2):
        batch, extra = source.next_batch(number, state["params"])
        assert extra["reward"] == pytest.approx(0.1) and extra["groups_without_signal"] == 1
        state, metrics = step(state, jax.device_get(batch))
        assert float(metrics["grad_norm"]) == 0
    assert source.signal.absent and not taught.signal.absent
    jax.tree.map(np.testing.assert_array_equal, state["params"], before["params"])
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    kept = [leaf for leaf in jax.tree.leaves(before["opt_state"]) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(moments) == len(kept) > 0
    for moment, own in zip(moments, kept, strict=True):
        np.testing.assert_array_equal(moment, own)


def test_rollouts_count_what_was_cut_and_taught(tokenizer, params):
    source = rollouts(tokenizer, params, Constant)
    _, extra = source.next_batch(0, params)
    assert extra["groups_without_signal"] == 1 and 0 <= extra["cut"] <= 1
    again = rollouts(tokenizer, params, Constant)
    again.set_state(source.get_state())
    assert again.signal == source.signal and again.taken == 1
    again.set_state({"taken": 5})  # of a checkpoint that did not count
    assert not again.signal.absent and again.signal.facts() == {}


@pytest.mark.parametrize("method", ["reinforce", "best_of_n"])
def test_a_few_steps_make_the_rewarded_likelier(tokenizer, params, method):
    source = rollouts(
        tokenizer, params, method=method, max_new_tokens=2, samples_per_question=16, device_rows=16
    )  # fmt: skip
    optimizer = optax.adam(1e-2)
    step = make_train_step(MODEL, optimizer)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    rewards = []
    for number in range(25):
        batch, extra = source.next_batch(number, state["params"])
        state, _ = step(state, jax.device_get(batch))
        rewards.append(extra["reward"])
    prompt = jnp.array(tokenizer.render_for_completion(source.questions[0][1]))[None]

    def rewarded(params):
        scores = logits(MODEL, params, hidden_states(MODEL, params, prompt))[0, -1]
        return float(jax.nn.softmax(scores)[ord("a") : ord("z") + 1].sum())

    assert rewarded(params) < 0.2
    assert rewarded(state["params"]) > 0.5
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3
