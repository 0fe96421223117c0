"""A tokenizer that encodes with Hugging Face's `tokenizers`, for files that only that library can reproduce."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from etils import epath

from jaxchat.config import NUM_BYTES
from jaxchat.errors import UserError, check
from jaxchat.tokenizer.base import SPECIAL_TOKENS, BaseTokenizer, Progress, check_learned, check_size, out_of_range
from jaxchat.tokenizer.files import read_text, tokenizer_file
from jaxchat.tokenizer.foreign.tokenizer_json import bytes_of, parse, to_json, with_checksum
from jaxchat.tokenizer.patterns import MAX_TOKEN_BYTES, SPLIT_PATTERN
from jaxchat.tokenizer.vocabulary import Vocabulary, naming_file

if TYPE_CHECKING:
    import tokenizers


class HuggingFaceTokenizer(BaseTokenizer):
    """A `tokenizers.Tokenizer`, with the missing ones of `SPECIAL_TOKENS` added after its ids.

    Its post-processor, truncation and padding are not used: the caller decides what surrounds a text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Takes ownership of the tokenizer and changes it. Raises `UserError` if ids cannot be added to it."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that spells a special token is plain text
        before = set(tokenizer.get_vocab().values())
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        new = [id for name, id in added.items() if name in SPECIAL_TOKENS]
        self._size = max([*before, *added.values()]) + 1
        check(
            len(set(added.values())) == len(added) and len(before | set(new)) == tokenizer.get_vocab_size(),
            "its ids have gaps, so special tokens cannot be added",
        )
        self.special_tokens = dict(sorted(added.items(), key=lambda item: item[1]))
        self._tokenizer = tokenizer
        data = json.loads(tokenizer.to_str())
        model = data["model"]
        self._byte_level = (data["decoder"] or {}).get("type") == "ByteLevel"
        self._byte_fallback = model.get("byte_fallback", False)
        # The token for unknown text is allowed in plain text.
        unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
        self._forbidden = {id for name, id in self.special_tokens.items() if name != unknown}

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, *, pattern: str = SPLIT_PATTERN, progress: Progress | None = None
    ) -> Self:
        """Learns byte-level BPE with `tokenizers`; arguments and errors are those of `Tokenizer.train_from_iterator`.

        It breaks ties between pairs differently, so the vocabulary differs a little from that of `Tokenizer`.
        """
        check_size(vocab_size)
        library = _library()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            max_token_length=MAX_TOKEN_BYTES + 1,  # which tokens do not reach
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer = _untrained(pattern)
        tokenizer.train_from_iterator(_counted(texts, progress), trainer)
        check_learned(tokenizer.get_vocab_size(), vocab_size)
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: epath.PathLike) -> Self:
        path = tokenizer_file(path)
        _library()
        with naming_file(path):
            return cls.from_text(read_text(path))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads the text of a `tokenizer.json`. Raises `ValueError` if it is damaged."""
        parse(text)
        return cls(_from_str(text))

    @property
    def vocab_size(self) -> int:
        return self._size

    def to_json(self) -> str:
        return with_checksum(json.loads(self._tokenizer.to_str()))

    def __reduce__(self):
        return HuggingFaceTokenizer.from_text, (self.to_json(),)

    # --- text to ids --------------------------------------------------------------------------------------------

    def encode_to_numpy(
        self, texts: list[str], prepend: int | str | None = None, num_threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        lists = self._encode(texts, self._id(prepend), None, num_threads)
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return np.fromiter((id for ids in lists for id in ids), np.uint32, int(offsets[-1])), offsets

    def _encode(self, texts, prepend, append, num_threads):
        """Uses one thread if `num_threads` is 1, and otherwise as many as the library chooses."""
        before, after = [[] if token is None else [token] for token in (prepend, append)]
        texts = [_repaired(text) for text in texts]
        if num_threads == 1 or len(texts) == 1:
            lists = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        else:
            lists = [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        plain = (self._plain(text, ids) for text, ids in zip(texts, lists, strict=True))
        return [[*before, *ids, *after] for ids in plain]

    def _plain(self, text: str, ids: list[int]) -> list[int]:
        """`ids` of `text`; encodes it again in parts if the model has taken text for a special token."""
        if self._forbidden.isdisjoint(ids):
            return ids
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        cut = sorted({start + 1 for id, (start, end) in spans if id in self._forbidden and end - start > 1})
        parts = [text[start:end] for start, end in zip([0, *cut], [*cut, len(text)], strict=True)]
        return [id for part in self._encode(parts, None, None, 1) for id in part] if cut else ids

    # --- ids to text --------------------------------------------------------------------------------------------

    @cached_property
    def _tokens(self) -> list[bytes]:
        names = [self._tokenizer.id_to_token(id) for id in range(self._size)]
        added = {id: token.content.encode() for id, token in self._tokenizer.get_added_tokens_decoder().items()}
        if self._byte_level:
            own = (b"" if name is None else bytes_of(name) for name in names)
            return [
                added.get(id, str(name).encode() if token is None else token)
                for id, (name, token) in enumerate(zip(names, own, strict=True))
            ]
        # A token decoded alone may lose its leading space, so each is decoded after another token.
        anchor = next((id for id in self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]), 0)
        alone = self._decode([anchor])
        followed = self._tokenizer.decode_batch([[anchor, id] for id in range(self._size)], skip_special_tokens=False)
        tokens = []
        for id, (name, text) in enumerate(zip(names, followed, strict=True)):
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name or "") if self._byte_fallback else None
            token = bytes.fromhex(byte[1]) if byte else text.removeprefix(alone).encode()
            tokens.append(added.get(id, token))
        return tokens

    def tokens(self) -> list[bytes]:
        return list(self._tokens)

    def id_to_bytes(self, token: int) -> bytes:
        return self._tokens[self._checked([token])[0]]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._decode(self._checked(ids))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = self._checked(ids)
        return b"".join(map(self._tokens.__getitem__, ids)) if self._byte_level else self._decode(ids).encode()

    def decode_batch(self, ids: np.ndarray, offsets: np.ndarray) -> list[str]:
        checked, ends = self._checked(ids), np.asarray(offsets).tolist()
        check(
            ends == sorted(ends) and (not ends or 0 <= ends[0] and ends[-1] <= len(checked)),
            f"offsets must ascend and end at {len(checked)}, the number of ids",
        )
        return [self._decode(checked[start:end]) for start, end in zip(ends, ends[1:], strict=False)]

    def _decode(self, ids: list[int]) -> str:
        if self._byte_level:
            return b"".join(map(self._tokens.__getitem__, ids)).decode("utf-8", errors="replace")
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _checked(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        checked: list[int] = np.asarray(ids, np.int64).tolist()
        for id in checked:
            if not 0 <= id < self._size:
                raise UserError(out_of_range(id, self._size))
        return checked


def _library():
    try:
        import tokenizers
    except ImportError:
        raise UserError("this needs Hugging Face's tokenizers: pip install tokenizers") from None
    return tokenizers


def _from_str(text: str) -> tokenizers.Tokenizer:
    try:
        return _library().Tokenizer.from_str(text)
    except UserError:
        raise
    except BaseException as error:  # the library raises nothing more specific, and a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(str(error)) from None


def _untrained(pattern: str) -> tokenizers.Tokenizer:
    vocabulary = Vocabulary([bytes([byte]) for byte in range(NUM_BYTES)], {}, pattern, [], whole_pieces=False)
    try:
        return _from_str(to_json(vocabulary))
    except ValueError as error:
        raise UserError(f"the split pattern does not compile: {' '.join(str(error).split())}") from None


def _counted(texts: Iterable[str], progress: Progress | None) -> Iterator[str]:
    characters = 0
    for text in texts:
        characters += len(text)
        if progress is not None:
            progress("count", characters)
        yield _repaired(text)


def _repaired(text: str) -> str:
    """The text with lone surrogates, which the library refuses, replaced, and surrogate pairs joined."""
    if not isinstance(text, str):
        raise TypeError(f"a text is a str, not {type(text).__name__}")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
