"""Bits per byte of any text, by document and by source: comparable between models, whatever their vocabularies.

A document is predicted from <|bos|>, token after token. One that is longer than the context is read in windows of
`sequence_len` tokens, each token being predicted once; the last window reaches back as far as the context allows. These
are the rolling windows of lm-evaluation-harness, whose `bits_per_byte` of a document is the same number.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Float, Int

from jaxchat.devices.mesh import data_shards, put_whole
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, hidden_states
from jaxchat.ops.compute import FP32, Compute
from jaxchat.stopping import raise_if_asked
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.loss import LossConfig, token_nll

BEGINNING = 80  # characters of a document that are kept, by which one recognises it
_DOCUMENTS = 256  # encoded at once
_TOKENS_ON_CPU, _TOKENS = 1 << 13, 1 << 16  # of a batch, on one device
_SHAPES = 8  # lengths of rows, at most, and so compiled programs
_SIGMAS = 1.959964  # of a normal distribution, between which 95 % lie

Window = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class DocumentBpb:
    """How well a document is predicted.

    Attributes:
      source: where it is from.
      index: its place among the documents of the source, from 0.
      beginning: its first characters.
      nats: -log p of the whole document.
      bytes: its length in UTF-8.
      tokens: its length in the model's tokens.
    """

    source: str
    index: int
    beginning: str
    nats: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class Bpb:
    """How well several documents together are predicted: summed nats over summed bytes, not a mean of means.

    Attributes:
      low, high: the 95 % interval of `bits_per_byte` for documents of this kind, which are taken to be independent;
        None for a single document.
    """

    bits_per_byte: float
    low: float | None
    high: float | None
    documents: int
    bytes: int
    tokens: int

    @classmethod
    def of(cls, documents: Sequence[DocumentBpb]) -> Bpb:
        """The sums of documents. The interval is that of a ratio of sums (Cochran, Sampling Techniques, 1977, 2.11)."""
        nats = np.array([document.nats for document in documents])
        sizes = np.array([document.bytes for document in documents])
        count, size = len(documents), int(sizes.sum())
        ratio = float(nats.sum() / size) if size else math.nan
        low = high = None
        if count > 1:
            residuals = nats - ratio * sizes
            error = _SIGMAS * math.sqrt(count / (count - 1) * float(residuals @ residuals)) / size
            low, high = (ratio - error) / math.log(2), (ratio + error) / math.log(2)
        tokens = sum(document.tokens for document in documents)
        return cls(ratio / math.log(2), low, high, count, size, tokens)


@dataclass(frozen=True)
class TextBpb:
    """How well texts are predicted: all together, by source, and each document, in the order in which they came."""

    documents: tuple[DocumentBpb, ...]

    @functools.cached_property
    def total(self) -> Bpb:
        return Bpb.of(self.documents)

    @functools.cached_property
    def sources(self) -> dict[str, Bpb]:
        """By source, in the order in which they came."""
        found: dict[str, list[DocumentBpb]] = {}
        for document in self.documents:
            found.setdefault(document.source, []).append(document)
        return {source: Bpb.of(documents) for source, documents in found.items()}


def text_bpb(
    config: GPTConfig,
    params: Params,
    tokenizer: BaseTokenizer,
    documents: Iterable[tuple[str, str]],
    *,
    compute: Compute = FP32,
    progress: Callable[[float], None] | None = None,
) -> TextBpb:
    """Bits per byte of `documents`, pairs of a source and a text; those without text are left out.

    Args:
      compute: with a mesh, its devices share the rows, and every process passes all documents.
      progress: told after each batch how many bytes of text have been predicted so far, about.
    """
    found: list[_Document] = []
    batches = _batches(config, tokenizer, documents, found, compute)
    done = 0
    before: tuple[Float[Array, " B"], list[int], float] | None = None
    for batch in itertools.chain(batches, [None]):
        raise_if_asked()
        now = None
        if batch is not None:
            put = functools.partial(put_whole, compute.mesh) if compute.mesh is not None else jax.device_put
            inputs, targets = put(batch.inputs), put(batch.targets)
            now = _row_nats(config, compute, params, inputs, targets), batch.owners, batch.size
        if before is not None:  # read when the next batch is on its way
            rows, owners, size = before
            for owner, nats in zip(owners, np.asarray(process_allgather(rows, tiled=True)), strict=False):
                found[owner].nats += float(nats)
            done += size
            if progress is not None:
                progress(done)
        before = now
    return TextBpb(tuple(one.result() for one in found))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_nats(
    config: GPTConfig, compute: Compute, params: Params, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """The nats of each row's targets that are not negative."""
    hidden = hidden_states(config, params, inputs, compute)
    nats = token_nll(hidden, params["head"]["kernel"], targets, LossConfig.of(config, compute.mesh))
    return jnp.sum(nats, axis=1)


