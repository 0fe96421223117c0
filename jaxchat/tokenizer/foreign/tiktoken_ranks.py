"""tiktoken's vocabularies: the ranks of an `Encoding`, or of a `.tiktoken` file."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping

from jaxchat.errors import check
from jaxchat.tokenizer.patterns import cuts
from jaxchat.tokenizer.vocabulary import Vocabulary, with_chat_tokens


def from_ranks(ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str) -> Vocabulary:
    """The vocabulary of tiktoken's ranks. Unused ids become special tokens `<|unused_ID|>`.

    Raises `UserError` if two tokens share an id, or if special tokens or unused ids are among the ranks and the pattern
    does not guarantee that no text encodes to them.
    """
    by_id = {}
    for token, id in [*ranks.items(), *special.items()]:
        check(isinstance(id, int) and id >= 0 and id not in by_id, f"two tokens have the id {id}, or it is not an id")
        by_id[id] = token
    check(bool(ranks), "there are no ranks")
    token_count, size = max(ranks.values()) + 1, max(by_id) + 1
    check(
        size - len(by_id) <= len(by_id),
        f"{len(ranks)} ranks and {len(special)} special tokens do not fill the ids 0 to {size - 1}: "
        f"ranks must be 0 to {len(ranks) - 1} without gaps",
    )
    special = dict(special) | {f"<|unused_{id}|>": id for id in range(size) if id not in by_id}
    tokens: dict[int, bytes] = {id: token for token, id in ranks.items()}
    for name, id in special.items():
        if id < token_count:
            check(
                cuts(name, pattern),
                f"ranks must be 0 to {len(ranks) - 1} without gaps, with special tokens after them; rank {id} is "
                + ("missing" if id not in by_id else f"the special token {name!r}"),
            )
            tokens[id] = name.encode()
    return Vocabulary([tokens[id] for id in range(token_count)], with_chat_tokens(special, token_count), pattern)


def parse_ranks(lines: Iterable[bytes]) -> dict[bytes, int]:
    """Parses a `.tiktoken` file, with `BASE64 RANK` a line. Raises a `ValueError` that names a bad line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} is not a token in base64 and its rank") from None
        if token in ranks:
            raise ValueError(f"line {number} repeats the token of rank {ranks[token]}")
        ranks[token] = rank
    return ranks
