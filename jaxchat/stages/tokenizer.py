"""The tokenizer stage: trains a BPE vocabulary on the experiment's text, or copies the user's own tokenizer."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator

from jaxchat.config import TokenizerConfig
from jaxchat.data.text.describe import text_record
from jaxchat.data.text.fingerprint import fingerprint
from jaxchat.data.text.folder import TextSplits
from jaxchat.data.text.shards import TextFiles, iterate_texts, known_form, text_bytes
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import UserError, check
from jaxchat.runs.progress import format_count, format_duration
from jaxchat.stages.workspace import Workspace
from jaxchat.storage import is_remote
from jaxchat.tokenizer import BaseTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

SAY_SECONDS = 5.0


def run(workspace: Workspace) -> None:
    """Leaves `tokenizer/` in the run directory.

    Raises:
      UserError: the vocabulary is larger than the text supports, or smaller than the bytes and special tokens; the
        user's tokenizer is missing, damaged, or not of the size that the experiment asks for.
    """
    began, text = time.time(), workspace.text()
    metrics = on_process_zero(lambda: _make(workspace, text))
    seconds = time.time() - began
    workspace.say(
        f"tokenizer done in {seconds:.1f} s: {metrics['bytes_per_token']:.2f} bytes per token on validation text"
    )
    facts = {"text": text_record(text), "fingerprint": fingerprint(text)}
    workspace.finish("tokenizer", parent=None, seconds=seconds, started=began, metrics=metrics, **facts)


def _make(workspace: Workspace, text: TextSplits) -> dict:
    """Saves the tokenizer; returns the `metrics` of its record."""
    config, seen = workspace.experiment.tokenizer, 0
    if config.path is not None:
        tokenizer = load_users_tokenizer(config)
    else:
        workspace.say(f"tokenizer training {config.vocab_size:,} tokens on {text.folder}")
        tokenizer, seen = train(config, text.train, workspace.say)
    tokenizer.save(workspace.directory.tokenizer)
    held_out = list(Limited(iterate_texts(text.val), 1_000_000))
    ids, _ = tokenizer.encode_to_numpy(held_out)
    bytes_per_token = sum(len(text.encode()) for text in held_out) / max(1, len(ids))
    return {"vocab_size": tokenizer.vocab_size, "characters": seen, "bytes_per_token": bytes_per_token}


def load_users_tokenizer(config: TokenizerConfig) -> BaseTokenizer:
    """The user's own tokenizer at `config.path`.

    Raises:
      UserError: it is missing or damaged, or its size is not `config.vocab_size`.
    """
    assert config.path is not None, "the caller asks for the user's tokenizer"
    tokenizer = load_tokenizer(config.path)
    check(
        tokenizer.vocab_size == config.vocab_size,
        f"the tokenizer in {config.path} has {tokenizer.vocab_size} tokens, not {config.vocab_size}; "
        f"add --tokenizer.vocab-size={tokenizer.vocab_size}",
    )
    return tokenizer


def train(config: TokenizerConfig, side: TextFiles, say: Callable[[str], None]) -> tuple[BaseTokenizer, int]:
    """A tokenizer trained on the text, and the number of characters that it has seen.

    Local parquet files of which no document is left out are read by the trainer itself; the result is the same.
    """
    progress = Progress(say, min(config.max_chars, text_bytes(side)), config.vocab_size)
    whole = side.complete and side.hold_out is None and side.on_bad == "refuse" and not is_remote(side.files[0])
    if config.backend == "rust" and whole and all(known_form(path).format == "parquet" for path in side.files):
        try:
            tokenizer = Tokenizer.train_from_files(
                side.files, config.vocab_size, max_chars=config.max_chars, progress=progress
            )
        except UserError:
            collections.deque(
                Limited(iterate_texts(side), config.max_chars), maxlen=0
            )  # names the place, if text is damaged
            raise
        return tokenizer, progress.characters
    texts = Limited(iterate_texts(side), config.max_chars)
    backend = Tokenizer if config.backend == "rust" else HuggingFaceTokenizer
    return backend.train_from_iterator(texts, config.vocab_size, progress=progress), texts.chars


class Progress:
    """Tells the user every few seconds how far the training is, and how long it will take at this rate."""

    def __init__(self, say: Callable[[str], None], characters: int, tokens: int):
        """`characters` is about how many there are to read; `tokens` is the size of the vocabulary."""
        self.characters = 0
        self._say, self._totals = say, {"count": characters, "merge": tokens}
        self._phase, self._began, self._first, self._said = "", 0.0, 0, time.monotonic()

    def __call__(self, phase: str, done: int) -> None:
        if phase in ("count", "read"):
            self.characters = done
        now, total = time.monotonic(), self._totals.get(phase)
        if phase != self._phase:
            self._phase, self._began, self._first = phase, now, done
        if total is None or now - self._said < SAY_SECONDS or done <= self._first:
            return
        self._said = now
        left = (now - self._began) / (done - self._first) * max(0, total - done)
        what = f"{format_count(done)} of about {format_count(total)} characters read"
        if phase == "merge":
            what = f"{done:,} of {total:,} tokens learned"
        self._say(f"tokenizer {what}, {format_duration(left)} left")


class Limited:
    """Texts until they have `max_chars` characters; `chars` counts them."""

    def __init__(self, texts: Iterable[str], max_chars: int):
        self.texts, self.max_chars, self.chars = texts, max_chars, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            yield text
            self.chars += len(text)
            if self.chars >= self.max_chars:
                return
