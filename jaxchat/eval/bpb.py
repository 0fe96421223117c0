"""Bits per byte: a loss that can be compared between tokenizers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxchat.devices.mesh import put_batch
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, hidden_states
from jaxchat.train.loss import Shape, token_nll


def evaluate_bpb(
    params: Params,
    config: GPTConfig,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: Int[np.ndarray, " V"],
    *,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
) -> float:
    """Summed nats of the targets / (ln 2 · their summed bytes), over all batches.

    Args:
      batches: `inputs` and `targets`, int32[rows, T]; each process gives its part of the rows, see `batch_share`.
        Negative targets are left out.
      token_bytes: bytes of each token of the vocabulary; where it is 0 (special tokens) neither nats nor bytes count.
      mesh: rows are shared out over its data and fsdp axes, which must divide them.

    Returns NaN when there is no byte to predict.
    """
    put = jax.device_put if mesh is None else functools.partial(put_batch, mesh)
    token_bytes = np.asarray(token_bytes)
    sums = [
        _sums(
            config,
            jnp.dtype(dtype).name,
            mesh,
            params,
            token_bytes,
            put(b["inputs"]),
            put(b["targets"]),
        )
        for b in batches
    ]
    # Read once, at the end: a batch is dispatched while the one before it is computed.
    nats, count = np.sum(np.array(jax.device_get(sums), np.float64).reshape(-1, 2), axis=0)
    return nats / (math.log(2) * count) if count else math.nan


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
    config: GPTConfig,
    dtype: str,
    mesh: Mesh | None,
    params: Params,
    token_bytes: Int[Array, " V"],
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Nats and bytes of one batch."""
    size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    hidden = hidden_states(config, params, inputs, dtype, mesh=mesh)
    nats = token_nll(hidden, params["head"]["kernel"], jnp.where(size > 0, targets, -1), Shape.of(config, mesh))
    return jnp.sum(nats), jnp.sum(size)
