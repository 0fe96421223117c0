"""What 8 bits cost: bits per byte of text, computed as the engine computes, through the pages of a KV cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat.analysis.run_text import text_of
from jaxchat.data.loader import pretrain_batches
from jaxchat.eval.bpb import bits_per_byte, nats_and_bytes
from jaxchat.infer.quantized import KVCache, Weights, cache_dtype, stored
from jaxchat.infer.trained import TrainedModel
from jaxchat.model.config import GPTConfig
from jaxchat.model.generation import init_pages, paged_hidden, reads_previous
from jaxchat.model.gpt import Params
from jaxchat.ops.pages import PAGE, Place
from jaxchat.runs.directory import RunDirectory
from jaxchat.stopping import raise_if_asked
from jaxchat.train.loss import LossConfig

ROWS = 8  # of a batch
TOKENS = 1 << 18  # read at most


def validation_batches(directory: RunDirectory, trained: TrainedModel) -> list[dict[str, np.ndarray]]:
    """The beginning of the text that the run validates on, in rows of the model's context.

    Raises:
      UserError: as `text_of`.
    """
    experiment, length = trained.experiment, trained.model.sequence_len
    text = text_of(directory, experiment.data, on_bad="skip", say=lambda line: None)
    batches = pretrain_batches(
        text.val, trained.tokenizer, rows=ROWS, sequence_len=length, seed=experiment.seed, repeat=False
    )
    return list(itertools.islice(batches, max(1, TOKENS // (ROWS * length))))


def paged_bpb(
    params: Params,
    config: GPTConfig,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: Int[np.ndarray, " V"],
    *,
    dtype: DTypeLike,
    weights: Weights = "auto",
    kv_cache: KVCache = "auto",
) -> float:
    """Bits per byte over all batches, as `jaxchat.eval.bpb.evaluate_bpb`, with weights and cache as an engine has them.

    Each token's keys and values are written to the cache before anything attends to them, as in decoding.

    Args:
      params: of any dtype, on one device.
      dtype: in which the engine computes.
    """
    params = stored(params, dtype, weights)
    name, kept = jnp.dtype(dtype).name, jnp.dtype(cache_dtype(dtype, kv_cache)).name
    sizes, sums = jax.device_put(np.asarray(token_bytes)), []
    for batch in batches:
        raise_if_asked()
        sums.append(_sums(config, name, kept, params, sizes, batch["inputs"], batch["targets"]))
    return bits_per_byte(sums)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
    config: GPTConfig,
    dtype: str,
    kept: str,
    params: Params,
    token_bytes: Int[Array, " V"],
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The nats and bytes of one batch."""
    rows, length = inputs.shape
    pages = -(-length // PAGE)
    table = jnp.arange(rows * pages).reshape(rows, pages)
    place = Place(table, jnp.zeros(rows, jnp.int32), jnp.full(rows, length))
    before = jnp.full(rows, -1) if reads_previous(config) else None
    empty = init_pages(config, rows * pages, kept)
    hidden, _ = paged_hidden(config, params, inputs, place, empty, dtype, before=before)
    return nats_and_bytes(hidden, params["head"]["kernel"].astype(dtype), targets, token_bytes, LossConfig.of(config))
