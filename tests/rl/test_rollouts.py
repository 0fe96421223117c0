"""Rewards to weights, rollouts to batches, and what a step of REINFORCE does to the parameters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import MeshConfig, OptimizerConfig, RLConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.ops.compute import FP32
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.rl.reward import own_reward
from jaxchat.rl.rollouts import Rollouts, questions_of, sampling, score
from jaxchat.rl.rows import row_of
from jaxchat.stages.rl import reference_of
from jaxchat.tasks.base import ListTask
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.step import init_state, make_train_step

CONTEXT = 32
TEXTS = ("go", "say it", "well?", "and?")
MODEL = GPTConfig(depth=1, sequence_len=CONTEXT, vocab_size=265)


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


class Kept:
    """What was to be recorded."""

    def __init__(self):
        self.samplings = []

    def __call__(self, step, questions, completions, rewards, advantages, used):
        self.samplings.append((step, questions, completions, rewards, advantages, used))


def rollouts(tokenizer, params, task_type: type[ListTask] = Lowercase, texts=TEXTS, **settings):
    settings = {"questions_per_step": 3, "samples_per_question": 4, "max_new_tokens": 6, "device_rows": 4, **settings}
    messages = ({"role": "user", "content": text} for text in texts)
    task = task_type("lowercase", [{"messages": [m, {"role": "assistant", "content": "a"}]} for m in messages])
    questions, engine = questions_of([task], tokenizer, CONTEXT), Engine(MODEL, params, tokenizer, dtype="float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Rollouts(RLConfig(**settings), questions, engine, mesh=mesh, seed=3, record=Kept())


def prompts_of(source, number=0):
    """The prompts of a batch, once for each sample, and their questions."""
    asked = [
        question for question in source.record.samplings[number][1] for _ in range(source.config.samples_per_question)
    ]
    return [source.tokenizer.render_for_completion(conversation) for _, conversation in asked], asked


def answers_in(batch):
    """How many answers of a batch have targets."""
    documents, targets = (np.concatenate(np.asarray(batch[name])) for name in ("documents", "targets"))
    return sum(len(set(own[row >= 0].tolist())) for own, row in zip(documents, targets, strict=True))


def train_step(source, optimizer):
    return make_train_step(MODEL, optimizer, objective=source.objective)


def test_questions_that_fill_the_context_are_left_out(tokenizer):
    def conversation(length):
        return {"messages": [{"role": "user", "content": "x" * length}, {"role": "assistant", "content": "y"}]}

    # <|bos|>, <|user_start|>, the text, <|user_end|>, <|assistant_start|>
    task = Lowercase("lowercase", [conversation(CONTEXT - 4), conversation(CONTEXT - 5), conversation(1)])
    assert [q[1] for q in questions_of([task], tokenizer, CONTEXT)] == [task[1], task[2]]


def test_gradient_is_reinforce(tokenizer, params):
    source = rollouts(tokenizer, params)
    batch, extra = source.next_batch(0, params)

    # The sampled tokens, and the objective written out: sum of (r - mean r) log p(token) over their number.
    prompts, asked = prompts_of(source)
    source.engine.params = params
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
    step = train_step(source, optimizer)
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


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "reinforce", "samples_per_question": 3},
        {"method": "best_of_n", "samples_per_question": 3},
        {"method": "gspo", "advantage": "standardised", "samples_per_question": 12},
    ],
    ids=lambda settings: settings["method"],
)
def test_equal_rewards_change_nothing(tokenizer, params, settings):
    """Neither parameters nor moments: not by rounding, momentum or weight decay."""
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), MODEL, lambda count: 1.0)
    taught = rollouts(tokenizer, params, **settings)
    step = train_step(taught, optimizer)
    batch, _ = taught.next_batch(0, params)
    state, _ = step(init_state(jax.tree.map(jnp.copy, params), optimizer), jax.device_get(batch))
    before = jax.device_get(state)
    source = rollouts(tokenizer, params, Constant, **settings)
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


def test_the_sampler_knows_the_probabilities_that_training_computes(tokenizer, params):
    """At the temperature of the samples; and asking for them changes no sample."""
    source = rollouts(tokenizer, params, temperature=0.7, questions_per_step=2, max_new_tokens=8)
    batch, extra = source.next_batch(0, params)
    assert 0 <= extra["forged"] <= 1
    _, metrics = train_step(source, optax.sgd(0.0))(
        init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.0)), jax.device_get(batch)
    )
    assert metrics["logprob_difference"] < 2e-5 and metrics["ratio_outside"] == 0
    assert 0 < metrics["entropy"] < np.log(MODEL.vocab_size)
    prompts, _ = prompts_of(source)
    source.engine.params = params
    plain = source.engine.generate(prompts, **sampling(source.config), seed=3 * 1_000_003 + 1)
    scored = source.engine.generate(prompts, **sampling(source.config), seed=3 * 1_000_003 + 1, logprobs=True)
    assert [(c.tokens, c.stop) for c in plain] == [(c.tokens, c.stop) for c in scored]
    assert all(not c.logprobs for c in plain)
    assert all(len(c.logprobs) == len(c.tokens) + c.finished for c in scored)


def test_the_reference_is_the_model_that_the_training_began_with(tokenizer, params):
    source = rollouts(tokenizer, params, temperature=0.7, kl=0.1)
    source.reference = reference_of(MODEL, params, FP32, 0.7)
    batch, _ = source.next_batch(0, params)
    np.testing.assert_allclose(batch["reference"], np.where(batch["targets"] >= 0, batch["behaviour"], 0), atol=5e-5)


class Sometimes(ListTask):
    """A grader that fails at some answers."""

    def score(self, conversation, completion, *, cut=False):
        share = sum(c.isalpha() for c in completion) / max(1, len(completion))
        return np.nan if share == 0 else np.inf if share == 1 else share


def test_answers_without_a_reward_are_left_out(tokenizer, params):
    source = rollouts(tokenizer, params, Sometimes, samples_per_question=8)
    batch, extra = source.next_batch(0, params)
    rewards = source.record.samplings[0][3]
    left_out = np.isnan(rewards)
    assert extra["unscored"] == left_out.mean() > 0 and extra["reward"] == pytest.approx(np.nanmean(rewards))
    teaches = np.nanmax(rewards, axis=1) > np.nanmin(rewards, axis=1)
    assert extra["questions_used"] == teaches.sum() > 0
    known = [row.advantage for row in source._rows]
    assert len(known) == answers_in(batch) == (~left_out[teaches]).sum()
    of_questions = np.split(np.array(known), np.cumsum((~left_out[teaches]).sum(axis=1))[:-1])
    np.testing.assert_allclose(
        [group.sum() for group in of_questions], 0, atol=1e-12
    )  # the others' mean is theirs alone


def test_a_users_own_function_rewards_in_the_tasks_place(tokenizer, params, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(question, answer, conversation):\n    return len(question) if answer.isascii() else None")
    source = rollouts(tokenizer, params, Constant, samples_per_question=8, max_new_tokens=3)
    with own_reward(f"{file}:f", lambda line: None) as source.own:
        batch, extra = source.next_batch(0, params)
    ((_, _, completions, rewards, _, used),) = source.record.samplings
    _, asked = prompts_of(source)
    for (_, conversation), completion, reward in zip(asked, completions, rewards.flatten(), strict=True):
        if tokenizer.decode(completion.tokens).isascii():
            assert reward == len(conversation["messages"][0]["content"])
        else:
            assert np.isnan(reward)
    assert extra["unscored"] == np.isnan(rewards).mean() > 0 and extra["reward"] == pytest.approx(np.nanmean(rewards))
    assert extra["groups_without_signal"] == 1 and not used.any()


class Half(ListTask):
    """Half of the questions are worth the same whatever the answer: no samples of them can teach anything."""

    def score(self, conversation, completion, *, cut=False):
        hopeless = conversation["messages"][0]["content"].strip() in ("go", "and?")
        return 0.0 if hopeless else sum("a" <= c <= "z" for c in completion) / max(1, len(completion))


def steps_of(source, params, first, last):
    """The batches of some steps, and their metrics apart from what a clock decides."""
    found = []
    for step in range(first, last):
        batch, extra = source.next_batch(step, params)
        found.append((jax.device_get(batch), {k: v for k, v in extra.items() if not k.endswith("per_second")}))
    return found


def gradient_of(source, params, batch):
    optimizer = optax.sgd(1.0)
    state, _ = train_step(source, optimizer)(init_state(jax.tree.map(jnp.copy, params), optimizer), batch)
    return jax.tree.map(lambda after, before: np.asarray(after - before), state["params"], params)


def test_questions_without_signal_are_left_out(tokenizer, params):
    """Which changes the gradient only by rounding; with a KL divergence they count, and stay."""
    source = rollouts(tokenizer, params, Half, questions_per_step=4)
    batch, extra = source.next_batch(0, params)
    (_, questions, completions, rewards, advantages, used) = source.record.samplings[0]
    assert extra["questions_asked"] == 4 and extra["questions_used"] == used.sum() == 2
    assert extra["groups_without_signal"] == 0.5
    assert answers_in(batch) == 8
    everything = [
        row_of(prompt, completion, advantage, bool(used[i // 4]))
        for i, (prompt, completion, advantage) in enumerate(
            zip(prompts_of(source)[0], completions, advantages.flatten(), strict=True)
        )
    ]
    whole = gradient_of(source, params, source.packing.batch(everything, source.plan).arrays)
    for one, other in zip(
        *map(jax.tree.leaves, (gradient_of(source, params, jax.device_get(batch)), whole)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-7)
    near = rollouts(tokenizer, params, Half, questions_per_step=4, kl=0.1)
    near.reference = lambda batch: batch["behaviour"]
    batch, extra = near.next_batch(0, params)
    assert extra["questions_used"] == 4 and answers_in(batch) == 16


def test_others_are_asked_in_place_of_questions_without_signal(tokenizer, params):
    source, calls = rollouts(tokenizer, params, Half, questions_per_step=2, refill=2), []
    generate = source.engine.generate
    source.engine.generate = lambda prompts, **options: calls.append(options["seed"]) or generate(prompts, **options)
    metrics = [extra for _, extra in steps_of(source, params, 0, 4)]
    assert [extra["questions_used"] for extra in metrics] == [2] * 4  # two of the four teach, and all may be asked
    assert all(extra["questions_asked"] <= 4 for extra in metrics)
    assert len(source.record.samplings) == 4 < len(calls) == len(set(calls)) <= 8
    for (_, questions, _, rewards, _, used), extra in zip(source.record.samplings, metrics, strict=True):
        texts = [conversation["messages"][0]["content"] for _, conversation in questions]
        assert len(texts) == extra["questions_asked"] and used.sum() == 2
        assert all(text in ("say it", "well?") for text, one in zip(texts, used, strict=True) if one)
        assert extra["reward"] == pytest.approx(rewards.mean())  # of all, or it would flatter


def test_refills_have_a_bound(tokenizer, params):
    source = rollouts(tokenizer, params, Constant, questions_per_step=1, refill=3)
    (batch, extra), *_ = steps_of(source, params, 0, 1)
    assert extra["questions_asked"] == 3 and extra["questions_used"] == 0
    assert (batch["targets"] >= 0).any() and not batch[
        "advantages"
    ].any()  # the answers are measured, but teach nothing


def test_interrupted_during_a_refill_is_the_uninterrupted_training(tokenizer, params):
    settings = {"texts": [*TEXTS, *(f"{text} " for text in TEXTS)], "questions_per_step": 5, "refill": 2}
    whole, parts = (rollouts(tokenizer, params, Half, **settings) for _ in range(2))
    steps_of(whole, params, 0, 1)
    position = json.loads(json.dumps(whole.get_state()))
    position["choice"] |= {"asked": [0.0], "taught": [0.0]}  # or more would be asked at once, and no refill needed
    for source in (whole, parts):
        source.set_state(position)
    expected, generate, calls = steps_of(whole, params, 1, 3), parts.engine.generate, []

    def interrupted(prompts, **options):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(prompts, **options)

    parts.engine.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        parts.next_batch(1, params)
    resumed = rollouts(tokenizer, params, Half, **settings)
    resumed.set_state(position)
    for (batch, extra), (other, others_extra) in zip(steps_of(resumed, params, 1, 3), expected, strict=True):
        assert extra == others_extra
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
    assert resumed.get_state() == whole.get_state()


def test_a_batch_is_trained_on_several_times(tokenizer, params):
    """The same answers, from which the ratios move away; a training that was interrupted between has them too."""
    settings = {"method": "clipped", "updates_per_batch": 2, "questions_per_step": 2}
    source, optimizer = rollouts(tokenizer, params, **settings), optax.adam(3e-3)
    step = train_step(source, optimizer)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    first, extra = source.next_batch(0, state["params"])
    state, metrics = step(state, jax.device_get(first))
    assert "reward" in extra and metrics["ratio_outside"] == 0 == metrics["clipped"]
    position = json.loads(json.dumps(source.get_state()))
    second, extra = source.next_batch(1, state["params"])
    assert extra == {}
    resumed = rollouts(tokenizer, params, **settings)
    resumed.set_state(position)
    again, _ = resumed.next_batch(1, state["params"])
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(first[name], again[name])
    state, metrics = step(state, jax.device_get(second))
    assert metrics["ratio_outside"] > 0
    assert "rows" not in source.get_state()
    third, extra = source.next_batch(2, state["params"])
    assert "reward" in extra and not np.array_equal(first["inputs"], third["inputs"])
    assert source.signal.steps == 2


def test_a_position_is_of_its_questions(tokenizer, params):
    state = json.loads(json.dumps(rollouts(tokenizer, params).get_state()))
    rollouts(tokenizer, params).set_state(state)
    others = rollouts(tokenizer, params, texts=(*TEXTS[:-1], TEXTS[-1] + "?"))
    with pytest.raises(UserError, match=r"the questions have changed .*: lowercase has other content; .* --redo=rl"):
        others.set_state(state)
    del state["choice"]["fingerprint"]  # as earlier versions wrote it
    others.set_state(state)
    others.set_state({"taken": 5})
    assert "fingerprint" in others.get_state()["choice"]


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
    step = train_step(source, optimizer)
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

    assert 0.09 < rewarded(params) < 0.11
    assert rewarded(state["params"]) > 0.9
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3


def test_the_largest_batch_is_known_before_there_is_one(tokenizer, params):
    source = rollouts(tokenizer, params)
    largest, (batch, _) = source.abstract(source.plan), source.next_batch(0, params)
    assert largest.keys() == batch.keys()
    for name, array in batch.items():
        assert (array.dtype, array.sharding) == (largest[name].dtype, largest[name].sharding)
        assert largest[name].shape == ((3, 4, CONTEXT) if array.ndim else ()) and array.size <= largest[name].size
