"""Byte-pair encoding with the Rust extension, whose algorithms are in `rust_tokenizer/`.

Ids are the same as those of `tiktoken` for the same ranks, and of Hugging Face's `tokenizers` for the same
`tokenizer.json`. Merges are the same as those of `rustbpe` for the same text, up to the first that would make a token
of more than `MAX_TOKEN_BYTES`: `rustbpe` makes it, which happens in runs of one character rather than in ordinary text.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from etils import epath

import jaxchat_tokenizer as rust
from jaxchat.errors import UserError, check, closest
from jaxchat.tokenizer.base import SPECIAL_TOKENS, BaseTokenizer, Progress, check_learned, check_size
from jaxchat.tokenizer.files import read_bytes, read_text, tokenizer_file
from jaxchat.tokenizer.foreign.tiktoken_ranks import from_ranks, parse_ranks
from jaxchat.tokenizer.foreign.tokenizer_json import from_json, parse, to_json
from jaxchat.tokenizer.patterns import MAX_TOKEN_BYTES, SPLIT_PATTERN, TIKTOKEN_PATTERNS
from jaxchat.tokenizer.text_files import read_batches
from jaxchat.tokenizer.vocabulary import Vocabulary, naming_file, with_chat_tokens

if TYPE_CHECKING:
    import tiktoken


class Tokenizer(BaseTokenizer):
    """A byte-level BPE tokenizer. Its ids are the tokens, in the order in which they were learned, then special tokens.

    Encoding releases the interpreter lock, and uses all cores for several texts.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str = SPLIT_PATTERN):
        """Creates a tokenizer from the bytes of its tokens.

        Every single byte must be a token. Tokens with lower ids are merged first. Raises `UserError` if the tokens are
        not a vocabulary or the pattern does not compile.
        """
        self._set(Vocabulary(list(tokens), with_chat_tokens({}, len(tokens)), pattern))

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """Creates a tokenizer that may have other rules or special tokens than those that jaxchat trains."""
        self = cls.__new__(cls)
        self._set(vocabulary)
        return self

    def _set(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self.special_tokens = vocabulary, vocabulary.special
        following = [name for name, id in vocabulary.special.items() if id >= len(vocabulary.tokens)]
        with _user_errors():
            self._rust = rust.Encoder(
                vocabulary.tokens,
                following,
                vocabulary.pattern,
                merges=vocabulary.merges,
                whole_pieces=vocabulary.whole_pieces,
                keep_gaps=vocabulary.keep_gaps,
            )

    # --- training and loading -------------------------------------------------------------------------------------

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, *, pattern: str = SPLIT_PATTERN, progress: Progress | None = None
    ) -> Self:
        """Learns `vocab_size` tokens, including the special ones, from texts that are read once.

        Every step merges the most frequent pair of neighbours within the pieces of `pattern`, in a tie the one with the
        lowest (left id, right id), and passes over pairs that together have more than `MAX_TOKEN_BYTES`. Memory grows
        with the number of distinct pieces. Raises `UserError` if `vocab_size` is below 265 or above what the texts
        support.
        """
        check_size(vocab_size)
        size = vocab_size - len(SPECIAL_TOKENS)
        with _user_errors():
            tokens = rust.train(texts, size, pattern, longest=MAX_TOKEN_BYTES, progress=progress)
        check_learned(len(tokens), vocab_size)
        return cls(tokens, pattern)

    @classmethod
    def train_from_files(
        cls,
        paths: Iterable[str | os.PathLike],
        vocab_size: int,
        *,
        pattern: str = SPLIT_PATTERN,
        max_chars: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learns from files, without a Python string for each text: parquet with a column `text`, or plain text.

        Reading ends with the text that reaches `max_chars`. At the end `progress` is called with "read" and the number
        of characters.
        """
        check_size(vocab_size)
        paths = [os.fspath(path) for path in paths]
        for path in paths:
            check(
                path.lower().endswith((".parquet", ".txt")),
                f"{path} is neither .parquet nor .txt; train from an iterator",
            )
        size, batches = vocab_size - len(SPECIAL_TOKENS), read_batches(paths)
        with _user_errors():
            tokens, characters = rust.train_arrow(
                batches, size, pattern, max_chars, longest=MAX_TOKEN_BYTES, progress=progress
            )
        check_learned(len(tokens), vocab_size)
        if progress is not None:
            progress("read", characters)
        return cls(tokens, pattern)

    @classmethod
    def from_mergeable_ranks(cls, ranks: Mapping[bytes, int], pattern: str = SPLIT_PATTERN) -> Self:
        """Creates a tokenizer from tiktoken's ranks, which must be 0, 1, 2, ... without gaps."""
        tokens = sorted(ranks, key=ranks.__getitem__)
        for expected, token in enumerate(tokens):
            check(
                ranks[token] == expected,
                f"mergeable ranks must be 0 to {len(tokens) - 1}, each once; found {ranks[token]} at {expected}",
            )
        return cls(tokens, pattern)

    @classmethod
    def from_tiktoken(cls, encoding: tiktoken.Encoding | str | os.PathLike, pattern: str | None = None) -> Self:
        """Creates a tokenizer from a `tiktoken.Encoding`, whose special tokens keep their ids, or a `.tiktoken` file.

        The split pattern is `pattern`, or the published one for the file's name, such as `cl100k_base.tiktoken`. Raises
        `UserError` if neither is given, the file is damaged, or its ranks have gaps that cannot be filled.
        """
        if not isinstance(encoding, str | os.PathLike):
            vocabulary = from_ranks(encoding._mergeable_ranks, encoding._special_tokens, pattern or encoding._pat_str)
            return cls.from_vocabulary(vocabulary)
        path = tokenizer_file(encoding)
        pattern = pattern or TIKTOKEN_PATTERNS.get(path.stem.lower())
        if pattern is None:
            raise UserError(_unknown_pattern(path))
        with naming_file(path):
            return cls.from_vocabulary(from_ranks(parse_ranks(read_bytes(path).splitlines()), {}, pattern))

    @classmethod
    def from_file(cls, path: epath.PathLike) -> Self:
        """Reads a `tokenizer.json`: one that `save` has written, or another byte-level BPE tokenizer.

        Special tokens of a foreign file keep their ids; the missing ones of `SPECIAL_TOKENS` are appended. Raises
        `UserError` if the file is missing or damaged, or cannot be reproduced exactly.
        """
        path = tokenizer_file(path)
        with naming_file(path):
            return cls.from_text(read_text(path))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads the text of a `tokenizer.json`.

        Raises `Unsupported` if it cannot be reproduced exactly, and what `from_json` raises if it is damaged.
        """
        vocabulary = from_json(parse(text))
        return cls.from_vocabulary(vocabulary)

    # --- the vocabulary -------------------------------------------------------------------------------------------

    @property
    def pattern(self) -> str:
        return self._vocabulary.pattern

    @property
    def vocab_size(self) -> int:
        return max(len(self._vocabulary.tokens), max(self.special_tokens.values()) + 1)

    @property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """The vocabulary as tiktoken has it: the id of each token's bytes, without the special tokens."""
        special = set(self.special_tokens.values())
        return {token: id for id, token in enumerate(self._vocabulary.tokens) if id not in special}

    def tokens(self) -> list[bytes]:
        size = len(self._vocabulary.tokens)
        return self._vocabulary.tokens + [name.encode() for name, id in self.special_tokens.items() if id >= size]

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same tokenizer as a `tiktoken.Encoding`.

        Raises `UserError` if `tiktoken` is not installed, or if its rules differ from tiktoken's, as with a foreign
        `tokenizer.json` that lists merges.
        """
        try:
            import tiktoken
        except ImportError:
            raise UserError("this needs OpenAI's tiktoken: pip install tiktoken") from None
        check(
            self._vocabulary.merges is None and not self._vocabulary.keep_gaps,
            "tiktoken has no rule for the merges of this vocabulary or for text that its pattern does not match",
        )
        return tiktoken.Encoding(
            "jaxchat",
            pat_str=self.pattern,
            mergeable_ranks=self.mergeable_ranks,
            special_tokens=dict(self.special_tokens),
        )

    def to_json(self) -> str:
        return to_json(self._vocabulary)

    def __reduce__(self):
        return Tokenizer.from_vocabulary, (self._vocabulary,)

    # --- text to ids and back -----------------------------------------------------------------------------------

    def _encode(self, texts, prepend, append, num_threads):
        with _user_errors():
            return self._rust.encode(texts, prepend, append, num_threads)

    def encode_to_numpy(
        self, texts: list[str], prepend: int | str | None = None, num_threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        with _user_errors():
            return self._rust.encode_to_numpy(texts, self._id(prepend), num_threads)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._decode(self._rust.decode_text, ids)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self._decode(self._rust.decode, ids)

    def decode_batch(self, ids: np.ndarray, offsets: np.ndarray) -> list[str]:
        return self._decode(self._rust.decode_batch, ids, np.asarray(offsets, np.int64))

    def _decode(self, decode: Callable, ids: Sequence[int] | np.ndarray, *more):
        try:
            with _user_errors():
                return decode(_plain(ids), *more)
        except OverflowError:  # more than 64 bits
            raise UserError(f"a token id is out of range: this tokenizer has ids 0 to {self.vocab_size - 1}") from None


def _unknown_pattern(path: epath.Path) -> str:
    """What to do with a `.tiktoken` file of one's own."""
    near, folder = closest(path.stem, TIKTOKEN_PATTERNS), path.parent / f"{path.stem}-tokenizer"
    convert = f"Tokenizer.from_tiktoken('{path}', sys.argv[1]).save('{folder}')"
    return (
        f"the split pattern of {path} is unknown, since such a file has none{'. ' if near == '.' else f'{near} '}"
        f"Rename it if it is one of {', '.join(TIKTOKEN_PATTERNS)}; otherwise this makes {folder}, to use instead: "
        f"python -c \"import sys; from jaxchat.tokenizer import Tokenizer; {convert}\" 'PATTERN'"
    )


def _plain(ids: Sequence[int] | np.ndarray) -> list[int] | np.ndarray:
    """Ids as an array of int64 or uint32, which Rust takes without a copy.

    If that is impossible, an id is out of range; then the list is returned, and Rust reports which id it is.
    """
    if isinstance(ids, list):
        try:
            return np.asarray(array("I", ids))  # three times as fast as any other way out of a list
        except OverflowError:
            return ids
    ids = np.asarray(ids)
    return ids if ids.dtype == np.uint32 else ids.astype(np.int64, copy=False)


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turns an error from Rust, which is always about the input, into a `UserError`."""
    try:
        yield
    except rust.TokenizerError as error:
        raise UserError(str(error)) from error
