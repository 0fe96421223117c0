"""The tokenizer stage: trains a BPE vocabulary on the experiment's text, or takes one that the user brings."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from jaxchat.config import check
from jaxchat.data.shards import find_text, iterate_texts
from jaxchat.stages.run import Run
from jaxchat.tokenizer import Tokenizer

SAY_SECONDS = 5.0


def run(run: Run) -> None:
    """Leaves `tokenizer/` in the run directory.

    Raises:
      UserError: the vocabulary is larger than the text supports, or smaller than bytes and special tokens.
    """
    config, began = run.experiment.tokenizer, time.time()
    directory = run.directory / "tokenizer"
    seen = 0
    if config.path is not None:
        tokenizer = Tokenizer.from_directory(config.path)
        check(
            tokenizer.vocab_size == config.vocab_size,
            f"the tokenizer in {config.path} has {tokenizer.vocab_size} tokens, not {config.vocab_size}; "
            f"add --tokenizer.vocab-size={tokenizer.vocab_size}",
        )
    else:
        text = find_text(run.text_dir, run.experiment.data.val_shard)
        run.say(f"tokenizer training {config.vocab_size:,} tokens on {run.text_dir}")
        counted = Limited(iterate_texts(text.train), config.max_chars, run.say)
        tokenizer = Tokenizer.train_from_iterator(counted, config.vocab_size)
        seen = counted.chars
    tokenizer.save(directory)
    held_out = list(Limited(iterate_texts(find_text(run.text_dir, run.experiment.data.val_shard).val), 1_000_000))
    ids, _ = tokenizer.encode_to_numpy(held_out)
    bytes_per_token = sum(len(text.encode()) for text in held_out) / max(1, len(ids))
    seconds = time.time() - began
    run.say(f"tokenizer done in {seconds:.1f} s: {bytes_per_token:.2f} bytes a token on validation text")
    run.finish(
        "tokenizer",
        parent=None,
        seconds=seconds,
        started=began,
        metrics={"vocab_size": tokenizer.vocab_size, "characters": seen, "bytes_per_token": bytes_per_token},
    )


class Limited:
    """Texts until `max_chars` characters are through; says now and then how far it is."""

    def __init__(self, texts: Iterable[str], max_chars: int, say=None):
        self.texts, self.max_chars, self.say, self.chars = texts, max_chars, say, 0

    def __iter__(self) -> Iterator[str]:
        said = time.monotonic()
        for text in self.texts:
            yield text
            self.chars += len(text)
            if self.chars >= self.max_chars:
                return
            if self.say and time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                self.say(f"tokenizer {self.chars / 1e6:,.0f} M characters read, at most {self.max_chars / 1e6:,.0f} M")
