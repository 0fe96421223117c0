"""Small batches of text, and their comparison, for the tests of the loader."""

import numpy as np

from jaxchat.data.loader import pretrain_batches
from jaxchat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train_from_iterator(["the cat sat on the mat, and the cat sat on the hat"] * 3, 270)
BOS = TOKENIZER.bos_token_id
PACKINGS = ("best-fit", "concat")


def text_batches(side, **changes):
    return pretrain_batches(side, TOKENIZER, **{"rows": 2, "sequence_len": 16, "seed": 0} | changes)


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
        np.testing.assert_array_equal(a["targets"], b["targets"])
