"""A vocabulary: everything that decides which ids a text gets, and what is common to reading one from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from etils import epath

from jaxchat.errors import UserError
from jaxchat.tokenizer.base import SPECIAL_TOKENS


class Unsupported(UserError):
    """The Rust encoder cannot reproduce a vocabulary exactly. The message tells why."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens, special tokens and rules of a byte-level BPE tokenizer.

    Attributes:
      tokens: `tokens[id]` are the bytes of a token.
      special: names and ids of special tokens. Ids directly follow the tokens or are among them; there the token's
        bytes are the name, and no text may encode to it.
      pattern: the split pattern.
      merges: pairs of ids in the order of their rank (Hugging Face's rule). None: any two tokens that together make a
        third are merged, the lowest id first (tiktoken's rule).
      whole_pieces: a piece that is a token becomes it without merges.
      keep_gaps: text that the pattern does not match is a piece; otherwise it is dropped.
    """

    tokens: list[bytes]
    special: dict[str, int]
    pattern: str
    merges: list[tuple[int, int]] | None = None
    whole_pieces: bool = True
    keep_gaps: bool = False


def with_chat_tokens(special: Mapping[str, int], token_count: int) -> dict[str, int]:
    """`special` sorted by id, with the missing ones of `SPECIAL_TOKENS` appended after all ids that are used.

    `token_count` is the number of ordinary tokens.
    """
    special = dict(sorted(special.items(), key=lambda item: item[1]))
    following = max(token_count, max(special.values(), default=0) + 1)
    missing = [name for name in SPECIAL_TOKENS if name not in special]
    return special | {name: following + i for i, name in enumerate(missing)}


@contextlib.contextmanager
def naming_file(path: epath.Path) -> Iterator[None]:
    """Names the file in errors that occur while its vocabulary is read."""
    try:
        yield
    except Unsupported as error:
        raise Unsupported(f"{path} needs the Hugging Face backend: {error}") from error
    except UserError as error:
        raise UserError(f"{path} is not a vocabulary that jaxchat can use: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or not a tokenizer ({type(error).__name__}: {error}); "
            "give a whole tokenizer.json or .tiktoken file"
        ) from error
