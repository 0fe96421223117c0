"""Which file holds a tokenizer, and what it is: decided by what the file contains, whatever its name."""

from __future__ import annotations

import re

from etils import epath

from jaxchat.errors import UserError, check
from jaxchat.tokenizer.base import FILE_NAME

_RANK = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2}[ \t]+\d+\s*[\r\n]")
_BOM = b"\xef\xbb\xbf"  # a byte order mark
# What other libraries keep in a folder next to, or in place of, a tokenizer.json.
_OF_OTHERS = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt", "tokenizer_config.json")
_RUN = "tokenizer"  # the folder of a run directory


def tokenizer_file(path: epath.PathLike) -> epath.Path:
    """The file of a tokenizer: `path` itself, or what a folder or a run has: a `tokenizer.json` or a `.tiktoken` file.

    Raises:
      UserError: there is none; the message says how to make one of what is there.
    """
    path = epath.Path(path)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"no tokenizer at {path}; train one with the tokenizer stage")
        return path
    names = sorted(child.name for child in path.iterdir())
    if _RUN in names and FILE_NAME not in names and (path / _RUN).is_dir():
        return tokenizer_file(path / _RUN)
    ours = [name for name in names if name == FILE_NAME] or [name for name in names if name.lower() == FILE_NAME]
    ranks = [name for name in names if name.lower().endswith(".tiktoken")]
    for found in (ours, ranks):
        if len(found) == 1:
            file = path / found[0]
            check(not file.is_dir(), f"{file} is a folder, but must be the file of a tokenizer; rename or remove it")
            return file
    if ranks:
        raise UserError(f"{path} has several tokenizers; name one of {', '.join(ranks)}")
    others = [name for name in names if name in _OF_OTHERS]
    if others:
        convert = f"AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')"
        raise UserError(
            f"{path} has {' and '.join(others)}, but no {FILE_NAME}, which says all about a tokenizer; this writes it: "
            f'python -c "from transformers import AutoTokenizer; {convert}"'
        )
    raise UserError(f"no tokenizer at {path}: it has no {FILE_NAME}")


def read_bytes(path: epath.Path) -> bytes:
    """The bytes of a file, without a byte order mark."""
    return path.read_bytes().removeprefix(_BOM)


def read_text(path: epath.Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises `ValueError` if it is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: byte {error.start:,}") from None


def holds_ranks(path: epath.Path) -> bool:
    """Whether a file is a `.tiktoken` file: its name says so, or it begins with a token in base64 and its rank."""
    if path.suffix.lower() == ".tiktoken":
        return True
    with path.open("rb") as file:
        return _RANK.match(file.read(4096).removeprefix(_BOM)) is not None
