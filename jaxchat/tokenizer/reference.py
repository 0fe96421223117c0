"""Byte-pair encoding in plain Python, written for reading; `rust_tokenizer/` does the same, fast.

A language model reads numbers, so text must become a list of numbers, and that list should be short. Bytes would work,
but the lists would be long; a list of all words would never be complete. Byte-pair encoding is between the two. Its
tokens are all 256 single bytes, so that every text can be encoded, and frequent sequences of bytes.

Training finds these: it joins the most frequent pair of neighbours into a new token, again and again, until there are
enough. Encoding repeats this: of all neighbours that make a token, it joins those whose token was learned first. So a
token's place in the list is two things at once: the number that the model sees, and the priority of its merge.

Here four tokens are learned from two words, which can be followed by hand:

>>> tokens = train(["banana bandana"], 260)
>>> tokens[256:]
[b'an', b'ban', b'ana', b' ban']

`an` occurs four times and comes first. Now there are `b|an|an|a` and ` |b|an|d|an|a`, in which `b|an` and `an|a` both
occur twice. The tie goes to the pair with the lowest ids, `b` (98) and `an` (256): `ban` is second and `ana` third.
That leaves `ban|ana` and ` |ban|d|ana`, where every pair occurs once; the lowest is the space (32) with `ban` (257).

>>> encode("bananas, a ban", tokens)
[257, 258, 115, 44, 32, 97, 259]
>>> decode([257, 258, 115], tokens)
'bananas'

To watch this with your own text: python -m jaxchat.tokenizer.reference "banana bandana"
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from jaxchat.tokenizer.patterns import MAX_TOKEN_BYTES, SPLIT_PATTERN


def split(text: str, pattern: str = SPLIT_PATTERN) -> list[bytes]:
    """Cuts a text into pieces, in UTF-8. Merges happen only within a piece.

    Otherwise frequent neighbours such as `e` and the space after it, or a word and its full stop, would become tokens,
    and the same word would be encoded in many ways. The default pattern cuts between words, numbers, punctuation and
    line breaks, and keeps a space with the word after it. Text that the pattern does not match is dropped.
    """
    import regex  # unlike `re`, it knows classes of letters (\p{L}) and possessive repeats (++)

    # Half of a surrogate pair can be in a `str` but not in UTF-8; it becomes U+FFFD, the replacement character.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return [found.group().encode() for found in regex.finditer(pattern, text) if found.group()]


def train(texts: Iterable[str], size: int, pattern: str = SPLIT_PATTERN, longest: int = MAX_TOKEN_BYTES) -> list[bytes]:
    """Learns `size` tokens, including bytes, or fewer if nothing is left to join. A token's index is its id.

    Tokens have at most `longest` bytes. Otherwise a line of a million dashes, which is one piece, would become tokens
    of thousands of dashes.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    pieces = Counter(piece for text in texts for piece in split(text, pattern))
    for left, right, _ in merges(pieces, size - len(tokens), longest):
        tokens.append(tokens[left] + tokens[right])
    return tokens


def merges(pieces: Counter[bytes], number: int, longest: int = MAX_TOKEN_BYTES) -> Iterator[tuple[int, int, int]]:
    """The first `number` merges: the ids of the left and right token, and how often they are neighbours.

    The first merge makes id 256, the second 257, and so on. Pairs of more than `longest` bytes are passed over.

    Language repeats itself: 100 MB of English have 20 million pieces, but only 240,000 different ones. So equal pieces
    are counted once and then treated as one with a weight. To be fast, one also has to count again only what a merge
    has changed (see rust_tokenizer/src/train.rs).
    """
    words = [(list(piece), count) for piece, count in pieces.items()]
    sizes = [1] * 256
    for new in range(256, 256 + number):
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:], strict=False):
                if sizes[pair[0]] + sizes[pair[1]] <= longest:
                    pairs[pair] += count
        if not pairs:
            return
        # Any rule for ties would do, but without one the vocabulary would depend on the order of the texts.
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        yield left, right, pairs[left, right]
        sizes.append(sizes[left] + sizes[right])
        for ids, _ in words:
            at = 0
            while at + 1 < len(ids):  # from the left: `aaa` becomes `aa|a`
                if ids[at] == left and ids[at + 1] == right:
                    ids[at : at + 2] = [new]
                at += 1


def encode(text: str, tokens: Sequence[bytes], pattern: str = SPLIT_PATTERN) -> list[int]:
    """The ids of a text. `tokens` must include every single byte. Special tokens are not handled here."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [ranks[part] for piece in split(text, pattern) for part in encode_piece(piece, ranks)]


def encode_piece(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Cuts a piece into tokens by tiktoken's rule.

    Any two neighbours whose bytes together are a token may be joined, even if training made that token from two others.
    The lowest rank comes first, since training joined in this order too; among equals the leftmost. This ends when no
    two neighbours make a token.
    """
    if piece in ranks:  # merging nearly always leads there too, except in vocabularies not learned by merging
        return [piece]
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while True:
        joined = [(ranks[a + b], at) for at, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not joined:
            return parts
        _, at = min(joined)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def decode(ids: Iterable[int], tokens: Sequence[bytes]) -> str:
    """The text of ids. A token may end within a character; bytes that are not UTF-8 become U+FFFD."""
    return b"".join(tokens[token] for token in ids).decode("utf-8", errors="replace")


def main(text: str) -> None:
    """Trains on a text until nothing can be merged, and prints each merge with the pieces after it."""
    pieces = split(text)
    tokens = [bytes([byte]) for byte in range(256)]

    def spelled() -> str:
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return " ".join("|".join(map(show, encode_piece(piece, ranks))) for piece in pieces)

    print(f"{len(text.encode())} bytes in {len(pieces)} pieces: {' '.join(map(show, pieces))}")
    for left, right, count in merges(Counter(pieces), 1000):
        tokens.append(tokens[left] + tokens[right])
        print(f"{len(tokens) - 1}  {show(tokens[left])} + {show(tokens[right])} ({count}x):  {spelled()}")


def show(token: bytes) -> str:
    """Bytes as text on one line, with `_` for a space."""
    text = token.decode("utf-8", errors="backslashreplace").replace(" ", "_")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "banana bandana")
