"""What all tokenizers share, whichever library encodes: special tokens, interface, rendering of chats, saving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, overload

import numpy as np
from etils import epath

from jaxchat.config import NUM_BYTES
from jaxchat.errors import UserError, check, closest
from jaxchat.tokenizer.conversation import checked_messages, render

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
FILE_NAME = "tokenizer.json"
MIN_VOCAB = NUM_BYTES + len(SPECIAL_TOKENS)

# Called during training: with "count" and the characters read so far, then with "merge" and the tokens learned so far.
# An exception from it ends the training.
Progress = Callable[[str, int], None]


class BaseTokenizer(ABC):
    """Converts text to ids and back.

    Encoding treats text that spells a special token as plain text. Only `prepend`, `append`, `encode_special` and the
    two `render_` methods produce special tokens.

    Attributes:
      special_tokens: names and ids of the special tokens: `SPECIAL_TOKENS`, and others that a foreign vocabulary has.
    """

    special_tokens: dict[str, int]

    # --- what each backend implements -----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_file(cls, path: epath.PathLike) -> Self:
        """Reads a tokenizer file. Raises `UserError` if it is missing, damaged or not possible with this backend."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids, special tokens included."""

    @abstractmethod
    def tokens(self) -> list[bytes]:
        """The bytes of every token, by id; those of a special token are its name."""

    @abstractmethod
    def encode_to_numpy(
        self, texts: list[str], prepend: int | str | None = None, num_threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids, uint32[N], and offsets, int64[len(texts) + 1], of texts: text i has `ids[offsets[i]:offsets[i + 1]]`."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD, special tokens their names.

        Raises `UserError` if an id is out of range.
        """

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact bytes of ids, which may begin or end in the middle of a character."""

    @abstractmethod
    def decode_batch(self, ids: np.ndarray, offsets: np.ndarray) -> list[str]:
        """The texts of ids and offsets: the inverse of `encode_to_numpy`."""

    @abstractmethod
    def to_json(self) -> str:
        """The text of a `tokenizer.json`, with which Hugging Face's `tokenizers` gives the same ids."""

    @abstractmethod
    def _encode(
        self, texts: list[str], prepend: int | None, append: int | None, num_threads: int | None
    ) -> list[list[int]]: ...

    # --- what backends share --------------------------------------------------------------------------------------

    @classmethod
    def from_directory(cls, directory: epath.PathLike) -> Self:
        """Reads what `save` has written. Raises `UserError` if the file is missing or damaged."""
        return cls.from_file(epath.Path(directory) / FILE_NAME)

    def save(self, directory: epath.PathLike) -> None:
        """Writes `tokenizer.json` to a directory, which is created if necessary."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE_NAME).write_text(self.to_json(), encoding="utf-8")

    @property
    def bos_token_id(self) -> int:
        return self.special_tokens["<|bos|>"]

    def encode_special(self, name: str) -> int:
        """The id of a special token such as `<|bos|>`."""
        if name not in self.special_tokens:  # not `check`, which would build the message each time
            raise UserError(f"no special token {name!r}{closest(name, self.special_tokens)}")
        return self.special_tokens[name]

    @property
    def without_output(self) -> int:
        """How many ids there are before `<|output_start|>` and `<|output_end|>`, if these are the last; else all."""
        last = {self.encode_special("<|output_start|>"), self.encode_special("<|output_end|>")}
        return self.vocab_size - 2 if last == {self.vocab_size - 2, self.vocab_size - 1} else self.vocab_size

    @overload
    def encode(
        self,
        text: str,
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> list[int]: ...
    @overload
    def encode(
        self,
        text: list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> list[list[int]]: ...
    def encode(self, text, prepend=None, append=None, num_threads=None):
        """The ids of a text, or of each text in a list.

        `prepend` and `append` are ids or names of special tokens to add around each text. Lone surrogates are encoded
        as U+FFFD.
        """
        texts = [text] if isinstance(text, str) else text
        ids = self._encode(texts, self._id(prepend), self._id(append), num_threads)
        return ids[0] if isinstance(text, str) else ids

    def id_to_bytes(self, token: int) -> bytes:
        return self.decode_bytes([token])

    def token_bytes(self) -> np.ndarray:
        """How many bytes of text each token stands for, int32[vocab_size]; 0 for special tokens."""
        sizes = np.array([len(token) for token in self.tokens()], np.int32)
        sizes[list(self.special_tokens.values())] = 0
        return sizes

    def _id(self, token: int | str | None) -> int | None:
        if isinstance(token, str):
            return self.encode_special(token)
        check(token is None or 0 <= token < self.vocab_size, out_of_range(token, self.vocab_size))
        return token

    def render_conversation(
        self, conversation: Mapping[str, Any], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """The ids of a conversation and a mask of the same length, both cut to `max_tokens`.

        The mask is 1 for what the model learns to write (text, tool calls and `<|assistant_end|>` of the assistant),
        and 0 for the rest, including the output of tools.

        `conversation["messages"]` begins with an optional system message, which is joined to the user's first message;
        then user and assistant alternate. A message has a `role` and a `content`. The assistant's content may be a list
        of parts, each with a `type` (text, python, python_output) and a `text`. Raises `ValueError` for anything else.
        """
        ids, mask = render(self, checked_messages(conversation))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Mapping[str, Any]) -> list[int]:
        """The ids of a conversation up to and including the `<|assistant_start|>` of the assistant's next message.

        A final message of the assistant is left out. Raises `ValueError` as `render_conversation` does.
        """
        messages = checked_messages(conversation)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return [*render(self, messages)[0], self.encode_special("<|assistant_start|>")]


def out_of_range(token: int | None, size: int) -> str:
    return f"token id {token} is out of range: this tokenizer has ids 0 to {size - 1}"


def check_size(vocab_size: int) -> None:
    """Raises `UserError` for a vocabulary too small for the bytes and the special tokens."""
    check(
        vocab_size >= MIN_VOCAB,
        f"the vocabulary size is {vocab_size}; it must be at least {MIN_VOCAB}: "
        f"{NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens",
    )


def check_learned(tokens: int, vocab_size: int) -> None:
    """Raises `UserError` if training has learned too few `tokens`, which include bytes but not special tokens."""
    supported = tokens + len(SPECIAL_TOKENS)
    check(
        supported == vocab_size,
        f"a vocabulary of {vocab_size} is too large: this text supports {tokens - NUM_BYTES} merges, so at most "
        f"{supported} tokens; give more text or a smaller vocabulary",
    )
