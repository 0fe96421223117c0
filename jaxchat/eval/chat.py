"""Tasks for a chat model: completions that are scored, and multiple choice in one forward pass."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Float, Int

from jaxchat.devices.processes import exchange
from jaxchat.errors import UserError, check
from jaxchat.eval.statistics import pass_at_k, wilson_interval
from jaxchat.infer.capacity import MOST_ROWS
from jaxchat.infer.engine import SHORTEST_PROMPT, Engine, bucket
from jaxchat.infer.request import NO_OUTPUT
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, hidden_states, logits
from jaxchat.ops.compute import Compute
from jaxchat.stopping import raise_if_asked
from jaxchat.tasks.base import LETTERS, Conversation, Mode, Task, calculations_of
from jaxchat.tokenizer import BaseTokenizer

SCORERS = min(4, os.cpu_count() or 1)  # answers that are scored at once, beside the device: a score may run a program
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sample:
    """One of several answers to a question; the attributes are those of `Answer`."""

    answer: str
    score: float
    cut: bool


@dataclass(frozen=True)
class Answer:
    """A question, what the model answered, and what that earned.

    Attributes:
      question: what the user said last.
      answer: the completion with its special tokens, or the chosen letter; empty if the question could not be asked.
        Of several samples, the first.
      right: the answer that the task gives.
      score: of several samples, their mean, or the best one's where the task's mode says so.
      cut: the answer had no room to end.
      index: of the question in the task.
      id, subject: of the question, where the task has them.
      samples: all answers, if there are several.
      logprobs: the log-probability of each letter as the next token, in multiple choice.
      calculations: of the right answer, by the calculator.
    """

    question: str
    answer: str
    right: str
    score: float
    cut: bool
    index: int = 0
    id: str = ""
    subject: str = ""
    samples: tuple[Sample, ...] = ()
    logprobs: dict[str, float] | None = None
    calculations: int = 0


@dataclass(frozen=True)
class TaskResult:
    """The score of a task.

    Attributes:
      score: the mean over all questions, in [0, 1].
      count: of questions.
      cut: answers that had no room to end, in `max_new_tokens` or in the model's context.
      too_long: questions that fill the model's context, which were not asked and score 0.
      answers: one for each question.
      samples: answers that were written to each question.
      pass_at: for several samples and k = 1, 2, 4, ... up to their number, the mean over the questions of the chance
        that one of k samples is right (`statistics.pass_at_k`).
    """

    name: str
    score: float
    count: int
    cut: int
    too_long: int
    answers: tuple[Answer, ...]
    samples: int = 1
    pass_at: Mapping[int, float] = field(default_factory=dict)

    @property
    def low(self) -> float:
        """The lower end of the score's 95 % confidence interval."""
        return wilson_interval(self.score, self.count)[0]

    @property
    def high(self) -> float:
        """The upper end of the score's 95 % confidence interval."""
        return wilson_interval(self.score, self.count)[1]

    def __str__(self) -> str:
        """Such as `83.5% (77.7 to 88.0) of 200 (12 cut, 3 too long to ask)`, with the 95 % interval."""
        marks = [f"{self.cut:,} cut"] * (self.cut > 0) + [f"{self.too_long:,} too long to ask"] * (self.too_long > 0)
        each = f", {self.samples} samples each" if self.samples > 1 else ""
        text = f"{self.score:7.1%} ({100 * self.low:.1f} to {100 * self.high:.1f}) of {self.count:,}{each}"
        return text + (f" ({', '.join(marks)})" if marks else "")


class Choice(NamedTuple):
    """The letter that is most likely as the next token, and the log-probabilities of all that were offered."""

    letter: str
    logprobs: dict[str, float]


