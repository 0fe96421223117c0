"""The arithmetic of a run: parameters, FLOPs, number of steps, batch. No arrays, nothing measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from jaxchat.config import PretrainConfig, SupervisedConfig
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.parameters import count_parameters
from jaxchat.train.phases import Phases, models

MOST_STEPS = 10**9  # which pretrain.num-iterations may be at most


def attended_keys(length: int, window: int | None) -> int:
    """Pairs of a token and one that it attends to, itself included, in a row of `length` tokens."""
    width = length if window is None else min(length, window + 1)
    return width * (width + 1) // 2 + (length - width) * width  # the first tokens have fewer before them


def flops_per_token(model: GPTConfig) -> int:
    """FLOPs of training on one token of a full sequence, forward and backward.

    6 for each parameter in a matrix product (2 forward, 4 backward; embeddings are only looked up, and the
    gates of values too small to count), and for the two
    products of attention 12 * heads * head_dim for each key that a token sees. A layer without a window counts
    `sequence_len` keys, as if attention were not causal: Chowdhery et al., "PaLM" (2022), appendix B. nanochat
    counts in the same way, so that MFU is comparable. A window counts w tokens on both sides, which keeps the two kinds
    of layers in proportion to their causal masks. (nanochat counts only w for such a layer.)
    """
    parameters = count_parameters(model)
    length = model.sequence_len
    # Both sides of the diagonal, which itself counts once.
    pairs = sum(2 * attended_keys(length, window) - length for window in model.windows)
    attention = 12 * model.num_heads * model.head_dim * pairs // length
    return 6 * (parameters.matrices + parameters.head) + attention


def pretraining_flops_per_token(config: PretrainConfig, model: GPTConfig) -> float:
    """`flops_per_token` of pretraining: its mean, where windows grow."""
    if not config.phases.windows:
        return flops_per_token(model)
    each = zip(config.phases.shares, models(config, model), strict=True)
    return sum(share * flops_per_token(of_phase) for share, of_phase in each)


def wanted_tokens(config: PretrainConfig, model: GPTConfig) -> float:
    """The tokens that FLOPs or tokens per parameter ask for, of which pretraining takes whole steps."""
    if config.target_flops is not None:
        return config.target_flops / pretraining_flops_per_token(config, model)
    return config.tokens_per_param * count_parameters(model).counted


def training_length(config: PretrainConfig, model: GPTConfig) -> int:
    """The number of optimizer steps of pretraining, at least 1: as set, or from FLOPs, or from tokens per parameter.

    20 tokens per parameter is about compute-optimal: Hoffmann et al., "Training Compute-Optimal Large Language Models"
    (2022). Value embeddings and the parameters that are no matrices do not count.
    """
    if config.num_iterations is not None:
        return config.num_iterations
    steps = wanted_tokens(config, model) / config.mean_batch_tokens
    return max(1, round(steps) if config.target_flops is not None else int(steps))


def training_tokens(config: PretrainConfig, model: GPTConfig) -> int:
    """The tokens of pretraining."""
    return Phases(config, training_length(config, model)).tokens


def check_length(config: PretrainConfig, model: GPTConfig) -> None:
    """Checks that the compute or the tokens that are set give a number of steps that can be counted.

    Raises:
      UserError: less than one step, or more than `MOST_STEPS`.
    """
    if config.num_iterations is not None:
        return
    if config.target_flops is not None:
        name, value = "target-flops", config.target_flops
        of_a_step = pretraining_flops_per_token(config, model) * config.mean_batch_tokens
    else:
        name, value = "tokens-per-param", config.tokens_per_param
        of_a_step = config.mean_batch_tokens / count_parameters(model).counted
    problem = (
        f"pretrain.{name} is {value:g}, but a step of {round(config.mean_batch_tokens):,} tokens takes {of_a_step:.3g}"
    )
    if value < of_a_step:
        raise UserError(f"{problem}; raise it, or set pretrain.num-iterations")
    if value / of_a_step > MOST_STEPS:
        raise UserError(f"{problem}; lower it to at most {of_a_step * MOST_STEPS:.3g}: {MOST_STEPS:,} steps")


@dataclass(frozen=True)
class BatchPlan:
    """How an optimizer step's rows pass through the devices: `accumulation` times `rows`, `device_rows` on each."""

    device_rows: int
    rows: int
    accumulation: int