# --- from documents to batches ----------------------------------------------------------------------------------------


@dataclass
class _Document:
    source: str
    index: int
    beginning: str
    bytes: int
    tokens: int
    nats: float = 0.0

    def result(self) -> DocumentBpb:
        return DocumentBpb(self.source, self.index, self.beginning, self.nats, self.bytes, self.tokens)


@dataclass
class _Batch:
    """Rows of one length that are computed together: `owners` has the document of each row that is filled so far."""

    inputs: np.ndarray
    targets: np.ndarray
    owners: list[int] = field(default_factory=list)
    size: float = 0.0  # bytes, about: a document's are shared out among its tokens

    def add(self, window: Window, owner: int, size: float) -> None:
        row, (inputs, targets) = len(self.owners), window
        self.inputs[row, : len(inputs)] = inputs
        self.targets[row, len(inputs) - len(targets) : len(inputs)] = targets
        self.owners.append(owner)
        self.size += size


def _batches(
    config: GPTConfig,
    tokenizer: BaseTokenizer,
    documents: Iterable[tuple[str, str]],
    found: list[_Document],
    compute: Compute,
) -> Iterator[_Batch]:
    """The windows of the documents, those of about the same length together; adds each document to `found`."""
    shards = 1 if compute.mesh is None else data_shards(compute.mesh)
    at_once = _TOKENS_ON_CPU if jax.default_backend() == "cpu" else _TOKENS
    step = max(16, -(-config.sequence_len // _SHAPES))
    begun: dict[int, _Batch] = {}
    for owner, ids in enumerate(_encoded(tokenizer, documents, found)):
        document = found[owner]
        for window in rolling_windows(ids, config.sequence_len):
            length = min(-(-len(window[0]) // step) * step, config.sequence_len)
            if length not in begun:
                shape = max(1, at_once // length) * shards, length
                begun[length] = _Batch(np.zeros(shape, np.int32), np.full(shape, -1, np.int32))
            batch = begun[length]
            batch.add(window, owner, document.bytes * len(window[1]) / document.tokens)
            if len(batch.owners) == len(batch.inputs):
                yield begun.pop(length)
    yield from begun.values()


def _encoded(
    tokenizer: BaseTokenizer, documents: Iterable[tuple[str, str]], found: list[_Document]
) -> Iterator[np.ndarray]:
    """The ids of each document, after <|bos|>."""
    documents, counts = iter(documents), dict[str, int]()
    while some := [*itertools.islice(documents, _DOCUMENTS)]:
        ids, offsets = tokenizer.encode_to_numpy([text for _, text in some], prepend=tokenizer.bos_token_id)
        for (source, text), start, end in zip(some, offsets, offsets[1:], strict=False):
            index = counts[source] = counts.get(source, -1) + 1
            if end - start < 2:
                continue
            size = len(text.encode("utf-8", "replace"))
            found.append(_Document(source, index, text[:BEGINNING], size, int(end - start) - 1))
            yield ids[start:end].astype(np.int32)


def rolling_windows(ids: Int[np.ndarray, " N"], length: int) -> Iterator[Window]:
    """Inputs and targets that predict all of `ids` but the first, each once, from at most `length` tokens before it.

    The targets are the tokens after the last inputs. The first window begins with the first id. All but the last have
    `length` targets; the last has as many inputs as the first window, so that its targets see what is before them.
    """
    for start in range(1, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[max(0, end - 1 - length) : end - 1], ids[start:end]
