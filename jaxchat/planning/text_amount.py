"""How much text there is: bytes, documents, and about how many tokens a vocabulary makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxchat.data.text.shards import TextBlocks, TextFiles, text_bytes
from jaxchat.errors import UserError
from jaxchat.runs.progress import format_duration
from jaxchat.storage import is_remote
from jaxchat.tokenizer import MIN_VOCAB, SPECIAL_TOKENS, BaseTokenizer, Tokenizer

VOCABULARIES = tuple(512 << i for i in range(8))  # up to 65,536
READ_BYTES = 128 << 20  # of text: so much is read as a whole, of more an even sample of this size
REMOTE_BYTES = 32 << 20  # the same in cloud storage
SAMPLE_BYTES = 32 << 20  # on which vocabularies are tried
ENCODED_BYTES = 4 << 20  # of the sample
SAY_SECONDS = 5.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class TextAmount:
    """The text of one side of a data folder.

    Attributes:
      bytes: of the documents in UTF-8.
      documents: how many there are.
      exact: whether all was read; otherwise both are estimated from a sample.
      bytes_per_token: for sizes of a vocabulary, how many bytes a token stands for on average, without the token that
        begins each document.
      longer: half of the text is in documents of at least so many bytes.
    """

    bytes: int
    documents: int
    exact: bool
    bytes_per_token: Mapping[int, float]
    longer: int

    def tokens(self, vocab_size: int) -> int:
        """About how many tokens the text has, each document's first included."""
        return round(self.bytes / self.bytes_per_token_of(vocab_size)) + self.documents

    def bytes_per_token_of(self, vocab_size: int) -> float:
        """As `bytes_per_token`, between the sizes there growing with the logarithm of the vocabulary."""
        sizes = sorted(self.bytes_per_token)
        return float(np.interp(np.log(vocab_size), np.log(sizes), [self.bytes_per_token[size] for size in sizes]))


def measure_text(
    side: TextFiles, *, vocab_size: int | None = None, tokenizer: BaseTokenizer | None = None, say: Say = print
) -> TextAmount:
    """Counts the text of a side, and trains vocabularies on a sample of it to know how long tokens are.

    Text of up to `READ_BYTES` is counted exactly. One training gives the vocabularies of all sizes: a smaller one is
    the beginning of a larger one.

    Args:
      vocab_size: the only size that is of interest; None for all of `VOCABULARIES` that the text supports.
      tokenizer: the one that is there, which is then the only one.
      say: takes a line for the user, if it takes long.

    Raises:
      UserError: text that cannot be read (see `TextBlocks`).
    """
    blocks, size = TextBlocks(side), max(1, text_bytes(side))
    count, most = len(blocks), REMOTE_BYTES if is_remote(side.files[0]) else READ_BYTES
    indices = _spread(count, min(count, max(2, count * most // size)))
    lengths: list[int] = []
    sample: list[str] = []
    began = said = time.monotonic()
    for done, index in enumerate(indices):
        texts = blocks[index]
        sizes = [len(text.encode()) for text in texts]
        lengths += sizes
        sample += _first(texts, sizes, SAMPLE_BYTES // len(indices))
        if (now := time.monotonic()) - said >= SAY_SECONDS:
            said = now
            left = (now - began) / (done + 1) * (len(indices) - done - 1)
            say(f"data      counting the text: {done + 1:,} of {len(indices):,} blocks, {format_duration(left)} left")
    if not lengths:
        raise UserError(f"{side.files[0].parent} has no text to count")
    return amount_of(lengths, sample, len(indices) / count, vocab_size=vocab_size, tokenizer=tokenizer)


def amount_of(
    lengths: Sequence[int],
    sample: Sequence[str],
    share: float,
    *,
    vocab_size: int | None = None,
    tokenizer: BaseTokenizer | None = None,
) -> TextAmount:
    """The amount of a text of which a share is known.

    Args:
      lengths: bytes of each known document.
      sample: some of these documents.
      share: how much of the text is known; 1 for all of it.
      vocab_size, tokenizer: as in `measure_text`.
    """
    if tokenizer is not None:
        known = {tokenizer.vocab_size: _bytes_per_token(tokenizer, sample)}
    else:
        known = _try_vocabularies(sample, VOCABULARIES if vocab_size is None else (vocab_size,))
    size, documents = round(sum(lengths) / share), round(len(lengths) / share)
    return TextAmount(size, documents, share == 1, known, _weighted_median(lengths))


def _spread(count: int, wanted: int) -> Sequence[int]:
    """`wanted` of `count` blocks, one at random of each of as many equal parts: block sizes may recur with a period."""
    if wanted >= count:
        return range(count)
    at = np.arange(wanted) + np.random.default_rng(0).random(wanted)
    return (at * count / wanted).astype(int).tolist()


def _first(texts: Sequence[str], sizes: Sequence[int], most: int) -> Sequence[str]:
    """The first texts, until they have `most` bytes; at least one of a block that has any."""
    ends = np.cumsum(sizes)
    return texts[: int(np.searchsorted(ends, most)) + 1]


def _weighted_median(lengths: Sequence[int]) -> int:
    ordered = np.sort(np.asarray(lengths, np.int64))
    ends = np.cumsum(ordered)
    return int(ordered[np.searchsorted(ends, ends[-1] / 2)])


def _try_vocabularies(sample: Sequence[str], sizes: Sequence[int]) -> dict[int, float]:
    """The bytes a token stands for, for each of the sizes that the sample supports; of bytes alone if it is none.

    A vocabulary that the text does not support is refused where it is made.
    """
    special = len(SPECIAL_TOKENS)
    for largest in sorted({*sizes, *(size for size in VOCABULARIES if size < max(sizes))}, reverse=True):
        try:
            tokens = Tokenizer.train_from_iterator(sample, largest).tokens()
        except UserError:
            continue
        tried = [size for size in sizes if size <= largest] or [largest]
        return {size: _bytes_per_token(Tokenizer(tokens[: size - special]), sample) for size in tried}
    return {MIN_VOCAB: 1.0}


def _bytes_per_token(tokenizer: BaseTokenizer, sample: Sequence[str]) -> float:
    sizes = [len(text.encode()) for text in sample]
    step = max(1, sum(sizes) // ENCODED_BYTES)
    texts = list(sample[::step])
    ids, _ = tokenizer.encode_to_numpy(texts)
    return sum(sizes[::step]) / max(1, len(ids))