def evaluate_task(
    engine: Engine,
    task: Task,
    *,
    limit: int | None = None,
    max_new_tokens: int = 512,
    batch_size: int | Literal["auto"] = 64,
    temperature: float = 0.0,
    seed: int = 0,
    samples: int = 1,
    progress: Progress | None = None,
) -> TaskResult:
    """Asks the task's questions and scores the answers.

    The answer is a completion with tools, which the task scores; in multiple choice, the most likely of the letters as
    the next token. A question that fills the model's context gets no answer and scores 0.

    A task with a mode is asked as that says, whatever `max_new_tokens` and `seed`. Its questions are asked even where
    they, or their answers, do not fit the context of the model, unless that has windows or 8-bit weights.

    Args:
      limit: the most questions to ask, chosen by the task (`Task.subset`).
      batch_size: rows that go through the model at once. "auto": as many as fit into memory, at most `MOST_ROWS`.
      samples: answers to each question, which need a temperature above 0; multiple choice has one in any case.
      progress: called with the number of answers that are scored, and of all.

    Raises:
      UserError: the task is empty, a question is malformed, or several samples would be the same.
    """
    check(samples >= 1, f"samples is {samples}; it must be at least 1")
    check(
        samples == 1 or temperature > 0,
        f"{samples} samples of a question are all the same at temperature 0; choose one above it, such as 0.8",
    )
    places = task.subset(limit)
    check(len(places) > 0, f"task {task.name} has no questions")
    questions = [task[i] for i in places]
    prompts = prompts_of(task, questions, engine.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    context = engine.model_config.sequence_len
    if task.mode is not None:
        options |= _options_of(task.mode)
        engine, context = _with_room(engine, task, max(map(len, prompts)) + task.mode.max_new_tokens)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < context]
    given: list[list[Sample]] = [[] for _ in questions]
    logprobs: dict[int, dict[str, float]] = {}
    if task.kind == "multiple_choice":
        samples, asked = 1, [prompts[i] for i in fitting]
        if batch_size == "auto":
            batch_size = engine.rows_to_read(max(map(len, asked), default=1))
        choices = choose(engine, asked, [questions[i]["letters"] for i in fitting], batch_size, progress)
        for i, choice in zip(fitting, choices, strict=True):
            given[i] = [Sample(choice.letter, task.score(questions[i], choice.letter), False)]
            logprobs[i] = choice.logprobs
    else:
        rows = [i for i in fitting for _ in range(samples)]

        def score(row: int, answer: str, cut: bool) -> float:
            return task.score(questions[rows[row]], answer, cut=cut)

        most = MOST_ROWS if batch_size == "auto" else batch_size  # the cache has room for as many as fit
        written = _write(engine, [prompts[i] for i in rows], score, progress, max_batch=most, **options)
        for i, sample in zip(rows, written, strict=True):
            given[i].append(sample)
    best = task.mode is not None and task.mode.any_of_samples
    answers = tuple(
        _answer(question, index, given[i], best, logprobs.get(i))
        for i, (index, question) in enumerate(zip(places, questions, strict=True))
    )
    return TaskResult(
        task.name,
        score=float(np.mean([answer.score for answer in answers])),
        count=len(answers),
        cut=sum(sample.cut for answered in given for sample in answered),
        too_long=len(questions) - len(fitting),
        answers=answers,
        samples=samples,
        pass_at=_pass_at(given, samples),
    )


def prompts_of(task: Task, questions: Sequence[Conversation], tokenizer: BaseTokenizer) -> list[list[int]]:
    """The token ids of each question, up to where the assistant's answer starts.

    Raises:
      UserError: a question is malformed.
    """
    prompts = []
    for index, question in enumerate(questions):
        try:
            prompt = tokenizer.render_for_completion(question)
        except ValueError as error:
            raise UserError(f"{task.name}: question {index} cannot be asked: {error}") from None
        prompts.append(prompt if task.mode is None else [*prompt[:-1][: task.mode.prompt_tokens], prompt[-1]])
    return prompts


def _options_of(mode: Mode) -> dict[str, Any]:
    """The engine's options for the answers of a task with a mode."""

    def calculator(call: str) -> Any:
        value = mode.calculator(call)
        return NO_OUTPUT if value is None else value

    return {"max_new_tokens": mode.max_new_tokens, "top_k": mode.top_k, "seed": mode.seed, "tool": calculator}


def _with_room(engine: Engine, task: Task, tokens: int) -> tuple[Engine, int]:
    """An engine with a context of at least so many tokens, and what a prompt must be shorter than.

    In multiple choice nothing is written, and rows of any length can be read. The model's windows follow from its
    context, and 8-bit weights cannot be passed on: such engines stay as they are.
    """
    config = engine.model_config
    if task.kind == "multiple_choice":
        return engine, max(config.sequence_len, tokens)
    if tokens > config.sequence_len and not any(config.windows) and engine.weights == "auto":
        config = dataclasses.replace(config, sequence_len=tokens)
        engine = Engine(config, engine.params, engine.tokenizer, dtype=engine.dtype, kv_cache=engine.kv_cache)
    return engine, config.sequence_len


