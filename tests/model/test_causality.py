"""No position sees what comes after it, from the text of a file to the logits."""

import json

import jax
import numpy as np
import pytest

from jaxchat.data.loader import chat_batches, pretrain_batches
from jaxchat.data.text.folder import find_text
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.tokenizer import Tokenizer

CONTEXT, ROWS = 32, 4
MODEL = GPTConfig(depth=2, sequence_len=CONTEXT, vocab_size=265)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte is a token: what changes one letter changes one token."""
    return Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture(scope="module")
def forward():
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    # Output matrices begin at zero; here every position does speak to the later ones.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    run = jax.jit(lambda tokens: logits(MODEL, params, hidden_states(MODEL, params, tokens)))
    return lambda tokens: np.asarray(run(tokens))[..., : MODEL.vocab_size]


def assert_causal(forward, before, after, row, column):
    """`before` and `after` differ in the input at [row, column] alone: no logit before it moves, and it does."""
    moved = np.argwhere(before["inputs"] != after["inputs"])
    assert moved.tolist() == [[row, column]]
    # As a target it is one position earlier, in the row that has that position.
    where = row * CONTEXT + column - 1
    changed = np.argwhere((before["targets"] != after["targets"]).reshape(-1)).reshape(-1)
    assert changed.tolist() == [where]
    one, other = forward(before["inputs"]), forward(after["inputs"])
    others = np.arange(ROWS) != row
    np.testing.assert_array_equal(one[others], other[others])
    np.testing.assert_array_equal(one[row, :column], other[row, :column])
    difference = np.abs(one - other)[row].max(axis=-1)
    assert difference[column] > 1e-3
    assert (difference[column:] > 0).all()


DOCUMENTS = ["The fox is red.", "A boat lies in the harbour, and no one rows it.", "Rain.", "It is late, she said."] * 3


def batch_of(folder, tokenizer, texts):
    folder.mkdir()
    for name, part in (("a", texts), ("b", ["validation"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    side = find_text(folder).train
    return next(pretrain_batches(side, tokenizer, rows=ROWS, sequence_len=CONTEXT, seed=0))


# Within a document, at its first letter, at its last, and at the first position of a row.
@pytest.mark.parametrize("document, letter", [(0, 4), (1, 20), (2, 0), (2, 4), (1, 46), (1, 15)])
def test_pretraining_text(tmp_path, tokenizer, forward, document, letter):
    changed = list(DOCUMENTS)
    changed[document] = changed[document][:letter] + "Z" + changed[document][letter + 1 :]
    place = sum(1 + len(text) for text in DOCUMENTS[:document]) + 1 + letter  # each begins with <|bos|>
    before = batch_of(tmp_path / "before", tokenizer, DOCUMENTS)
    after = batch_of(tmp_path / "after", tokenizer, changed)
    assert_causal(forward, before, after, *divmod(place, CONTEXT))


def test_a_row_begins_where_the_last_one_ends():
    """The case above that matters for packing is indeed there."""
    assert (1 + len(DOCUMENTS[0]) + 1 + 15) % CONTEXT == 0


def test_conversations(tokenizer, forward):
    def chat(answer):
        return [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]}] * 8

    def batch(answer):
        return next(chat_batches(chat(answer), tokenizer, rows=ROWS, sequence_len=CONTEXT, seed=0))

    before, after = batch("So it is."), batch("So it Zs.")
    for row in range(ROWS):
        columns = np.flatnonzero(before["inputs"][row] != after["inputs"][row])
        targets = np.flatnonzero(before["targets"][row] != after["targets"][row])
        assert targets.tolist() == (columns - 1).tolist() and len(columns)
        first = columns[0]
        one, other = forward(before["inputs"])[row], forward(after["inputs"])[row]
        np.testing.assert_array_equal(one[:first], other[:first])
        assert np.abs(one[first] - other[first]).max() > 1e-3
