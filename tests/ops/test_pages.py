"""Attention over pages against a loop over tokens in NumPy: any lengths, any pages, windows, grouped queries."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.ops.pages import PAGE, Place, attend_pages, new_pages, write_pages

SIZE = 8


def expected(q, k, v, window, scale):
    """[N, H]: one query's attention over all keys [S, K, H] given, of which the last is its own."""
    heads, kv_heads = len(q), k.shape[1]
    k, v = k[-(window + 1) :] if window is not None else k, v[-(window + 1) :] if window is not None else v
    out = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = k[:, shared] @ q[head] * scale / np.sqrt(SIZE)
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ v[:, shared])
    return np.stack(out)


@pytest.mark.parametrize("window", [None, 1, 30, PAGE, PAGE + 1, 200])
@pytest.mark.parametrize(("heads", "kv_heads", "scale"), [(2, 2, 1.0), (4, 2, 1.5), (3, 1, 1.0)])
def test_rows_of_any_length_in_any_pages(heads, kv_heads, scale, window):
    draw = np.random.default_rng(heads * 7 + kv_heads)
    lengths = [3, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5]
    steps = [3, 5, 1, 2, 7]  # the tokens of each row that come last, in one batch
    k, v = draw.normal(size=(2, len(lengths), 4 * PAGE, kv_heads, SIZE)).astype(np.float32)
    q = draw.normal(size=(len(lengths), 4 * PAGE, heads, SIZE)).astype(np.float32)
    table = draw.permutation(4 * len(lengths) + 3)[: 4 * len(lengths)].reshape(len(lengths), 4).astype(np.int32)
    pages = new_pages(4 * len(lengths) + 3, kv_heads, SIZE, jnp.float32)

    def batch(arrays, start, count):
        wide = max(count)
        padded = [np.zeros((len(lengths), wide, *array.shape[2:]), np.float32) for array in arrays]
        for array, out in zip(arrays, padded, strict=True):
            for row, (first, size) in enumerate(zip(start, count, strict=True)):
                out[row, :size] = array[row, first : first + size]
        return *map(jnp.asarray, padded), Place(
            jnp.asarray(table), jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32)
        )

    before = [length - new for length, new in zip(lengths, steps, strict=True)]
    *new, place = batch((k, v), [0] * len(lengths), before)
    pages = write_pages(*new, pages, place)
    *new, queries, place = batch((k, v, q), before, steps)
    pages = write_pages(*new, pages, place)
    mixed = attend_pages(queries, pages, place, window, scale)
    for row, (start, count) in enumerate(zip(before, steps, strict=True)):
        for i in range(count):
            end = start + i + 1
            right = expected(q[row, end - 1], k[row, :end], v[row, :end], window, scale)
            np.testing.assert_allclose(mixed[row, i], right, atol=1e-5)


def test_padding_and_idle_rows_write_nothing():
    pages = new_pages(3, 1, SIZE, jnp.float32)
    ones = jnp.ones((2, 4, 1, SIZE))
    table = jnp.array([[1], [2]], jnp.int32)
    pages = write_pages(ones, ones, pages, Place(table, jnp.array([0, 0]), jnp.array([3, 0])))
    written = np.asarray(pages["k"]).any((1, 3))
    assert np.argwhere(written).tolist() == [[1, 0], [1, 1], [1, 2]]
    mixed = attend_pages(ones, pages, Place(table, jnp.array([0, 0]), jnp.array([3, 0])))
    assert np.isfinite(mixed).all() and not np.asarray(mixed[1]).any()
