"""Compares how well tokenizers compress: how many bytes of text a token stands for, by kind of text.

More bytes per token mean fewer tokens for the same text: faster training and generation, and more text in a context. A
vocabulary compresses best what it was trained on, so each kind of text is measured separately; `samples/` has short
texts of several kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from jaxchat.tokenizer import BaseTokenizer

FIRST_KINDS = ("news", "code", "math")  # the first rows; the other scripts follow in alphabetical order
COLUMNS = 4  # tokenizers side by side in a table of at most 100 characters a line


@dataclass(frozen=True)
class Compression:
    """How tokenizers compress one kind of text.

    Attributes:
      kind: the kind of text.
      bytes: its size.
      tokens: how many tokens each tokenizer needs.
      restored: for each tokenizer, whether decoding gives the text back.
    """

    kind: str
    bytes: int
    tokens: tuple[int, ...]
    restored: tuple[bool, ...]

    def bytes_per_token(self, i: int) -> float:
        return self.bytes / max(1, self.tokens[i])

    def more_tokens(self, i: int) -> float:
        """How many more tokens tokenizer i needs than the first, as a fraction; negative if fewer."""
        return self.tokens[i] / max(1, self.tokens[0]) - 1


def samples() -> dict[str, list[str]]:
    """The documents that come with jaxchat, by kind of text."""
    folder = resources.files("jaxchat.tokenizer").joinpath("samples")
    files = [file for file in folder.iterdir() if file.name.endswith(".txt")]
    texts = {file.name.removesuffix(".txt"): [file.read_text(encoding="utf-8")] for file in files}
    order = [*FIRST_KINDS, *sorted(set(texts) - set(FIRST_KINDS))]
    return {kind: texts[kind] for kind in order}


def measure(tokenizers: Sequence[BaseTokenizer], texts: Mapping[str, list[str]]) -> list[Compression]:
    """Encodes every kind of text with every tokenizer, and decodes it again."""
    return [_measure(tokenizers, kind, documents) for kind, documents in texts.items()]


def _measure(tokenizers: Sequence[BaseTokenizer], kind: str, texts: list[str]) -> Compression:
    tokens, restored = [], []
    for tokenizer in tokenizers:
        ids, offsets = tokenizer.encode_to_numpy(texts)
        tokens.append(len(ids))
        restored.append(tokenizer.decode_batch(ids, offsets) == texts)
    return Compression(kind, sum(len(text.encode()) for text in texts), tuple(tokens), tuple(restored))


def table(names: Sequence[str], vocab_sizes: Sequence[int], rows: Sequence[Compression]) -> str:
    """Formats the comparison for reading.

    Each tokenizer gets a letter. A row has bytes per token, the best marked with `*`, and the difference in tokens to
    the first tokenizer. `!` marks a text that decoding does not give back, which cannot be the best.
    """
    letters = [chr(ord("A") + i) for i in range(len(names))]
    width = max(map(len, names))
    lines = [
        f"{letter}  {name:<{width}}  {size:>9,} tokens"
        for letter, name, size in zip(letters, names, vocab_sizes, strict=True)
    ]
    others = list(range(1, len(names)))
    for start in range(0, max(1, len(others)), COLUMNS - 1):
        lines += ["", *_columns(letters, [0, *others[start : start + COLUMNS - 1]], rows)]
    for i, letter in enumerate(letters):
        lost = [row.kind for row in rows if not row.restored[i]]
        if lost:
            lines += ["", f"! {letter} does not give the text back (it changes or drops some of it): {', '.join(lost)}"]
    return "\n".join(lines)


def _columns(letters: list[str], shown: list[int], rows: Sequence[Compression]) -> list[str]:
    head = f"{'bytes/token':<17}{'bytes':>10}" + "".join(f"{letters[i]:>7} " for i in shown)
    head += "".join(f"{f'{letters[i]} tokens':>10}" for i in shown[1:])
    lines = [head.rstrip()]
    for row in rows:
        line = f"{row.kind:<17}{row.bytes:>10,}"
        best = min(
            (tokens for tokens, restored in zip(row.tokens, row.restored, strict=True) if restored), default=None
        )
        for i in shown:
            mark = "!" if not row.restored[i] else "*" if row.tokens[i] == best and len(row.tokens) > 1 else " "
            line += f"{row.bytes_per_token(i):>7.2f}{mark}"
        lines.append((line + "".join(f"{row.more_tokens(i):>+10.1%}" for i in shown[1:])).rstrip())
    return lines
