"""Pages of the cache and rows that are read: as many as the free memory has room for, beside copies of weights."""

import jax.numpy as jnp

from jaxchat.infer.capacity import MEMORY_SHARE, MOST_ROWS, READ_NUMBERS, pages_in, rows_in
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


def test_rows_are_read_in_powers_of_two_as_many_as_there_is_room_for():
    row, dtype = 128 * READ_NUMBERS * 256 * 2, jnp.dtype(jnp.bfloat16)
    rooms = {row // 2: 1, 3 * row: 2, 100 * row: 64, 128 * row: 128, 10_000 * row: MOST_ROWS}
    assert {room: rows_in(room, CONFIG, dtype, 128, scores=False) for room in rooms} == rooms
    with_scores = row + 128 * 128 * CONFIG.num_heads * 4
    assert rows_in(8 * with_scores, CONFIG, dtype, 128, scores=True) == 8
