"""Rollouts: the current parameters answer questions, the answers are scored, and what was sampled becomes a batch.

Only tokens that the model sampled are targets. What a tool answered is in the context, but is never trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxchat.config import RLConfig
from jaxchat.devices.mesh import data_shards, put_whole
from jaxchat.eval.chat import prompts_of
from jaxchat.infer.engine import Completion, Engine
from jaxchat.rl.objectives import OBJECTIVES
from jaxchat.rl.signal import Signal
from jaxchat.stopping import raise_if_asked
from jaxchat.tasks import Conversation, Task
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.loop import Source
from jaxchat.train.step import MICRO_BATCH_SPEC, Batch

Question = tuple[Task, Conversation]  # with the task that scores it


def questions_of(tasks: list[Task], tokenizer: BaseTokenizer, sequence_len: int) -> list[Question]:
    """All questions of the tasks that leave room for an answer in a context of `sequence_len` tokens."""
    return [
        (task, conversation)
        for task in tasks
        for conversation, prompt in zip(task, prompts_of(task, list(task), tokenizer), strict=True)
        if len(prompt) < sequence_len
    ]


def score(questions: Sequence[Question], completions: list[Completion], tokenizer: BaseTokenizer) -> list[float]:
    """The reward of each completion, as an answer to the question at the same index."""
    rewards = []
    for (task, conversation), completion in zip(questions, completions, strict=True):
        raise_if_asked()  # a score may take seconds, if an answer is a program
        rewards.append(task.score(conversation, tokenizer.decode(completion.tokens), cut=not completion.finished))
    return rewards


def sampling(config: RLConfig) -> dict[str, Any]:
    """The engine's sampling options for a rollout."""
    return {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k")}


class Rollouts(Source):
    """Batches that the current parameters write: several samples of each of a step's questions, with rewards.

    Args:
      engine: its parameters are replaced by those of each step.
      mesh: the devices that share the rows of a batch.
      seed: together with the number of the batch it decides the questions and the samples.
    """

    samples = True

    def __init__(self, config: RLConfig, questions: list[Question], engine: Engine, *, mesh: Mesh, seed: int):
        self.config, self.questions, self.engine, self.mesh, self.seed = config, questions, engine, mesh, seed
        self.tokenizer = engine.tokenizer
        parallel = data_shards(mesh)
        rollouts = config.questions_per_step * config.samples_per_question
        self.micro_rows = min(config.device_rows, math.ceil(rollouts / parallel)) * parallel
        self.taken = 0  # batches so far: questions and random numbers follow from this number alone
        self.signal = Signal()

    def get_state(self) -> dict:
        return {"taken": self.taken, "signal": self.signal.state()}

    def set_state(self, state: dict) -> None:
        self.taken = state["taken"]
        # An earlier version of jaxchat did not count: its steps are taken to have had a signal.
        self.signal = Signal(**state.get("signal", {"steps": self.taken}))

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        """The batch, and the metrics of `Signal.add` and `completion_tokens` (mean number)."""
        config = self.config
        chosen = [self.questions[i] for i in self._choose(self.taken)]
        asked = [question for question in chosen for _ in range(config.samples_per_question)]
        prompts = [self.tokenizer.render_for_completion(conversation) for _, conversation in asked]
        self.engine.params = params
        seed = self.seed * 1_000_003 + self.taken + 1
        completions = self.engine.generate(prompts, **sampling(config), seed=seed)
        rewards = np.array(score(asked, completions, self.tokenizer)).reshape(-1, config.samples_per_question)
        weights = OBJECTIVES[config.method](rewards).reshape(-1)
        batch = self._batch(prompts, completions, weights)
        cut = np.array([not completion.finished for completion in completions]).reshape(rewards.shape)
        metrics = {
            **self.signal.add(rewards, cut),
            "completion_tokens": float(np.mean([len(c.tokens) for c in completions])),
        }
        self.taken += 1
        return {name: put_whole(self.mesh, array, MICRO_BATCH_SPEC) for name, array in batch.items()}, metrics

    def _choose(self, number: int) -> np.ndarray:
        """The indices of a batch's questions; each epoch is a new permutation of all questions."""
        places = number * self.config.questions_per_step + np.arange(self.config.questions_per_step)
        size = len(self.questions)
        order = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(size)
            for epoch in set((places // size).tolist())
        }
        return np.array([order[place // size][place % size] for place in places.tolist()])

    def _batch(
        self, prompts: list[list[int]], completions: list[Completion], weights: Float[np.ndarray, " B"]
    ) -> dict[str, np.ndarray]:
        """Prompts and completions as rows `[accumulation, rows, T]`; only sampled tokens are targets."""
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            # The stop token is the model's decision too.
            stop = [completion.stop] if completion.finished else []
            tokens = prompt + completion.tokens + stop
            rows.append((tokens, [False] * len(prompt) + completion.sampled + [True] * len(stop)))
        longest = max(len(tokens) for tokens, _ in rows) - 1
        # Few lengths mean few compilations: the next power of two, within the context.
        length = min(self.engine.model_config.sequence_len, 1 << (longest - 1).bit_length())
        count = math.ceil(len(rows) / self.micro_rows) * self.micro_rows
        inputs = np.zeros((count, length), np.int32)
        targets = np.full((count, length), -1, np.int32)
        scale = np.zeros((count, length), np.float32)
        for i, (tokens, sampled) in enumerate(rows):
            tokens, sampled = np.array(tokens[: length + 1]), np.array(sampled[: length + 1])
            inputs[i, : len(tokens) - 1] = tokens[:-1]
            if not np.isnan(weights[i]):
                targets[i, : len(tokens) - 1] = np.where(sampled[1:], tokens[1:], -1)
                scale[i] = weights[i]
        shape = (count // self.micro_rows, self.micro_rows, length)
        return {"inputs": inputs.reshape(shape), "targets": targets.reshape(shape), "weights": scale.reshape(shape)}
