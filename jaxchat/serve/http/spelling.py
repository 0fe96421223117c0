"""Tokens as strings, and text with special tokens in it as tokens."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from jaxchat.tokenizer import BaseTokenizer

_UTF_8 = codecs.getincrementaldecoder("utf-8")
LOWEST = -9999.0  # how a log-probability of minus infinity is written


class Spelling:
    """How the tokens of a tokenizer are written in answers."""

    def __init__(self, tokenizer: BaseTokenizer):
        self.tokenizer = tokenizer
        self.bytes = tokenizer.tokens()
        self.longest = max(map(len, self.bytes))  # bytes of a token
        self._special = re.compile(f"({'|'.join(map(re.escape, tokenizer.special_tokens))})")
        self._strings: dict[int, str] = {}

    def string(self, token: int) -> str:
        r"""A token's text. Of one that is not UTF-8, such as half a character, its bytes: `bytes:\xe2\x80`."""
        known = self._strings.get(token)
        if known is None:
            spelt = self.bytes[token]
            try:
                known = spelt.decode()
            except UnicodeDecodeError:
                known = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
            self._strings[token] = known
        return known

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """The ids of raw text, in which the names of special tokens stand for these tokens.

        Args:
          bos: whether <|bos|> comes before it, as before every document that the model has seen.
        """
        ids = [self.tokenizer.bos_token_id] if bos else []
        for i, piece in enumerate(self._special.split(text)):
            if i % 2:
                ids.append(self.tokenizer.encode_special(piece))
            elif piece:
                ids.extend(self.tokenizer.encode(piece))
        return ids


class Offsets:
    """Where tokens begin in the text that they spell, in characters.

    A token that begins within a character has the place of that character. What is no UTF-8 is U+FFFD in the text, as
    in `bytes.decode`.

    Args:
      start: the place of the first one; below 0 for tokens whose text is left out.
    """

    def __init__(self, spelling: Spelling, start: int = 0):
        self._spelling, self._at = spelling, start
        self._decoder = _UTF_8("replace")

    def add(self, tokens: Sequence[int]) -> list[int]:
        """The places of the tokens that come next."""
        found = []
        for token in tokens:
            found.append(max(0, self._at))
            self._at += len(self._decoder.decode(self._spelling.bytes[token]))
        return found


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, LOWEST)
