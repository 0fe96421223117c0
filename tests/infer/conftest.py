import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.tokenizer import Tokenizer
from jaxchat.train.step import init_state, make_train_step

CONVERSATIONS = [
    [("What is 34 + 58?", [("python", "34 + 58"), ("python_output", "92"), ("text", "It is 92.")])],
    [
        (
            "How many r's are in strawberry?",
            [("python", "'strawberry'.count('r')"), ("python_output", "3"), ("text", "3")],
        )
    ],
    [("Divide by nothing!", [("python", "1/0"), ("python_output", ""), ("text", "No.")])],
    [("Say it twice.", [("python", "2*3"), ("python_output", "6"), ("python", "6*7"), ("python_output", "42")])],
    [("Hello?", [("text", "Grüße, 日本 🙂!")])],
]


@pytest.fixture(scope="session")
def tokenizer():
    text = "the quick brown fox jumps over the lazy dog, thirty-four and fifty-eight make ninety-two. " * 3
    return Tokenizer.train_from_iterator([text], 290)


@pytest.fixture(scope="session")
def conversations():
    def message(question, parts):
        content = [{"type": kind, "text": text} for kind, text in parts]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": content}]

    return [{"messages": message(*turns[0])} for turns in CONVERSATIONS]


@pytest.fixture(scope="session")
def config(tokenizer):
    return GPTConfig(depth=2, sequence_len=96, vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="session")
def random_params(config):
    """Parameters without the initial zeros, and with a head large enough for clear preferences."""
    keys = iter(jax.random.split(jax.random.key(1), 100))

    def fill(leaf):
        return jnp.where(
            jnp.any(leaf), leaf, jax.random.normal(next(keys), leaf.shape) / len(jnp.atleast_1d(leaf)) ** 0.5
        )

    return jax.tree.map(fill, init_params(config, jax.random.key(0)))


@pytest.fixture(scope="session")
def trained_params(config, tokenizer, conversations):
    """A model that has memorized `CONVERSATIONS`."""
    length = config.sequence_len
    inputs, targets = np.zeros((1, 5, length), np.int32), np.full((1, 5, length), -1, np.int32)
    for i, conversation in enumerate(conversations):
        ids, mask = map(np.array, tokenizer.render_conversation(conversation, max_tokens=length + 1))
        inputs[0, i, : len(ids) - 1] = ids[:-1]
        targets[0, i, : len(ids) - 1] = np.where(mask[1:] == 1, ids[1:], -1)
    optimizer = optax.adam(3e-3)
    step = make_train_step(config, optimizer)
    state = init_state(init_params(config, jax.random.key(0)), optimizer)
    for _ in range(80):
        state, metrics = step(state, {"inputs": inputs, "targets": targets})
    assert metrics["loss"] < 0.02
    return state["params"]