def split_batch(batch_tokens: int, device_rows: int, sequence_len: int, data_parallel: int) -> BatchPlan:
    """Splits `batch_tokens` over `data_parallel` devices (data times fsdp), each taking `device_rows` rows at a time.

    A batch with fewer rows a device than that goes through at once.

    Raises:
      UserError: the batch does not divide evenly; the message names the nearest `batch_tokens` and, if there are any,
        `device_rows` that do.
    """
    row_tokens = sequence_len * data_parallel  # of one row on every device
    device_total, rest_of_rows = divmod(batch_tokens, row_tokens)
    if rest_of_rows == 0 and 0 < device_total < device_rows:
        return BatchPlan(device_rows=device_total, rows=device_total * data_parallel, accumulation=1)
    rows = device_rows * data_parallel
    micro_tokens = rows * sequence_len
    accumulation, rest = divmod(batch_tokens, micro_tokens)
    if rest == 0 and accumulation > 0:
        return BatchPlan(device_rows=device_rows, rows=rows, accumulation=accumulation)
    unit = micro_tokens if batch_tokens > micro_tokens else row_tokens
    below = batch_tokens // unit * unit
    batches = [tokens for tokens in (below, below + unit) if tokens > 0]
    remedies = [f"batch-tokens {_either(batches)}"]
    if rest_of_rows == 0 and device_total > 0:
        divisors = _divisors(device_total)
        below = [d for d in divisors if d < device_rows][-1:]
        above = [d for d in divisors if d > device_rows][:1]
        remedies.append(f"device-rows {_either(below + above)}")
    raise UserError(
        f"batch-tokens {batch_tokens} is not a multiple of {micro_tokens} (device-rows {device_rows} x {data_parallel} "
        f"data-parallel devices x sequence-len {sequence_len}); nearest that work: {', or '.join(remedies)}"
    )


def batch_plans(
    batch_tokens: int, device_rows: int | Literal["auto"], sequence_len: int, data_parallel: int
) -> tuple[BatchPlan, ...]:
    """The ways to split a batch: `split_batch`, or for "auto" all even ones, the one with the most rows first.

    Raises:
      UserError: as `split_batch`.
    """
    if device_rows != "auto":
        return (split_batch(batch_tokens, device_rows, sequence_len, data_parallel),)
    row_tokens = sequence_len * data_parallel  # of one row on every device
    device_total, rest = divmod(batch_tokens, row_tokens)
    if rest or not device_total:
        batches = [tokens for tokens in (device_total * row_tokens, (device_total + 1) * row_tokens) if tokens > 0]
        raise UserError(
            f"batch-tokens {batch_tokens} is not a multiple of {row_tokens} ({data_parallel} data-parallel devices x "
            f"sequence-len {sequence_len}); nearest that work: batch-tokens {_either(batches)}"
        )
    return plans_of_rows(device_total, data_parallel)


def plans_of_stage(config: SupervisedConfig, sequence_len: int, data_parallel: int) -> tuple[BatchPlan, ...]:
    """The ways to split a batch of the stage with `config`. Where batches grow, each of them is whole micro-batches.

    Raises:
      UserError: as `split_batch`.
    """
    units = config.batch_tokens // config.unit_tokens
    plans = batch_plans(config.unit_tokens, config.device_rows, sequence_len, data_parallel)
    return tuple(replace(plan, accumulation=units * plan.accumulation) for plan in plans)


def plans_of_rows(device_total: int, data_parallel: int) -> tuple[BatchPlan, ...]:
    """All ways to split `device_total` rows a device evenly, the one with the most rows first."""
    return tuple(
        BatchPlan(device_rows=rows, rows=rows * data_parallel, accumulation=device_total // rows)
        for rows in reversed(_divisors(device_total))
    )


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
