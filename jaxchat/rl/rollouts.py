"""Rollouts: the current parameters answer questions, the answers are scored, and what was sampled becomes a batch.

Only tokens that the model sampled are targets. What a tool answered is in the context, but is never trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxchat.config import RLConfig
from jaxchat.devices.mesh import data_shards, put_whole
from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.chat import prompts_of
from jaxchat.infer.engine import Completion, Engine
from jaxchat.rl.advantages import ADVANTAGES, best_of_n, differ
from jaxchat.rl.objectives import PolicyObjective
from jaxchat.rl.record import Record
from jaxchat.rl.reward import OwnReward
from jaxchat.rl.rows import Row, arrays_of, row_length, row_of
from jaxchat.rl.scoring import task_scores
from jaxchat.rl.signal import Signal
from jaxchat.tasks import Conversation, Task
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.budget import BatchPlan, plans_of_rows
from jaxchat.train.loop import Source
from jaxchat.train.step import MICRO_BATCH_SPEC, AbstractBatch, Batch, abstract_batch

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


class Rollouts(Source):
    """Batches that the current parameters write: several samples of each of a step's questions, with rewards.

    Each is given `config.updates_per_batch` times, with the log-probabilities at which its tokens were sampled.

    Args:
      engine: its parameters are replaced by those of each step that samples.
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
        self.objective, self.reference, self.own = PolicyObjective.of(config), reference, own
        self.tokenizer = engine.tokenizer
        self.progress: Callable[[int, int], None] = lambda done, total: None
        parallel = data_shards(mesh)
        # Of a device: the last micro-batch may have rows without targets.
        rollouts = math.ceil(config.questions_per_step * config.samples_per_question / parallel)
        if config.device_rows == "auto":
            self.plans = plans_of_rows(rollouts, parallel)
        else:
            rows = min(config.device_rows, rollouts)
            self.plans = (BatchPlan(rows, rows * parallel, math.ceil(rollouts / rows)),)
        self.plan = self.plans[0]
        self.taken = 0  # updates so far: questions and random numbers follow from this number alone
        self.signal = Signal()
        self._rows: list[Row] = []  # of a batch that is to be given again
        self._batch: Batch | None = None  # the same on the devices

    def get_state(self) -> dict:
        # Only the parameters that sampled them could give these rows again.
        rows = {"rows": [list(row) for row in self._rows]} if self.taken % self.config.updates_per_batch else {}
        return {"taken": self.taken, "signal": self.signal.state(), **rows}

    def set_state(self, state: dict) -> None:
        self.taken = state["taken"]
        # An earlier version of jaxchat did not count: its steps are taken to have had a signal.
        self.signal = Signal(**state.get("signal", {"steps": self.taken}))
        self._rows, self._batch = [Row(*row) for row in state.get("rows", ())], None

    def whole_state(self, state: dict) -> dict:
        if self.record is not None:
            self.record.flush()  # whoever resumes from this state must find what was sampled before it
        return state

    def abstract(self, plan: BatchPlan) -> AbstractBatch:
        """The largest batch that `next_batch` returns with `plan`, as ShapeDtypeStructs."""
        prompt = max(len(self.tokenizer.render_for_completion(conversation)) for _, conversation in self.questions)
        length = row_length(prompt + self.config.max_new_tokens, self.engine.model_config.sequence_len)
        shape = (plan.accumulation, plan.rows, length)
        return abstract_batch(self.mesh, shape, self.objective.tokens)

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        """The batch and, if it is a new one, its metrics.

        They are those of `Signal.add`, `completion_tokens` (mean number), `forged`, the share of answers in which the
        model wrote a tool's output itself, and `unscored`, that of those whose reward is no finite number, if there are
        any: they are left out.
        """
        metrics = {}
        if self.taken % self.config.updates_per_batch == 0:
            self._batch, self._rows, metrics = None, *self._sample(step, params)
        if self._batch is None:
            self._batch = self._on_devices(self._rows)
        self.taken += 1
        return self._batch, metrics

    def _sample(self, step: int, params) -> tuple[list[Row], dict[str, float]]:
        """Answers to the next questions, as rows, and their metrics."""
        config, number = self.config, self.taken // self.config.updates_per_batch
        chosen = [self.questions[i] for i in self._choose(number)]
        asked = [question for question in chosen for _ in range(config.samples_per_question)]
        prompts = [self.tokenizer.render_for_completion(conversation) for _, conversation in asked]
        self.engine.params = params
        seed = self.seed * 1_000_003 + number + 1
        completions = self.engine.generate(prompts, **sampling(config), seed=seed, logprobs=True)
        # Scored once for all processes: where a clock decides, each could find another reward.
        scores = on_process_zero(lambda: score(asked, completions, self.tokenizer, self.own, self.progress))
        rewards = np.array(scores).reshape(-1, config.samples_per_question)
        rewards[~np.isfinite(rewards)] = np.nan
        unscored = float(np.isnan(rewards).mean())
        of_rewards = best_of_n if config.method == "best_of_n" else ADVANTAGES[config.advantage]
        advantages, differing = of_rewards(rewards), differ(rewards)
        if self.record is not None:
            used = differing | bool(config.kl or config.entropy)
            self.record(step, chosen, completions, rewards, advantages, used)
        taught = np.repeat(differing, config.samples_per_question)
        rows = [
            row_of(prompt, completion, advantage, can_teach)
            for prompt, completion, advantage, can_teach in zip(
                prompts, completions, advantages.reshape(-1).tolist(), taught.tolist(), strict=True
            )
        ]
        cut = np.array([not completion.finished for completion in completions]).reshape(rewards.shape)
        output = self.tokenizer.encode_special("<|output_start|>")
        forged = [any(t == output and own for t, own in zip(c.tokens, c.sampled, strict=True)) for c in completions]
        return rows, {
            **self.signal.add(rewards, cut),
            "completion_tokens": float(np.mean([len(c.tokens) for c in completions])),
            "forged": float(np.mean(forged)),
            **({"unscored": unscored} if unscored else {}),
        }

    def _on_devices(self, rows: list[Row]) -> Batch:
        batch = {name: put_whole(self.mesh, array, MICRO_BATCH_SPEC) for name, array in self._arrays(rows).items()}
        if self.objective.kl:
            assert self.reference is not None, "an objective with a KL divergence needs a reference"
            batch["reference"] = self.reference(batch)
        return batch

    def _choose(self, number: int) -> np.ndarray:
        """The indices of a batch's questions; each epoch is a new permutation of all questions."""
        places = number * self.config.questions_per_step + np.arange(self.config.questions_per_step)
        size = len(self.questions)
        order = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(size)
            for epoch in set((places // size).tolist())
        }
        return np.array([order[place // size][place % size] for place in places.tolist()])

    def _arrays(self, rows: list[Row]) -> dict[str, np.ndarray]:
        return arrays_of(rows, self.config, self.plan, self.engine.model_config.sequence_len)
