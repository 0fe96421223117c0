"""Rollouts: the current parameters answer questions, the answers are scored, and what was sampled becomes a batch.

Only tokens that the model sampled are targets. What a tool answered is in the context, but is never trained on.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from jaxchat.config import RLConfig
from jaxchat.data.chat.fingerprint import fingerprint
from jaxchat.devices.mesh import NOWHERE, put_whole
from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.chat import prompts_of
from jaxchat.infer.engine import Completion, Engine
from jaxchat.rl.advantages import ADVANTAGES, best_of_n, differ
from jaxchat.rl.objectives import PolicyObjective
from jaxchat.rl.questions import Chooser
from jaxchat.rl.record import Record
from jaxchat.rl.reward import OwnReward
from jaxchat.rl.rows import Packed, Packing, Row, row_of
from jaxchat.rl.scoring import task_scores
from jaxchat.rl.signal import Signal
from jaxchat.tasks import Conversation, Task
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.budget import BatchPlan
from jaxchat.train.loop import Source
from jaxchat.train.step import MICRO_BATCH_SPEC, AbstractBatch, Batch

MOST_ROWS = 256  # answers that are written at once: more do not make it faster
Question = tuple[Task, Conversation]  # with the task that scores it


def questions_of(tasks: list[Task], tokenizer: BaseTokenizer, sequence_len: int) -> list[Question]:
    """All questions of the tasks that leave room for an answer in a context of `sequence_len` tokens."""
    return [
        (task, conversation)
        for task in tasks
        for conversation, prompt in zip(task, prompts_of(task, list(task), tokenizer), strict=True)
        if len(prompt) < sequence_len
    ]


def score(
    questions: Sequence[Question],
    completions: list[Completion],
    tokenizer: BaseTokenizer,
    own: OwnReward | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """The reward of each completion, as an answer to the question at the same index; by `own`, or else by its task.

    Args:
      progress: of the tasks' scores, as for `task_scores`.
    """
    answers = [tokenizer.decode(completion.tokens) for completion in completions]
    if own is not None:
        return own.score(
            [
                (conversation["messages"][-2]["content"], answer, conversation)
                for (_, conversation), answer in zip(questions, answers, strict=True)
            ]
        )
    return task_scores(
        [
            (task, conversation, answer, not completion.finished)
            for (task, conversation), completion, answer in zip(questions, completions, answers, strict=True)
        ],
        progress,
    )


def sampling(config: RLConfig) -> dict[str, Any]:
    """The engine's sampling options for a rollout."""
    return {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k")}


class Answers(NamedTuple):
    """What was sampled for an update: N answers to each of Q questions.

    Attributes:
      questions: their indices.
      prompts: tokens of the questions.
      completions: one question's after another's.
      rewards: NaN where there is none.
      seconds: that sampling took.
    """

    questions: list[int]
    prompts: list[list[int]]
    completions: list[Completion]
    rewards: Float[np.ndarray, "Q N"]
    seconds: float


class Rollouts(Source):
    """Batches that the current parameters write: several samples of each of a step's questions, with rewards.

    Questions whose answers all earn the same are left out of the batch, and others are asked in their place, within
    the bound of `config.refill`. Each batch is given `config.updates_per_batch` times, with the log-probabilities at
    which its tokens were sampled.

    Args:
      engine: it has the parameters of each step that samples while this samples, and none at other times.
      mesh: the devices that share the rows of a batch.
      seed: together with the number of the batch it decides the questions and the samples.
      reference: gives the log-probabilities of a batch's targets for the parameters that the training began with.
      own: scores the answers in the tasks' place.
      record: keeps the answers for people to read.

    Attributes:
      progress: called with the number of answers that are scored and of all, where that takes seconds.
    """

    samples = True

    def __init__(
        self,
        config: RLConfig,
        questions: list[Question],
        engine: Engine,
        *,
        mesh: Mesh,
        seed: int,
        reference: Callable[[Batch], jax.Array] | None = None,
        own: OwnReward | None = None,
        record: Record | None = None,
    ):
        self.record = record
        self.config, self.questions, self.engine, self.mesh, self.seed = config, questions, engine, mesh, seed
        self.objective, self.reference, self.own = PolicyObjective.of(config, engine.drawn), reference, own
        self.tokenizer = engine.tokenizer
        self.progress: Callable[[int, int], None] = lambda done, total: None
        of_tasks: dict[str, list[Conversation]] = {}
        for task, conversation in questions:
            of_tasks.setdefault(task.name, []).append(conversation)
        names = [task.name for task, _ in questions]
        self.chooser = Chooser(names, config, seed=seed, fingerprint=fingerprint([*of_tasks.items()]))
        prompt = max(len(self.tokenizer.render_for_completion(conversation)) for _, conversation in questions)
        self.context = engine.model_config.sequence_len
        self.packing = Packing(config, self.objective, mesh, self.context, prompt)
        self.plans = self.packing.plans()
        self.plan = self.plans[0]
        self.taken = 0  # updates so far: random numbers follow from this number
        self.signal = Signal()
        self._rows: list[Row] = []  # of a batch that is to be given again
        self._batch: Batch | None = None  # the same on the devices
        del engine.params  # of which it may have a copy in another dtype

    def get_state(self) -> dict:
        # Only the parameters that sampled them could give these rows again.
        rows = {"rows": [list(row) for row in self._rows]} if self.taken % self.config.updates_per_batch else {}
        return {"taken": self.taken, "signal": self.signal.state(), "choice": self.chooser.state(), **rows}

    def set_state(self, state: dict) -> None:
        self.taken = state["taken"]
        # An earlier version of jaxchat did not count: its steps are taken to have had a signal.
        self.signal = Signal(**state.get("signal", {"steps": self.taken}))
        if "choice" in state:
            self.chooser.set_state(state["choice"])
        else:  # of a version that neither retired nor refilled
            known = self.chooser.fingerprint
            self.chooser = Chooser(self.chooser.tasks, self.config, seed=self.seed, fingerprint=known)
            for _ in range(math.ceil(self.taken / self.config.updates_per_batch)):
                self.chooser.draw(self.config.questions_per_step, self.config.questions_per_step)
        self._rows, self._batch = [Row(*row) for row in state.get("rows", ())], None

    def whole_state(self, state: dict) -> dict:
        if self.record is not None:
            self.record.flush()  # whoever resumes from this state must find what was sampled before it
        return state

    def abstract(self, plan: BatchPlan) -> AbstractBatch:
        """The largest batch that `next_batch` returns with `plan`, as ShapeDtypeStructs."""
        return self.packing.abstract(plan)

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        """The batch and, if it is a new one, its metrics.

        They are those of `Signal.add` and of `Chooser.metrics`, `questions_asked` and `questions_used` (their numbers),
        `reward/TASK` (the mean, where there are several tasks), `completion_tokens` (mean number),
        `sampled_tokens_per_second`, `utilisation`, the share of the devices' positions that hold a token, `forged`, the
        share of answers in which the model wrote a tool's output itself, and `unscored`, that of those whose reward is
        no finite number, if there are any: they are left out.
        """
        metrics = {}
        if self.taken % self.config.updates_per_batch == 0:
            self._batch, self._rows, metrics = None, *self._sample(step, params)
        if self._batch is None:
            packed = self.packing.batch(self._rows, self.plan)
            self._batch = self._on_devices(packed)
            if packed.positions and metrics:
                metrics["utilisation"] = packed.tokens / packed.positions
        self.taken += 1
        return self._batch, metrics

    def tokens(self, batch: Batch) -> int:
        """Those of the rows; what fills these up is no token."""
        return sum(len(row.tokens) - 1 for row in self._rows)

    def facts(self) -> dict[str, float]:
        """For the stage's record: those of `Signal.facts` and `Chooser.metrics`."""
        return {**self.signal.facts(), **self.chooser.metrics()}

    def _sample(self, step: int, params) -> tuple[list[Row], dict[str, float]]:
        """Answers to the next questions, as rows, and their metrics."""
        self.engine.params = params
        # One cache for all that this step asks: a refill of a few questions would compile programs of its own.
        at_once = min(MOST_ROWS, self.config.questions_per_step * self.config.samples_per_question)
        self.engine.reserve(at_once, min(self.packing.prompt + self.config.max_new_tokens, self.context))
        answers = self._ask(self.taken // self.config.updates_per_batch)
        del self.engine.params
        of_rewards = best_of_n if self.config.method == "best_of_n" else ADVANTAGES[self.config.advantage]
        teaches, advantages = differ(answers.rewards), of_rewards(answers.rewards)
        used = self._used(teaches)
        if self.record is not None:
            asked = [self.questions[i] for i in answers.questions]
            self.record(step, asked, answers.completions, answers.rewards, advantages, used)
        each = self.config.samples_per_question
        rows = [
            row_of(answers.prompts[i], answers.completions[i * each + j], advantages[i, j], bool(teaches[i]))
            for i in np.flatnonzero(used).tolist() or [0]  # one that teaches nothing is measured at least
            for j in range(each)
        ]
        rows = [row for row in rows if row.advantage is not None] or rows[:1]
        return rows, {**self._measure(answers), "questions_used": int(used.sum())}

    def _ask(self, update: int) -> Answers:
        """Samples and scores answers until enough questions have something to teach, or as many are asked as may be."""
        config, each = self.config, self.config.samples_per_question
        found = Answers([], [], [], np.zeros((0, each)), 0.0)
        most = min(config.refill * config.questions_per_step, max(config.questions_per_step, self.chooser.left))
        for seed in self._seeds(update):
            lacking = config.questions_per_step - int(differ(found.rewards).sum())
            chosen = self.chooser.draw(lacking, most - len(found.questions))
            if not chosen:
                break
            prompts = [self.tokenizer.render_for_completion(self.questions[i][1]) for i in chosen]
            asked = [self.questions[i] for i in chosen for _ in range(each)]
            began = time.perf_counter()
            completions = self.engine.generate(
                [prompt for tokens in prompts for prompt in [tuple(tokens)] * each],
                **sampling(config),
                seed=seed,
                logprobs=True,
                max_batch=MOST_ROWS,
            )
            seconds = time.perf_counter() - began
            rewards = self._score(asked, completions).reshape(-1, each)
            self.chooser.learn(chosen, rewards)
            found = Answers(
                found.questions + chosen,
                found.prompts + prompts,
                found.completions + completions,
                np.concatenate([found.rewards, rewards]),
                found.seconds + seconds,
            )
        return found

    def _score(self, asked: list[Question], completions: list[Completion]) -> Float[np.ndarray, " A"]:
        # Scored once for all processes: where a clock decides, each could find another reward.
        scores = on_process_zero(lambda: score(asked, completions, self.tokenizer, self.own, self.progress))
        rewards = np.array(scores, float)
        return np.where(np.isfinite(rewards), rewards, np.nan)

    def _used(self, teaches: Bool[np.ndarray, " Q"]) -> Bool[np.ndarray, " Q"]:
        """Which questions are trained on: those that teach, as many as a step has; the loss may want others too."""
        wanted = np.flatnonzero(teaches)
        if self.objective.kl or self.objective.entropy:
            wanted = np.concatenate([wanted, np.flatnonzero(~teaches)])
        used = np.zeros(len(teaches), bool)
        used[wanted[: self.config.questions_per_step]] = True
        return used

    def _measure(self, answers: Answers) -> dict[str, float]:
        rewards, completions = answers.rewards, answers.completions
        cut = np.array([not completion.finished for completion in completions]).reshape(rewards.shape)
        output = self.tokenizer.encode_special("<|output_start|>")
        forged = [any(t == output and own for t, own in zip(c.tokens, c.sampled, strict=True)) for c in completions]
        unscored = float(np.isnan(rewards).mean())
        return {
            **self.signal.add(rewards, cut),
            **self._rewards_of_tasks(answers),
            **self.chooser.metrics(),
            "questions_asked": len(rewards),
            "completion_tokens": float(np.mean([len(c.tokens) for c in completions])),
            "sampled_tokens_per_second": sum(sum(c.sampled) + c.finished for c in completions) / answers.seconds,
            "forged": float(np.mean(forged)),
            **({"unscored": unscored} if unscored else {}),
        }

    def _rewards_of_tasks(self, answers: Answers) -> dict[str, float]:
        if len(self.chooser.names) == 1:
            return {}
        names = np.array([self.questions[i][0].name for i in answers.questions])
        of_tasks = {name: answers.rewards[names == name] for name in self.chooser.names}
        return {
            f"reward/{name}": float(np.nanmean(rewards))
            for name, rewards in of_tasks.items()
            if not np.isnan(rewards).all()  # asked, and scored
        }

    def _seeds(self, update: int) -> Iterator[int]:
        """Of the samplings of an update."""
        yield self.seed * 1_000_003 + update + 1
        for refill in itertools.count(1):
            yield int(np.random.SeedSequence((self.seed, update, refill)).generate_state(1)[0])

    def _on_devices(self, packed: Packed) -> Batch:
        batch = {
            name: put_whole(self.mesh, array, MICRO_BATCH_SPEC if array.ndim else NOWHERE)
            for name, array in packed.arrays.items()
        }
        if self.objective.kl:
            assert self.reference is not None, "an objective with a KL divergence needs a reference"
            batch["reference"] = self.reference(batch)
        return batch