def _write(
    engine: Engine,
    prompts: Sequence[list[int]],
    score: Callable[[int, str, bool], float],
    progress: Progress | None,
    **options: Any,
) -> list[Sample]:
    """The answer to each prompt; each is scored when it has ended, beside those that are still written.

    Several processes share the scoring, and all get every score: of a program with a deadline, each could find another.

    Args:
      score: gets the index of the prompt, the answer, and whether it had no room to end.
    """
    here, processes = jax.process_index(), jax.process_count()
    room = [min(options["max_new_tokens"], engine.model_config.sequence_len - len(prompt)) for prompt in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    answers: dict[int, tuple[str, bool]] = {}
    scored: dict[int, Future[float]] = {}
    done: list[Future[float]] = []
    pool = ThreadPoolExecutor(SCORERS)
    try:
        for written in engine.stream(prompts, **options):
            for row, token in written:
                stopped = engine.is_stop(token)
                if not stopped:
                    tokens[row].append(token.id)
                if stopped or len(tokens[row]) == room[row]:
                    answers[row] = engine.tokenizer.decode(tokens[row]), not stopped
                    if row % processes == here:
                        scored[row] = pool.submit(score, row, *answers[row])
                        scored[row].add_done_callback(done.append)
            if progress is not None:
                progress(min(len(done) * processes, len(prompts)), len(prompts))
        while waiting := [future for future in scored.values() if not future.done()]:
            raise_if_asked()
            wait(waiting, timeout=1.0)
            if progress is not None:
                progress(min((len(scored) - len(waiting)) * processes, len(prompts)), len(prompts))
    finally:
        pool.shutdown(cancel_futures=True)  # of an evaluation that is broken off, the programs that have not begun
    own = [float(scored[row].result()) for row in range(here, len(prompts), processes)]
    shares = [json.loads(share) for share in exchange(json.dumps(own))]
    if progress is not None:
        progress(len(prompts), len(prompts))
    scores = [shares[row % processes][row // processes] for row in range(len(prompts))]
    return [Sample(answers[row][0], score, answers[row][1]) for row, score in enumerate(scores)]


def _answer(
    question: Conversation, index: int, samples: Sequence[Sample], best: bool, logprobs: dict[str, float] | None
) -> Answer:
    asked = next(m["content"] for m in reversed(question["messages"]) if m["role"] == "user")
    expected = question["messages"][-1]["content"]
    scores = [sample.score for sample in samples]
    return Answer(
        question=asked,
        answer=samples[0].answer if samples else "",
        right=question.get("answer", expected if isinstance(expected, str) else ""),
        score=(max(scores) if best else sum(scores) / len(scores)) if scores else 0.0,
        cut=bool(samples) and samples[0].cut,
        index=index,
        id=str(question.get("id", "")),
        subject=str(question.get("subject", "")),
        samples=tuple(samples) if len(samples) > 1 else (),
        logprobs=logprobs,
        calculations=calculations_of(question),
    )


def _pass_at(given: Sequence[Sequence[Sample]], samples: int) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, ... and the number of samples; a question that was not asked is never right."""
    if samples == 1:
        return {}
    right = [sum(sample.score == 1 for sample in answered) for answered in given]
    several = sorted({*(1 << i for i in range(samples.bit_length())), samples})
    return {k: float(np.mean([pass_at_k(samples, count, k) for count in right])) for k in several if k <= samples}


def choose(
    engine: Engine,
    prompts: Sequence[list[int]],
    letters: Sequence[Sequence[str]],
    batch_size: int,
    progress: Progress | None = None,
) -> list[Choice]:
    """For each prompt, the one of its letters that is most likely as the next token; the first among equals.

    Raises:
      UserError: a letter is not one token of the vocabulary.
    """
    ids = {letter: engine.tokenizer.encode(letter) for letter in dict.fromkeys(itertools.chain(*letters))}
    for letter, tokens in ids.items():
        check(len(tokens) == 1, f"the choice {letter!r} is {len(tokens)} tokens of this vocabulary; it must be one")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # what needs most memory first
    chosen: dict[int, Choice] = {}

    def read(rows: list[int], result: Any) -> None:
        scores = np.asarray(process_allgather(result, tiled=True))
        for row, i in enumerate(rows):
            own, total = scores[row, : len(letters[i])], scores[row, -1]
            logprobs = {letter: round(float(x - total), 5) for letter, x in zip(letters[i], own, strict=True)}
            chosen[i] = Choice(letters[i][int(np.argmax(own))], logprobs)
        if progress is not None:
            progress(len(chosen), len(prompts))

    waiting: list[tuple[list[int], Any]] = []  # one batch is read while the devices compute the next
    for start in range(0, len(order), batch_size):
        raise_if_asked()
        rows = order[start : start + batch_size]
        tokens, lengths, candidates = _batch(engine, [prompts[i] for i in rows])
        for row, i in enumerate(rows):
            candidates[row, : len(letters[i])] = [ids[letter][0] for letter in letters[i]]
        arrays = map(engine.put, (tokens, lengths, candidates))
        compute = Compute(engine.dtype, engine.mesh)
        waiting.append((rows, _scores(engine.model_config, compute, engine.params, *arrays)))
        if len(waiting) > 1:
            read(*waiting.pop(0))
    for batch in waiting:
        read(*batch)
    return [chosen[i] for i in range(len(prompts))]


def _batch(engine: Engine, prompts: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of one length, padded at the end: their tokens [B, T], lengths [B] and room for candidates [B, L].

    Lengths are powers of two within the context, so that few programs are compiled.
    """
    size, context = engine.batch_size(len(prompts)), engine.model_config.sequence_len
    longest = max(map(len, prompts))
    width = bucket(longest, SHORTEST_PROMPT)
    if longest <= context:
        width = min(width, context)
    tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths, np.zeros((size, len(LETTERS)), np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(
    config: GPTConfig,
    compute: Compute,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    candidates: Int[Array, "B L"],
) -> Float[Array, "B M"]:
    """The logits of each row's candidates after its last token and, as the last of M = L + 1, the log of the sum of
    the exponentials of all logits."""
    hidden = hidden_states(config, params, tokens, compute)
    scores = logits(config, params, hidden[jnp.arange(len(lengths)), lengths - 1])
    total = jax.nn.logsumexp(scores, axis=1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(scores, candidates, axis=1), total], axis=1)
