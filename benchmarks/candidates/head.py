"""A candidate for the product with the head: the other products' kernel, whose blocks take columns in turn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params
from jaxchat.ops.cross_entropy import NEVER, softcap
from jaxchat.ops.linear import times
from jaxchat.ops.product_chain import Product, product_chain


def logits(config: GPTConfig, params: Params, hidden: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """What `jaxchat.model.gpt.logits` gives."""
    capped = softcap(scores(hidden, params["head"]["kernel"]), config.logit_cap)
    return jnp.where(jnp.arange(capped.shape[1]) < config.vocab_size, capped, NEVER)


def scores(hidden: Float[Array, "R D"], head: Float[Array, "D V"]) -> Float[Array, "R V"]:
    """hidden @ head in fp32; by the formula on a CPU."""
    if jax.default_backend() == "cpu":
        return times(hidden, head, jnp.float32)
    return product_chain([hidden], [head], [Product.of(head, source=0, flipped=True)])[0][:, : len(hidden)].T
