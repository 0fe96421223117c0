"""Rows of a batch of reinforcement learning: questions with their sampled answers, as training sees them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxchat.config import RLConfig
from jaxchat.infer.engine import Completion
from jaxchat.rl.objectives import PolicyObjective, shares
from jaxchat.train.budget import BatchPlan


class Row(NamedTuple):
    """A question and a sampled answer, as training sees them.

    Attributes:
      tokens: of both, with the token that stopped the answer.
      sampled: whether the model chose the token; what a tool answered it did not.
      behaviour: the log-probabilities at which the tokens were sampled; 0 for the others.
      advantage: of the answer; None if it is left out.
      taught: whether the answers to the question differ in reward, so that they can teach something.
    """

    tokens: list[int]
    sampled: list[bool]
    behaviour: list[float]
    advantage: float | None
    taught: bool


def row_of(prompt: list[int], completion: Completion, advantage: float, taught: bool) -> Row:
    """A row of a prompt and its completion, which has log-probabilities; it is left out if the advantage is NaN."""
    # The stop token is the model's decision too.
    stop = [] if completion.stop is None else [completion.stop]
    own = completion.sampled + [True] * len(stop)
    behaviour = [score if sampled else 0.0 for score, sampled in zip(completion.logprobs, own, strict=True)]
    return Row(
        prompt + completion.tokens + stop,
        [False] * len(prompt) + own,
        [0.0] * len(prompt) + behaviour,
        None if math.isnan(advantage) else advantage,
        taught,
    )


def row_length(tokens: int, sequence_len: int) -> int:
    """The next power of two, within the context: few lengths mean few compilations."""
    return min(sequence_len, 1 << (tokens - 1).bit_length())


def arrays_of(rows: list[Row], config: RLConfig, plan: BatchPlan, sequence_len: int) -> dict[str, np.ndarray]:
    """Rows as a batch `[accumulation, rows, T]`; only sampled tokens are targets.

    The loss is a mean over the answers to questions whose answers differ, since all others have an advantage of 0;
    over all answers if KL divergence or entropy are part of it.
    """
    objective = PolicyObjective.of(config)
    length = row_length(max(len(row.tokens) for row in rows) - 1, sequence_len)
    shape = (math.ceil(len(rows) / plan.rows) * plan.rows, length)
    inputs, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    advantages, behaviour = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    counts = np.zeros(len(inputs), np.int64)
    for i, row in enumerate(rows):
        tokens, sampled = np.array(row.tokens[: length + 1]), np.array(row.sampled[: length + 1])
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        if row.advantage is not None:
            targets[i, : len(tokens) - 1] = np.where(sampled[1:], tokens[1:], -1)
            advantages[i] = row.advantage
            behaviour[i, : len(tokens) - 1] = row.behaviour[1 : length + 1]
            if row.taught or objective.kl or objective.entropy:
                counts[i] = np.sum(targets[i] >= 0)
    of_answers = shares(counts, config.average, config.max_new_tokens).astype(np.float32)
    arrays = {
        "inputs": inputs,
        "targets": targets,
        "advantages": advantages,
        "behaviour": behaviour,
        "shares": np.broadcast_to(of_answers[:, None], shape),
    }
    return {name: array.reshape(-1, plan.rows, length) for name, array in arrays.items()}
