"""An answer's tokens as text while it grows: whole characters, and stop strings across the borders of tokens."""

from __future__ import annotations

import codecs
import functools

from jaxchat.errors import check
from jaxchat.tokenizer import BaseTokenizer

_UTF_8 = codecs.getincrementaldecoder("utf-8")


class Characters:
    """The text of tokens in whole characters, the same however the bytes are split over tokens.

    What is no UTF-8 becomes U+FFFD as in `bytes.decode`, special tokens their names: with a byte-level tokenizer, as
    jaxchat's own are, everything that `add` and `flush` return makes up `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: BaseTokenizer):
        self._tokens = _spelled(tokenizer)
        self._decoder = _UTF_8("replace")
        self._within = False  # a character

    def add(self, token: int) -> str:
        """The characters that a token completes; it takes the time of its own bytes, however long the text is."""
        spelled = self._tokens[token]
        if isinstance(spelled, str) and not self._within:
            return spelled
        text = self._decoder.decode(spelled.encode() if isinstance(spelled, str) else spelled)
        self._within = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """U+FFFD for a character that is not whole, else nothing; what is added next begins a new one."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._within = False
        return text


@functools.lru_cache(maxsize=4)  # an answer has a tokenizer of its own only in tests
def _spelled(tokenizer: BaseTokenizer) -> list[str | bytes]:
    """Each token's text, or its bytes where they are no text by themselves."""

    def spelled(token: bytes) -> str | bytes:
        try:
            return token.decode()
        except UnicodeDecodeError:
            return token

    return [spelled(token) for token in tokenizer.tokens()]


class TextStream:
    """The text of an answer, as far as it is decided, up to a stop string.

    Text that may be the beginning of a stop string is held back until that is decided. The stop string that is complete
    first ends the text, of several that are complete at one character the longest: so it is the same however the
    tokens split the text. The text contains neither the stop string nor what follows it.

    Attributes:
      stopped_by: the stop string that has ended the text, or None.

    Raises:
      UserError: a stop string is empty.
    """

    def __init__(self, tokenizer: BaseTokenizer, stop: tuple[str, ...] = ()):
        check(all(stop), "a stop string is empty; leave it out")
        self.stopped_by: str | None = None
        self._characters = Characters(tokenizer)
        self._stops = [_Match(string) for string in stop]
        self._held = ""

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that this token decides, and `stopped_by`. After a stop string there is no more text."""
        return self._decided(self._characters.add(token)), self.stopped_by

    def flush(self) -> str:
        """The text held back, when no more tokens come. It can end with a stop string too, see `stopped_by`."""
        text = self._decided(self._characters.flush()) + self._held
        self._held = ""
        return text

    def _decided(self, text: str) -> str:
        if not self._stops:
            return text
        if self.stopped_by is not None:
            return ""
        start, text = len(self._held), self._held + text
        for end, character in enumerate(text[start:], start + 1):
            complete = [match.string for match in self._stops if match.advance(character)]
            if complete:
                self.stopped_by = max(complete, key=len)
                self._held = ""
                return text[: end - len(self.stopped_by)]
        decided = len(text) - max(match.length for match in self._stops)
        self._held = text[decided:]
        return text[:decided]


class _Match:
    """Finds a string in text that comes character by character, in time linear in the text (Knuth, Morris, Pratt).

    Attributes:
      length: of the longest beginning of `string` that the text ends with.
    """

    def __init__(self, string: str):
        self.string = string
        self.length = 0
        self._shorter = [0]  # per length - 1: of the longest beginning, not all, that such a beginning ends with
        for character in string[1:]:
            self._shorter.append(self._longer(self._shorter[-1], character))

    def advance(self, character: str) -> bool:
        """Whether the text ends with the string after this character. There must be no more after it has."""
        self.length = self._longer(self.length, character)
        return self.length == len(self.string)

    def _longer(self, length: int, character: str) -> int:
        while length and self.string[length] != character:
            length = self._shorter[length - 1]
        return length + (self.string[length] == character)
