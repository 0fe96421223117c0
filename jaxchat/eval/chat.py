"""Tasks for a chat model: completions that are scored, and multiple choice in one forward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Int

from jaxchat.errors import UserError, check
from jaxchat.infer.engine import SHORTEST_PROMPT, Engine, bucket
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, hidden_states, logits
from jaxchat.ops.compute import Compute
from jaxchat.tasks.base import LETTERS, Conversation, Task
from jaxchat.tasks.items import spread
from jaxchat.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class Answer:
    """A question, what the model answered, and what that earned.

    Attributes:
      question: what the user said last.
      answer: the completion with its special tokens, or the chosen letter; empty if the question could not be asked.
      right: the answer that the task gives.
      cut: the answer had no room to end.
    """

    question: str
    answer: str
    right: str
    score: float
    cut: bool


@dataclass(frozen=True)
class TaskResult:
    """The score of a task.

    Attributes:
      score: the mean over all questions, in [0, 1].
      count: of questions.
      cut: answers that had no room to end, in `max_new_tokens` or in the model's context.
      too_long: questions that fill the model's context, which were not asked and score 0.
      answers: one for each question.
    """

    name: str
    score: float
    count: int
    cut: int
    too_long: int
    answers: tuple[Answer, ...]

    def __str__(self) -> str:
        """Such as `83.5% of 200 (12 cut, 3 too long to ask)`."""
        marks = [f"{self.cut:,} cut"] * (self.cut > 0) + [f"{self.too_long:,} too long to ask"] * (self.too_long > 0)
        return f"{self.score:7.1%} of {self.count:,}" + (f" ({', '.join(marks)})" if marks else "")


def evaluate_task(
    engine: Engine,
    task: Task,
    *,
    limit: int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> TaskResult:
    """Asks the task's questions and scores the answers.

    The answer is a completion with tools, which the task scores; in multiple choice, the most likely of the letters as
    the next token. A question that fills the model's context gets no answer and scores 0.

    Args:
      limit: the most questions to ask, evenly spread over the task.
      batch_size: rows that go through the model at once.

    Raises:
      UserError: the task is empty, or a question is malformed.
    """
    questions = spread(task, limit)
    check(len(questions) > 0, f"task {task.name} has no questions")
    questions = [questions[i] for i in range(len(questions))]
    prompts = prompts_of(task, questions, engine.tokenizer)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < engine.model_config.sequence_len]
    asked = [prompts[i] for i in fitting]
    if task.kind == "multiple_choice":
        letters = choose(engine, asked, [questions[i]["letters"] for i in fitting], batch_size)
        given = [(letter, False) for letter in letters]
    else:
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "max_batch": batch_size}
        completions = engine.generate(asked, **options)
        given = [(engine.tokenizer.decode(completion.tokens), not completion.finished) for completion in completions]
    completed = dict(zip(fitting, given, strict=True))
    answers = tuple(_answer(task, question, *completed.get(i, ("", False))) for i, question in enumerate(questions))
    return TaskResult(
        task.name,
        score=float(np.mean([answer.score for answer in answers])),
        count=len(answers),
        cut=sum(answer.cut for answer in answers),
        too_long=len(questions) - len(fitting),
        answers=answers,
    )


def prompts_of(task: Task, questions: Sequence[Conversation], tokenizer: BaseTokenizer) -> list[list[int]]:
    """The token ids of each question, up to where the assistant's answer starts.

    Raises:
      UserError: a question is malformed.
    """
    prompts = []
    for index, question in enumerate(questions):
        try:
            prompts.append(tokenizer.render_for_completion(question))
        except ValueError as error:
            raise UserError(f"{task.name}: question {index} cannot be asked: {error}") from None
    return prompts


def _answer(task: Task, question: Conversation, answer: str, cut: bool) -> Answer:
    asked = next(m["content"] for m in reversed(question["messages"]) if m["role"] == "user")
    expected = question["messages"][-1]["content"]
    return Answer(
        question=asked,
        answer=answer,
        right=question.get("answer", expected if isinstance(expected, str) else ""),
        score=task.score(question, answer, cut=cut),
        cut=cut,
    )


def choose(engine: Engine, prompts: list[list[int]], letters: list[Sequence[str]], batch_size: int) -> list[str]:
    """For each prompt, the one of its letters that is most likely as the next token."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chosen: list[str] = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        size = engine.batch_size(len(rows))
        longest = min(bucket(len(prompts[rows[-1]]), SHORTEST_PROMPT), engine.model_config.sequence_len)
        tokens, lengths = np.zeros((size, longest), np.int32), np.ones(size, np.int32)
        candidates = np.zeros((size, len(LETTERS)), np.int32)
        for row, i in enumerate(rows):
            tokens[row, : len(prompts[i])], lengths[row] = prompts[i], len(prompts[i])
            ids = [engine.tokenizer.encode(letter)[0] for letter in letters[i]]  # each letter is a token
            # Padded with the first letter, which cannot win against itself.
            candidates[row] = ids + ids[:1] * (len(LETTERS) - len(ids))
        arrays = map(engine.put, (tokens, lengths, candidates))
        best = _likeliest(engine.model_config, Compute(engine.dtype, engine.mesh), engine.params, *arrays)
        best = np.asarray(process_allgather(best, tiled=True))
        for row, i in enumerate(rows):
            chosen[i] = letters[i][int(best[row])]
    return chosen


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likeliest(
    config: GPTConfig,
    compute: Compute,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    candidates: Int[Array, "B L"],
) -> Int[Array, " B"]:
    """The index of each row's candidate with the highest logit after the row's last token; the first among equals."""
    hidden = hidden_states(config, params, tokens, compute)
    scores = logits(config, params, hidden[jnp.arange(len(lengths)), lengths - 1])
    return jnp.argmax(jnp.take_along_axis(scores, candidates, axis=1), axis=1)
