"""Text to token ids and back: byte-pair encoding with nine special tokens, and the form conversations have in tokens.

The algorithms are in `rust_tokenizer/`. Ids are those of `tiktoken` for the same ranks; merges are those of `rustbpe`
for the same text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jaxchat_tokenizer as rust
import numpy as np
from etils import epath

from jaxchat.config import NUM_BYTES, UserError, check, closest

if TYPE_CHECKING:
    import tiktoken

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
SPLIT_PATTERN: str = rust.DEFAULT_PATTERN
FILE_NAME = "tokenizer.json"
MIN_VOCAB = NUM_BYTES + len(SPECIAL_TOKENS)

# The parts of an assistant's message: the tokens around it, and whether the model is to learn it.
_PARTS = {
    "text": ((), 1),
    "python": (("<|python_start|>", "<|python_end|>"), 1),
    "python_output": (("<|output_start|>", "<|output_end|>"), 0),
}


class Tokenizer:
    """A trained vocabulary. Ids of merges come first, in the order in which they were learnt; then `SPECIAL_TOKENS`.

    Encoding treats text that spells a special token as plain text; only `prepend`, `append`, `encode_special` and the
    two `render_` methods write special tokens. It releases the interpreter lock and uses all cores for many texts.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str = SPLIT_PATTERN):
        """`tokens[id]` are the bytes of a token, among them every single byte; a token is merged before those behind
        it. Raises `UserError` when they do not make a vocabulary or the pattern does not compile."""
        with _user_errors():
            self._rust = rust.Encoder(list(tokens), list(SPECIAL_TOKENS), pattern)
        self._special = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int, *, pattern: str = SPLIT_PATTERN) -> Tokenizer:
        """Learns `vocab_size` tokens, the special ones included, from texts that are read once.

        Every step merges the most frequent pair of neighbours within the pieces of `pattern`, ties to the lowest
        (left id, right id). Memory grows with the distinct pieces. Raises `UserError` when `vocab_size` is below 265 or
        above what the texts support."""
        check(
            vocab_size >= MIN_VOCAB,
            f"the vocabulary size is {vocab_size}; it must be at least {MIN_VOCAB}: "
            f"{NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens",
        )
        with _user_errors():
            tokens = rust.train(texts, vocab_size - len(SPECIAL_TOKENS), pattern)
        supported = len(tokens) + len(SPECIAL_TOKENS)
        check(
            supported == vocab_size,
            f"a vocabulary of {vocab_size} is more than this text supports: it has merges for {supported} tokens; "
            f"give more text or a vocabulary of at most {supported}",
        )
        return cls(tokens, pattern)

    @classmethod
    def from_mergeable_ranks(cls, ranks: Mapping[bytes, int], pattern: str = SPLIT_PATTERN) -> Tokenizer:
        """A tokenizer from tiktoken's ranks, which must be 0, 1, 2, ... without gaps."""
        tokens = sorted(ranks, key=ranks.__getitem__)
        for expected, token in enumerate(tokens):
            check(
                ranks[token] == expected,
                f"mergeable ranks must be 0 to {len(tokens) - 1}, each once; found {ranks[token]} at {expected}",
            )
        return cls(tokens, pattern)

    @classmethod
    def from_directory(cls, directory: epath.PathLike) -> Tokenizer:
        """Reads what `save` has written. Raises `UserError` when the file is missing or damaged."""
        path = epath.Path(directory) / FILE_NAME
        check(path.is_file(), f"no tokenizer at {path}; train one with the tokenizer stage")
        try:
            return cls(*_from_json(json.loads(path.read_text(encoding="utf-8"))))
        except UserError as error:
            raise UserError(f"{path} is not a tokenizer of jaxchat: {error}") from error
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged or not a tokenizer of jaxchat ({type(error).__name__}: {error}); train it again"
            ) from error

    def save(self, directory: epath.PathLike) -> None:
        """Writes `tokenizer.json` into a directory, which is made if it is missing. The format is that of Hugging
        Face's `tokenizers`, which reads it with the same ids."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_to_json(self._rust.tokens(), self.pattern), ensure_ascii=False, indent=1)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    def __reduce__(self):
        return Tokenizer, (self._rust.tokens(), self.pattern)

    @property
    def pattern(self) -> str:
        return self._rust.pattern

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return self._special[SPECIAL_TOKENS[-1]] + 1

    @property
    def bos_token_id(self) -> int:
        return self._special["<|bos|>"]

    @property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """tiktoken's form of the vocabulary: bytes of a token to its id, without the special tokens."""
        return {token: rank for rank, token in enumerate(self._rust.tokens())}

    def token_bytes(self) -> np.ndarray:
        """int32[vocab_size]: the bytes of text that each token stands for; 0 for special tokens."""
        sizes = [len(token) for token in self._rust.tokens()]
        return np.array(sizes + [0] * len(SPECIAL_TOKENS), np.int32)

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same tokenizer in `tiktoken`, which must be installed."""
        import tiktoken

        return tiktoken.Encoding(
            "jaxchat", pat_str=self.pattern, mergeable_ranks=self.mergeable_ranks, special_tokens=dict(self._special)
        )

    def encode_special(self, name: str) -> int:
        """The id of a special token such as `<|bos|>`."""
        if name not in self._special:  # rendering calls this for every message: no message is built in vain
            raise UserError(f"no special token {name!r}{closest(name, self._special)}")
        return self._special[name]

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each of a list of texts. `prepend` and `append` are ids or names of special tokens, put
        around each text. Lone surrogates count as U+FFFD."""
        texts = [text] if isinstance(text, str) else text
        with _user_errors():
            ids = self._rust.encode(texts, self._id(prepend), self._id(append), num_threads)
        return ids[0] if isinstance(text, str) else ids

    def encode_to_numpy(
        self, texts: list[str], prepend: int | str | None = None, num_threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Flat ids, uint32[N], and offsets, int64[len(texts) + 1]: text i has `ids[offsets[i]:offsets[i + 1]]`."""
        with _user_errors():
            return self._rust.encode_to_numpy(texts, self._id(prepend), num_threads)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids. Bytes that are not UTF-8 become U+FFFD; special tokens are spelled out. Raises `UserError` when
        an id is out of range."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact bytes of ids: part of a character may stand at either end."""
        with _user_errors():
            return self._rust.decode(ids if isinstance(ids, list) else np.asarray(ids, np.int64))

    def id_to_bytes(self, token: int) -> bytes:
        return self.decode_bytes([token])

    def _id(self, token: int | str | None) -> int | None:
        if isinstance(token, str):
            return self.encode_special(token)
        check(
            token is None or 0 <= token < self.vocab_size,
            f"token id {token} is out of range: this tokenizer has ids 0 to {self.vocab_size - 1}",
        )
        return token

    def render_conversation(
        self, conversation: Mapping[str, Any], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """The ids of a conversation, cut to `max_tokens`, and a mask of the same length: 1 for what the model learns to
        write (its text, its tool calls, its `<|assistant_end|>`), 0 for the rest, the output of tools included.

        `conversation["messages"]`: an optional system message, which is joined to the first of the user; then user and
        assistant in turn. A message has a `role` and a `content`; the assistant's may be a list of parts, each with a
        `type` (text, python, python_output) and a `text`. Raises `ValueError` for anything else."""
        return self._render(_checked_messages(conversation), max_tokens)

    def render_for_completion(self, conversation: Mapping[str, Any]) -> list[int]:
        """The ids of a conversation up to the assistant's next message: the last message is left out if it is the
        assistant's, and `<|assistant_start|>` follows. Raises `ValueError` as `render_conversation` does."""
        messages = _checked_messages(conversation)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids, _ = self._render(messages, None)
        return [*ids, self._special["<|assistant_start|>"]]

    def _render(self, messages: list[Mapping[str, Any]], max_tokens: int | None) -> tuple[list[int], list[int]]:
        ids: list[int] = [self.bos_token_id]
        mask: list[int] = [0]

        def add(tokens: list[int], trained: int) -> None:
            ids.extend(tokens)
            mask.extend([trained] * len(tokens))

        for message in messages:
            content = message["content"]
            if message["role"] == "user":
                add(self.encode(content, "<|user_start|>", "<|user_end|>"), 0)
                continue
            add([self._special["<|assistant_start|>"]], 0)
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                around, trained = _PARTS[part["type"]]
                add(self.encode(part["text"], *around), trained)
            add([self._special["<|assistant_end|>"]], 1)
        return ids[:max_tokens], mask[:max_tokens]


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Errors of the Rust side are errors of its input."""
    try:
        yield
    except rust.TokenizerError as error:
        raise UserError(str(error)) from error


def _checked_messages(conversation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages with the system's joined to the first of the user, all of them known to be well-formed."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("a conversation is a dict with a list of at least one message under 'messages'")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"message {index} of the conversation has no 'role' or no 'content'")
    messages = list(messages)
    first = messages[0]
    if first["role"] == "system":
        if len(messages) == 1 or messages[1]["role"] != "user":
            raise ValueError("a system message must be followed by a message of the user")
        for index in (0, 1):
            _check_text(messages[index], index)
        joined = first["content"] + "\n\n" + messages[1]["content"]
        messages[:2] = [{"role": "user", "content": joined}]
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise ValueError(
                f"message {index} of the conversation is from {message['role']!r}, expected {expected!r}: "
                "roles alternate and the user begins"
            )
        if expected == "user" or isinstance(message["content"], str):
            _check_text(message, index)
        else:
            _check_parts(message["content"], index)
    return messages


def _check_text(message: Mapping[str, Any], index: int) -> None:
    if not isinstance(message["content"], str):
        raise ValueError(f"the content of message {index}, from {message['role']!r}, is not a string")


def _check_parts(parts: Any, index: int) -> None:
    if not isinstance(parts, Sequence):
        raise ValueError(f"the content of message {index} is neither a string nor a list of parts")
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in _PARTS or not isinstance(part.get("text"), str):
            raise ValueError(
                f"message {index} of the conversation has a part that is not "
                f"{{'type': {' | '.join(map(repr, _PARTS))}, 'text': str}}: {part!r}"
            )


def _alphabet() -> dict[int, int]:
    """A printable character for every byte, GPT-2's, in the form of `str.translate`: itself if it is printable in
    Latin-1, else the next free one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(NUM_BYTES) if byte not in printable)
    return {byte: byte for byte in printable} | {byte: 0x100 + i for i, byte in enumerate(others)}


_TO_TEXT = _alphabet()
_TO_BYTE = {character: byte for byte, character in _TO_TEXT.items()}


def _to_json(tokens: list[bytes], pattern: str) -> dict[str, Any]:
    vocab = {token.decode("latin-1").translate(_TO_TEXT): rank for rank, token in enumerate(tokens)}
    # Any two tokens that make a third may be merged, as in tiktoken, and not only the pair that was merged in training.
    merges = [
        [name[:middle], name[middle:]]
        for name in vocab
        for middle in range(1, len(name))
        if name[:middle] in vocab and name[middle:] in vocab
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(tokens) + i, "content": name, **special} for i, name in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }


def _from_json(data: dict[str, Any]) -> tuple[list[bytes], str]:
    """The tokens and the pattern. Equality with what would be written proves that nothing is lost or changed."""
    pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    tokens = [name.translate(_TO_BYTE).encode("latin-1") for name in data["model"]["vocab"]]
    if data != _to_json(tokens, pattern):
        raise ValueError("its parts do not fit together")
    return tokens, pattern
