"""How well a tokenizer compresses, compared with others: what `jaxchat tokenizer eval` prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from jaxchat.data.text.folder import TextSplits, find_text, why_not
from jaxchat.data.text.forms import form_of
from jaxchat.data.text.shards import TextFiles, iterate_texts
from jaxchat.errors import UserError, check
from jaxchat.storage import to_path
from jaxchat.tokenizer import BaseTokenizer, Tokenizer, load_tokenizer
from jaxchat.tokenizer.compare import Compression, measure, samples, table
from jaxchat.tokenizer.files import holds_ranks, tokenizer_file
from jaxchat.tokenizer.patterns import TIKTOKEN_PATTERNS

TEXT_BYTES = 2_000_000  # taken from the training and the validation text each


def evaluate(path: str, against: Sequence[str], text: str | None, *, pattern: str | None, as_json: bool) -> None:
    """Prints how well tokenizers compress the samples that come with jaxchat, and the user's text.

    Args:
      path, against: run directories, or folders or files with a tokenizer.
      text: the user's text, a folder or file; None for the text of the run in `path`, if it is a run.
      pattern: the split pattern of `.tiktoken` files that are not named after a known encoding.

    Raises:
      UserError: a tokenizer or text that is missing or damaged.
    """
    paths = [path, *against]
    tokenizers = [_load(one, pattern) for one in paths]
    texts = samples() | (_run_texts(path) if text is None else _user_texts(Path(text)))
    rows = measure(tokenizers, texts)
    sizes = [tokenizer.vocab_size for tokenizer in tokenizers]
    print(_to_json(paths, sizes, rows) if as_json else table(paths, sizes, rows))


def _load(name: str, pattern: str | None) -> BaseTokenizer:
    """The tokenizer of a run directory, or in a folder or file."""
    path = tokenizer_file(to_path(name))
    if path.stem.lower() in TIKTOKEN_PATTERNS or not holds_ranks(path):
        return load_tokenizer(path)
    known = ", ".join(TIKTOKEN_PATTERNS)
    check(pattern is not None, f"{path} has no split pattern; give --pattern REGEX, or rename it to one of {known}")
    return Tokenizer.from_tiktoken(path, pattern)


def _user_texts(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return _first_texts(find_text(path))
    if form_of(path) is None:
        raise UserError(f"{path} is not text that jaxchat reads; give a .parquet, .jsonl or .txt file, or a folder")
    why = why_not(path)
    check(why is None, f"{path} {why}")
    texts = _first(iterate_texts(TextFiles((path,))))
    check(bool(texts), f"{path} contains no text")
    return {"text": texts}


def _run_texts(path: str) -> dict[str, list[str]]:
    """The text that a run was trained on, empty for a tokenizer that is not in a run.

    If the text is no longer there, a line on stderr says so: the tokenizer can still be measured on the samples.
    """
    if not (epath.Path(path) / "config.json").exists():
        return {}
    from jaxchat.analysis.run_text import text_of
    from jaxchat.runs.directory import RunDirectory

    directory = RunDirectory(path)
    try:
        return _first_texts(text_of(directory, directory.read_config().data, on_bad="refuse", say=print))
    except UserError as error:
        print(f"the text of the run is left out ({error}); --text gives another", file=sys.stderr)
        return {}


def _first_texts(split: TextSplits) -> dict[str, list[str]]:
    sides = {"training text": split.train, "validation text": split.val}
    return {kind: _first(iterate_texts(side)) for kind, side in sides.items()}


def _first(texts: Iterable[str]) -> list[str]:
    """The first documents, until they have `TEXT_BYTES` bytes."""
    taken, size = [], 0
    for text in texts:
        taken.append(text)
        size += len(text.encode())
        if size >= TEXT_BYTES:
            break
    return taken


def _to_json(paths: list[str], sizes: list[int], rows: list[Compression]) -> str:
    numbers = range(len(paths))
    data = {
        "tokenizers": [{"path": path, "vocab_size": size} for path, size in zip(paths, sizes, strict=True)],
        "texts": [
            {
                "text": row.kind,
                "bytes": row.bytes,
                "tokens": row.tokens,
                "bytes_per_token": [row.bytes_per_token(i) for i in numbers],
                "more_tokens_than_first": [row.more_tokens(i) for i in numbers],
                "gives_text_back": row.restored,
            }
            for row in rows
        ],
    }
    return json.dumps(data, indent=2)
