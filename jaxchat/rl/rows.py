"""Rows of a batch of reinforcement learning: questions with their sampled answers, packed as training sees them.

Answers differ in length, so they share rows, in which each token sees its own question and answer only, as it did when
it was sampled.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxchat.config import RLConfig
from jaxchat.devices.mesh import NOWHERE, data_shards
from jaxchat.infer.engine import Completion
from jaxchat.rl.objectives import PolicyObjective, shares
from jaxchat.train.budget import BatchPlan, plans_of_rows
from jaxchat.train.step import AbstractBatch, abstract_batch

PARTS = 64  # micro-batches of the largest batch, or more: half of one stays empty, on average
SHORTEST = 128  # positions of a row, unless the context is shorter: the kernels need whole blocks of them
FACTORS = (1, 2, 4)  # of the length that the longest answer needs: answers just over half of it leave the rest empty
FULL = 0.8  # share of the positions with tokens from which no longer row is tried


class Row(NamedTuple):
    """A question and a sampled answer.

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


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """The indices of the sizes that share each row of `length` positions: best fit, the largest first.

    Of the rows with room the one with the least takes it. Where each size is at most 1/n of a row, all rows but one
    have at least n.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row, in order
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = bisect.bisect_left(room, (sizes[index], -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (left - sizes[index], row))
    return rows


class Packed(NamedTuple):
    """A batch on the host: its arrays, how many tokens it has, and how many positions the devices compute."""

    arrays: dict[str, np.ndarray]
    tokens: int
    positions: int


@dataclass(frozen=True)
class Packing:
    """How the rows of each batch are laid out as `[micro-batches, rows, T]`.

    With a plan, a device computes `device_rows` rows of `longest` positions at once, or as many positions in rows of
    another length. T is what the batch's longest row needs, as a power of two or the context, or two or four times as
    much where that is fuller. The number of micro-batches follows from T, and how many of them are computed is in the
    batch: so there are few shapes, and few compilations.

    Attributes:
      sequence_len: the context, in tokens.
      prompt: tokens of the longest question.
    """

    config: RLConfig
    objective: PolicyObjective
    mesh: Mesh
    sequence_len: int
    prompt: int

    @property
    def longest(self) -> int:
        """The length of a row that the longest question fits into, with the longest answer."""
        return self._length(self.prompt + self.config.max_new_tokens)

    def plans(self) -> tuple[BatchPlan, ...]:
        """The ways to split the largest batch over the devices, the one with the most rows at once first."""
        parallel = data_shards(self.mesh)
        answers = math.ceil(self.config.questions_per_step * self.config.samples_per_question / parallel)
        if self.config.device_rows == "auto":
            most = max(1, answers // PARTS)
            return tuple(plan for plan in plans_of_rows(answers, parallel) if plan.device_rows <= most)
        rows = min(self.config.device_rows, answers)
        return (BatchPlan(rows, rows * parallel, math.ceil(answers / rows)),)

    def abstract(self, plan: BatchPlan) -> AbstractBatch:
        """The largest batch with `plan`, as ShapeDtypeStructs.

        With longer rows, of which there are fewer, it takes as much memory but for masks, which are small beside it.
        """
        batch = abstract_batch(self.mesh, self._shape(plan, self.longest), self.objective.tokens)
        number = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(self.mesh, NOWHERE))
        return {**batch, "documents": batch["inputs"], "micro_batches": number}

    def batch(self, rows: Sequence[Row], plan: BatchPlan) -> Packed:
        """Those of the rows that have an advantage, as a batch; only sampled tokens are targets.

        The loss is a mean over the answers to questions whose answers differ, since all others have an advantage of 0;
        over all answers if KL divergence or entropy are part of it.
        """
        every = self.objective.kl or self.objective.entropy
        rows = [row for row in rows if row.advantage is not None]
        sizes = [min(len(row.tokens) - 1, self.sequence_len) for row in rows]
        places, (micro_batches, at_once, length) = self._places(sizes, plan)
        shape = (micro_batches * at_once, length)
        arrays = {name: np.zeros(shape, np.float32) for name in ("advantages", "behaviour", "shares")}
        inputs, targets, documents = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        counts = [
            sum(row.sampled[1 : size + 1]) if row.taught or every else 0 for row, size in zip(rows, sizes, strict=True)
        ]
        of_answers = shares(np.array(counts, np.int64), self.config.average, self.config.max_new_tokens)
        for number, together in enumerate(places):
            start = 0
            for document, index in enumerate(together, 1):
                row, size = rows[index], sizes[index]
                own = number, slice(start, start + size)
                tokens, sampled = np.array(row.tokens[: size + 1]), np.array(row.sampled[1 : size + 1])
                inputs[own], targets[own], documents[own] = tokens[:-1], np.where(sampled, tokens[1:], -1), document
                arrays["behaviour"][own] = row.behaviour[1 : size + 1]
                arrays["advantages"][own], arrays["shares"][own] = row.advantage, of_answers[index]
                start += size
        arrays = {"inputs": inputs, "targets": targets, **arrays, "documents": documents}
        arrays = {name: array.reshape(micro_batches, at_once, length) for name, array in arrays.items()}
        computed = math.ceil(len(places) / at_once)
        arrays["micro_batches"] = np.array(computed, np.int32)
        return Packed(arrays, sum(sizes), computed * at_once * length)

    def _places(self, sizes: Sequence[int], plan: BatchPlan) -> tuple[list[list[int]], tuple[int, int, int]]:
        """Which of the sizes share each row, and the batch's shape: the fewest positions, in short rows."""
        least = self._length(max(sizes, default=self.longest))
        found = []
        for length in (least * factor for factor in FACTORS):
            if length > max(least, plan.device_rows * self.longest):  # more than a device is to compute at once
                break
            places, (most, at_once, _) = pack(sizes, length), self._shape(plan, length)
            needed = math.ceil(len(places) / at_once)
            # More micro-batches than expected is another shape: never a lost answer.
            found.append((needed * at_once * length, places, (max(most, needed), at_once, length)))
            if sum(sizes) >= FULL * found[-1][0]:
                break
        _, places, shape = min(found, key=lambda way: way[0])
        return places, shape

    def _shape(self, plan: BatchPlan, length: int) -> tuple[int, int, int]:
        """The shape of the largest batch with rows of `length` positions."""
        answers, shared = plan.accumulation * plan.rows, max(1, length // self.longest)
        parallel = plan.rows // plan.device_rows
        at_once = max(1, plan.device_rows * self.longest // length) * parallel
        return math.ceil(answers / shared / at_once), at_once, length

    def _length(self, tokens: int) -> int:
        """The next power of two, within the context: few lengths mean few compilations."""
        return min(self.sequence_len, max(SHORTEST, 1 << (tokens - 1).bit_length()))
