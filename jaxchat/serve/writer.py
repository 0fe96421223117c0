"""An answer's tokens as the text that a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jaxchat.infer.text import Characters
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.verbatim import Style

# Where the next token stands; what a special token writes there, and where it leads. Anywhere else it is out of place.
TEXT, CALL, CALLED, OUTPUT = range(4)
MARKS = {
    (TEXT, "<|python_start|>"): ("⟨", CALL),
    (CALL, "<|python_end|>"): ("", CALLED),
    (CALLED, "<|output_start|>"): (" → ", OUTPUT),
    (OUTPUT, "<|output_end|>"): ("⟩ ", TEXT),
}


class Writer:
    """Turns tokens into styled text, the same for every way of cutting them into chunks.

    Text is given as the model wrote it, in whole characters; bytes that are not UTF-8 become U+FFFD, as in
    `bytes.decode`. A tool call is shown as `⟨34 + 58 → 92⟩ `, dimmed; one that does not come to its end has no closing
    mark. A special token that is out of place is shown by its name.
    """

    def __init__(self, tokenizer: BaseTokenizer):
        self._special = {id: name for name, id in tokenizer.special_tokens.items()}
        self._characters = Characters(tokenizer)
        self._state = TEXT

    def write(self, tokens: Iterable[int]) -> Iterator[tuple[str, Style]]:
        """The text that these tokens complete."""
        for token in tokens:
            name = self._special.get(token)
            if name is None:
                yield self._styled(self._characters.add(token))
            else:
                yield from self.close()
                mark, self._state = MARKS.get((self._state, name), (name, self._state))
                yield mark, "dim"

    def close(self) -> Iterator[tuple[str, Style]]:
        """The text still held back at the end of an answer: a character that is not whole."""
        yield self._styled(self._characters.flush())

    def _styled(self, text: str) -> tuple[str, Style]:
        return text, "" if self._state == TEXT else "dim"
