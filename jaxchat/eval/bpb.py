"""Bits per byte: a loss that is comparable between tokenizers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxchat.devices.mesh import put_batch
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, hidden_states
from jaxchat.ops.compute import FP32, Compute
from jaxchat.stopping import raise_if_asked
from jaxchat.train.loss import LossConfig, token_nll


def evaluate_bpb(
    params: Params,
    config: GPTConfig,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: Int[np.ndarray, " V"],
    *,
    compute: Compute = FP32,
) -> float:
    """Bits per byte over all batches: summed nats of the targets / (ln 2 · their summed bytes).

    Args:
      batches: `inputs` and `targets`, int32[rows, T]; each process passes its part of the rows, see `batch_share`.
        Negative targets are ignored.
      token_bytes: bytes of each token of the vocabulary. A target with 0 bytes (a special token) does not count.
      compute: the data and fsdp axes of its mesh must divide the rows.

    Returns NaN if there is no byte to predict.
    """
    put = jax.device_put if compute.mesh is None else functools.partial(put_batch, compute.mesh)
    token_bytes = np.asarray(token_bytes)
    sums = []
    for b in batches:
        raise_if_asked()
        sums.append(_sums(config, compute, params, token_bytes, put(b["inputs"]), put(b["targets"])))
    return bits_per_byte(sums)


def bits_per_byte(sums: Sequence[tuple[Array, Array]]) -> float:
    """Bits per byte of the nats and bytes of some batches; NaN if there are no bytes."""
    # Read once, at the end, so that a batch is dispatched while the one before it is computed.
    nats, count = np.sum(np.array(jax.device_get(sums), np.float64).reshape(-1, 2), axis=0)
    return nats / (math.log(2) * count) if count else math.nan


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    config: GPTConfig,
    compute: Compute,
    params: Params,
    token_bytes: Int[Array, " V"],
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    hidden = hidden_states(config, params, inputs, compute)
    return nats_and_bytes(hidden, params["head"]["kernel"], targets, token_bytes, LossConfig.of(config, compute.mesh))


def nats_and_bytes(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D P"],
    targets: Int[Array, "B T"],
    token_bytes: Int[Array, " V"],
    config: LossConfig,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The nats and bytes of one batch: of its targets that have bytes. The head has columns for padded ids too."""
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    nats = token_nll(hidden, head, jnp.where(size > 0, targets, -1), config)
    return jnp.sum(nats), jnp.sum(size)
