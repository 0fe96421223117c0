"""Scores of tasks with a model that knows the answers to some of their questions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.errors import UserError
from jaxchat.eval.chat import Answer, choose, evaluate_task
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.tasks.answers import score_choice
from jaxchat.tasks.base import ListTask, multiple_choice_question, question_and_answer
from jaxchat.tasks.checkable import Checkable
from jaxchat.tokenizer import Tokenizer
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
    assert result.answers[0] == Answer("2 and 3?", said, right="5", score=1.0, cut=False)
    assert (result.cut, result.too_long, len(result.answers)) == (0, 0, 6)
    assert evaluate_task(engine, sums, max_new_tokens=16, batch_size=8, limit=3).count == 3


def test_multiple_choice(engine, choices):
    result = evaluate_task(engine, choices, batch_size=8)
    assert result.score == pytest.approx(4 / 5)
    assert [(answer.answer, answer.right) for answer in result.answers] == [*zip("ACBDA", "ACBDB", strict=True)]
    assert evaluate_task(engine, choices, batch_size=2) == result


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
        row = scores[i, len(prompts[i]) - 1]
        assert answer == max(offered, key=lambda letter, row=row: row[ord(letter)])


@pytest.mark.parametrize("kind", ["sums", "choices"])
def test_a_question_that_does_not_fit_scores_nothing(engine, sums, choices, kind):
    task = {"sums": sums, "choices": choices}[kind]
    endless = {**task[1], "messages": [{"role": "user", "content": "so " * LENGTH}, task[1]["messages"][1]]}
    mixed = type(task)(kind, [task[0], endless])
    result = evaluate_task(engine, mixed, max_new_tokens=16, batch_size=8)
    assert (result.score, result.count, result.too_long, result.answers[1].answer) == (0.5, 2, 1, "")
    assert f"{result}".strip() == "50.0% of 2 (1 too long to ask)"


def test_answers_without_room_are_cut_and_say_nothing(engine, sums):
    # Room for a part of the call, for the call, for its output, and for a number that could go on.
    for longest in (2, 5, 8, 9):
        result = evaluate_task(engine, sums, max_new_tokens=longest, batch_size=8)
        assert (result.cut, result.score) == (6, 0) and all(answer.cut for answer in result.answers)
        assert f"{result}".strip() == "0.0% of 6 (6 cut)"


def test_an_empty_task_is_refused(engine):
    with pytest.raises(UserError, match="sums has no questions"):
        evaluate_task(engine, Checkable("sums", []))
