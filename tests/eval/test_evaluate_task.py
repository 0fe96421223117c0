"""Scores of tasks with a model that knows the answers to some of their questions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.errors import UserError
from jaxchat.eval.chat import Answer, choose, evaluate_task, prompts_of
from jaxchat.eval.statistics import pass_at_k, wilson_interval
from jaxchat.infer.engine import Engine
from jaxchat.infer.request import NO_OUTPUT
from jaxchat.model import reference
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.tasks.answers import score_choice
from jaxchat.tasks.base import ListTask, Mode, multiple_choice_question, question_and_answer
from jaxchat.tasks.checkable import Checkable
from jaxchat.tokenizer import Tokenizer
from jaxchat.tools.calculator import calculate
from jaxchat.train.step import init_state, make_train_step

SUMS = [(2, 3), (4, 4), (6, 1), (5, 4), (3, 3), (8, 1)]
CHOICES = [("sky", 0), ("sea", 2), ("sun", 1), ("ash", 3), ("ice", 1)]
LENGTH = 160


class Choices(ListTask):
    kind = "multiple_choice"

    def score(self, conversation, completion, *, cut=False):
        return score_choice(conversation, completion, cut=cut)


def call(a, b, answer):
    parts = [("python", f"{a}+{b}"), ("python_output", str(a + b)), ("text", answer)]
    return [{"type": kind, "text": text} for kind, text in parts]


@pytest.fixture(scope="module")
def sums():
    return Checkable(
        "sums", [question_and_answer(f"{a} and {b}?", call(a, b, str(a + b)), answer=str(a + b)) for a, b in SUMS]
    )


@pytest.fixture(scope="module")
def choices():
    return Choices(
        "choices", [multiple_choice_question(f"{word}?", ("p", "q", "r", "s"), gold) for word, gold in CHOICES]
    )


@pytest.fixture(scope="module")
def engine(sums, choices):
    tokenizer = Tokenizer.train_from_iterator(["Respond only with the letter of the correct answer. " * 3], 300)
    config = GPTConfig(depth=2, sequence_len=LENGTH, vocab_size=tokenizer.vocab_size)
    # It learns the last sum and the last choice wrong.
    lessons = [*sums[:-1], question_and_answer("8 and 1?", call(8, 1, "10")), *choices[:-1]]
    lessons.append(multiple_choice_question("ice?", ("p", "q", "r", "s"), 0))
    shape = (1, len(lessons), LENGTH)
    inputs, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for i, lesson in enumerate(lessons):
        ids, mask = map(np.array, tokenizer.render_conversation(lesson, max_tokens=LENGTH + 1))
        inputs[0, i, : len(ids) - 1] = ids[:-1]
        targets[0, i, : len(ids) - 1] = np.where(mask[1:] == 1, ids[1:], -1)
    optimizer = optax.adam(3e-3)
    step = make_train_step(config, optimizer)
    state = init_state(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)), optimizer)
    for _ in range(100):
        state, metrics = step(state, {"inputs": jnp.asarray(inputs), "targets": jnp.asarray(targets)})
    assert metrics["loss"] < 0.05
    return Engine(config, state["params"], tokenizer, dtype=jnp.float32)


def test_generative(engine, sums):
    result = evaluate_task(engine, sums, max_new_tokens=16, batch_size=8)
    assert (result.name, result.count) == ("sums", 6)
    assert result.score == pytest.approx(5 / 6)
    said = "<|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>5"
    assert result.answers[0] == Answer("2 and 3?", said, right="5", score=1.0, cut=False, calculations=1)
    assert [answer.index for answer in result.answers] == [*range(6)]
    assert (result.cut, result.too_long, len(result.answers)) == (0, 0, 6)
    few = evaluate_task(engine, sums, max_new_tokens=16, batch_size="auto", limit=3)
    assert (few.count, [answer.index for answer in few.answers]) == (3, [0, 2, 4])


def test_multiple_choice(engine, choices):
    result = evaluate_task(engine, choices, batch_size=8)
    assert result.score == pytest.approx(4 / 5)
    assert [(answer.answer, answer.right) for answer in result.answers] == [*zip("ACBDA", "ACBDB", strict=True)]
    for size in (2, "auto"):
        other = evaluate_task(engine, choices, batch_size=size)
        for one, two in zip(result.answers, other.answers, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
            assert dataclasses.replace(one, logprobs=None) == dataclasses.replace(two, logprobs=None)


def test_the_choice_is_the_letters_likelihood_whatever_else_is_likelier(engine):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in (3, 9, 15, 4)]
    letters = [("A", "B"), ("D", "A", "C"), tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), ("F",)]
    config, padded = engine.model_config, np.zeros((4, 15), np.int32)
    for i, prompt in enumerate(prompts):
        padded[i, : len(prompt)] = prompt
    forward = jax.jit(lambda params, tokens: logits(config, params, hidden_states(config, params, tokens)))
    scores = np.asarray(forward(engine.params, padded))
    chosen = choose(engine, prompts, letters, batch_size=8)
    for i, (offered, answer) in enumerate(zip(letters, chosen, strict=True)):
        row = scores[i, len(prompts[i]) - 1].astype(np.float64)
        assert answer.letter == max(offered, key=lambda letter, row=row: row[ord(letter)])
        likely = {letter: row[ord(letter)] - np.logaddexp.reduce(row) for letter in offered}
        assert answer.logprobs == pytest.approx(likely, abs=1e-4)


@pytest.mark.parametrize("kind", ["sums", "choices"])
def test_a_question_that_does_not_fit_scores_nothing(engine, sums, choices, kind):
    task = {"sums": sums, "choices": choices}[kind]
    endless = {**task[1], "messages": [{"role": "user", "content": "so " * LENGTH}, task[1]["messages"][1]]}
    mixed = type(task)(kind, [task[0], endless])
    result = evaluate_task(engine, mixed, max_new_tokens=16, batch_size=8)
    assert (result.score, result.count, result.too_long, result.answers[1].answer) == (0.5, 2, 1, "")
    assert f"{result}".strip() == "50.0% (9.5 to 90.5) of 2 (1 too long to ask)"
    assert (result.low, result.high) == wilson_interval(0.5, 2)


def test_answers_without_room_are_cut_and_say_nothing(engine, sums):
    # Room for a part of the call, for the call, for its output, and for a number that could go on.
    for longest in (2, 5, 8, 9):
        result = evaluate_task(engine, sums, max_new_tokens=longest, batch_size=8)
        assert (result.cut, result.score) == (6, 0) and all(answer.cut for answer in result.answers)
        assert f"{result}".strip() == "0.0% (0.0 to 39.0) of 6 (6 cut)"


def test_several_samples_of_a_question(engine, sums):
    seen = []
    # So hot that answers differ, and some are right: it knows these sums by heart.
    options = {"max_new_tokens": 16, "temperature": 2.0, "batch_size": 16}
    result = evaluate_task(engine, sums, samples=6, **options, progress=lambda *numbers: seen.append(numbers))
    rights = [sum(sample.score for sample in answer.samples) for answer in result.answers]
    assert len({sample.answer for answer in result.answers for sample in answer.samples}) > 6
    assert 0 < sum(rights) < 36
    assert [answer.score for answer in result.answers] == pytest.approx([right / 6 for right in rights])
    assert result.score == pytest.approx(sum(rights) / 36) == result.pass_at[1]
    assert result.pass_at[6] == sum(right > 0 for right in rights) / 6  # any of all samples
    assert result.pass_at[4] == pytest.approx(np.mean([pass_at_k(6, int(right), 4) for right in rights]))
    assert list(result.pass_at) == [1, 2, 4, 6] and result.samples == 6
    assert result.cut == sum(sample.cut for answer in result.answers for sample in answer.samples)
    assert all((a.answer, a.cut) == (a.samples[0].answer, a.samples[0].cut) for a in result.answers)
    assert "of 6, 6 samples each" in str(result)
    assert seen[-1] == (36, 36) and seen == sorted(seen)
    assert evaluate_task(engine, sums, samples=6, **options) == result  # the seed decides
    other = evaluate_task(engine, sums, samples=6, **options, seed=1)
    assert other.answers != result.answers


def test_letters_have_no_samples(engine, choices):
    result = evaluate_task(engine, choices, samples=3, temperature=1.0, batch_size=8)
    assert (result.samples, result.pass_at) == (1, {}) and not any(answer.samples for answer in result.answers)


def test_what_cannot_be_asked_is_refused(engine, sums):
    with pytest.raises(UserError, match="sums has no questions"):
        evaluate_task(engine, Checkable("sums", []))
    with pytest.raises(UserError, match="4 samples of a question are all the same at temperature 0; choose one above"):
        evaluate_task(engine, sums, samples=4)
    with pytest.raises(UserError, match="samples is 0; it must be at least 1"):
        evaluate_task(engine, sums, samples=0, temperature=1.0)
    with pytest.raises(UserError, match="the choice 'AB' is 2 tokens of this vocabulary; it must be one"):
        choose(engine, [[1, 2]], [("A", "AB")], 1)


# --- tasks with a mode ------------------------------------------------------------------------------------------------

MODE = Mode(prompt_tokens=90, max_new_tokens=10, top_k=50, seed=42, calculator=lambda call: "7", any_of_samples=True)


def with_mode(task, **changes):
    moded = type(task)(task.name, list(task))
    moded.mode = dataclasses.replace(MODE, **changes)
    return moded


@pytest.fixture(scope="module")
def short():
    """An engine with random parameters and a context of 64 tokens, and its logits after a prompt, in NumPy."""
    tokenizer = Tokenizer.train_from_iterator(["Respond only with the letter of the correct answer. " * 3], 300)
    config = GPTConfig(depth=2, sequence_len=64, vocab_size=tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
    as_numpy = jax.tree.map(np.asarray, params)
    return Engine(config, params, tokenizer, dtype="float32"), lambda ids: reference.logits(config, as_numpy, ids)[-1]


def test_letters_are_chosen_beyond_the_context(short):
    engine, last = short
    task = with_mode(
        Choices(
            "far",
            [
                multiple_choice_question(f"{word} " * 20, ("p", "q", "r"), 1, letters=letters, id=word, subject="x")
                for word, letters in (("sky", "123"), ("a", "ABC"), ("earth", "321"))
            ],
        )
    )
    prompts = prompts_of(task, list(task), engine.tokenizer)
    start = engine.tokenizer.encode_special("<|assistant_start|>")
    assert {len(prompt) for prompt in prompts} == {79, 91} and {prompt[-1] for prompt in prompts} == {
        start
    }  # cut to 90
    result = evaluate_task(engine, task, batch_size=4)
    assert (result.too_long, result.count) == (0, 3)
    for answer, prompt, item in zip(result.answers, prompts, task, strict=True):
        row = last(prompt)
        likely = {letter: row[ord(letter)] - np.logaddexp.reduce(row) for letter in item["letters"]}
        assert answer.answer == max(likely, key=likely.__getitem__)
        assert answer.logprobs == pytest.approx(likely, abs=1e-4)
        assert (answer.id, answer.subject) == (item["id"], "x")
    task.mode = None
    assert evaluate_task(engine, task).too_long == 3


def test_answers_are_written_beyond_the_context(short):
    engine, last = short
    questions = [question_and_answer("so " * count, "x", answer="0") for count in (5, 18, 40)]
    task = with_mode(Checkable("far", questions))
    prompts = prompts_of(task, questions, engine.tokenizer)
    assert len(prompts[0]) < 64 < len(prompts[1]) + 10 and len(prompts[2]) == 91
    result = evaluate_task(engine, task, max_new_tokens=3, batch_size=4)
    assert (result.too_long, result.cut) == (0, 3)
    for answer, prompt in zip(result.answers, prompts, strict=True):
        written = []
        while len(written) < 10 and (token := int(np.argmax(last(prompt + written)))) not in engine.stops:
            written.append(token)
        assert answer.answer == engine.tokenizer.decode(written)
    assert engine.model_config.sequence_len == 64


def test_calls_go_to_the_modes_calculator(engine, sums):
    calls = []
    task = with_mode(sums, max_new_tokens=16, calculator=lambda call: calls.append(call) or "7")
    result = evaluate_task(engine, task)
    assert sorted(calls) == sorted(f"{a}+{b}" for a, b in SUMS)
    for (a, b), answer in zip(SUMS, result.answers, strict=True):
        said = f"<|python_start|>{a}+{b}<|python_end|><|output_start|>7<|output_end|>"
        assert answer.answer.startswith(said)
    prompts = prompts_of(sums, list(sums), engine.tokenizer)
    options = {"max_new_tokens": 16, "temperature": 0.0}
    silent = engine.generate(prompts, tool=lambda call: NO_OUTPUT, **options)
    assert all(all(completion.sampled) for completion in silent)  # nothing is put in
    result = evaluate_task(engine, with_mode(sums, max_new_tokens=16, calculator=lambda call: None))
    assert [answer.answer for answer in result.answers] == [engine.tokenizer.decode(row.tokens) for row in silent]


def test_the_mode_decides_whatever_the_caller_wants(engine, sums):
    task = with_mode(sums, max_new_tokens=16, calculator=calculate)
    options = {"samples": 4, "temperature": 2.0, "batch_size": 32}
    result = evaluate_task(engine, task, **options, seed=1)
    assert evaluate_task(engine, task, **options, seed=2, max_new_tokens=1) == result
    assert result.score == result.pass_at[4] > result.pass_at[1]  # any of all samples
