import pytest

from jaxchat.tokenizer import Tokenizer
from tests.tokenizer.texts import corpus


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(iter(corpus(0, 30_000)), 900)


@pytest.fixture(scope="session")
def peer(tokenizer):
    return tokenizer.to_tiktoken()
