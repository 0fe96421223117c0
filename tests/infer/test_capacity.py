"""Pages of the cache: as many as the free memory has room for, beside what decoding copies of the weights."""

import jax.numpy as jnp

from jaxchat.infer.capacity import MEMORY_SHARE, pages_in
from jaxchat.infer.programs import Setup
from jaxchat.model.config import GPTConfig
from jaxchat.ops.pages import PAGE

CONFIG = GPTConfig(depth=4, sequence_len=1024, vocab_size=512)
PAGE_BYTES = 2 * 4 * 256 * PAGE * 2  # keys and values of all layers and heads, in 16 bits
COPY = 4 * 256 * 3 * 256 * 2  # the weights of queries, keys and values


def test_the_copy_of_weights_has_its_room():
    setup, dtype = Setup(CONFIG, "bfloat16", None), jnp.dtype(jnp.bfloat16)
    assert pages_in(COPY + 100 * PAGE_BYTES, setup, dtype) == int(MEMORY_SHARE * 100)
    assert pages_in(COPY // 2, setup, dtype) == 0
