"""Sizes of a model and its training that fit an amount of text, and the compute there is. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxchat.config import Impossible, ModelConfig, model_width
from jaxchat.errors import UserError
from jaxchat.model.config import VOCAB_MULTIPLE
from jaxchat.planning.text_amount import VOCABULARIES, TextAmount
from jaxchat.recipes import counted_parameters

# Muennighoff et al., "Scaling Data-Constrained Language Models" (2023): up to four passes over a text are nearly as
# good as new text; beyond about sixteen, more are worth nothing.
PASSES = 4.0
# The most training tokens for each parameter of the layers' matrices. Hoffmann et al., "Training Compute-Optimal Large
# Language Models" (2022), found 20 of all parameters with AdamW; nanochat's fits of March 2026, with Muon, found 12 of
# those in matrix products, which are 15 of a d12's layers. On 1 MB of text a d2 overtakes a d1 at about 7.
MOST_TOKENS_PER_PARAMETER = 15.0
DEPTHS = range(1, 33)
# On a GPU only widths of whole tiles of its matrix products are fast: on an H200 a d7's step took 1.4 times as long as
# a d6's, and a d8's 1.6 times.
TILE = 128
BYTES_PER_TOKEN = 4  # about, where the context is chosen before the vocabulary
CONTEXTS = (128, 256, 512, 1024, 2048)
LEAST_BATCH, LARGEST_BATCH = 512, 524_288


@dataclass(frozen=True)
class Proposal:
    """Sizes of a model and of its pretraining.

    Attributes:
      vocab_size, depth, sequence_len, batch_tokens, steps: as in the configuration.
      text_tokens: about how many tokens the text has with this vocabulary.
      parameters: of the model, with embedding and head.
      flops: of pretraining.
    """

    vocab_size: int
    depth: int
    sequence_len: int
    batch_tokens: int
    steps: int
    text_tokens: int
    parameters: int
    flops: float

    @property
    def tokens(self) -> int:
        """Tokens that pretraining reads."""
        return self.steps * self.batch_tokens

    @property
    def passes(self) -> float:
        """How often pretraining reads the text."""
        return self.tokens / self.text_tokens


def propose(
    text: TextAmount,
    flops: float | None = None,
    *,
    fixed: Mapping[str, int] | None = None,
    shards: int = 1,
    tensor: int = 1,
    on_cpu: bool = True,
) -> Proposal:
    """The sizes for a text.

    Args:
      text: what is trained on.
      flops: of pretraining, at most; None for as many as the text deserves.
      fixed: sizes that are decided already, by their names in `Proposal`; the others follow from them too.
      shards: devices that share the rows of a batch.
      tensor: devices that share the heads of a layer.
      on_cpu: whether the devices are CPUs. Small models do not fill a GPU, so that a deeper one costs less time there
        than its FLOPs say; and only some widths are fast there.

    Raises:
      UserError: no depth suits the mesh.
    """
    fixed = fixed or {}
    depths = [depth for depth in DEPTHS if _is_possible(depth, tensor) and (on_cpu or model_width(depth) % TILE == 0)]
    if "depth" in fixed:
        depths = [fixed["depth"]]
    if not depths:
        raise UserError(f"mesh.tensor is {tensor}; no depth up to {DEPTHS[-1]} has heads that it divides; lower it")
    vocabularies = sorted(text.bytes_per_token, reverse=True)
    if "vocab_size" in fixed:
        vocabularies = [fixed["vocab_size"]]
    fits = [_fit(text, size, flops, depths, fixed, on_cpu) for size in vocabularies]
    fit = next((fit for fit in fits if fit.vocab_size <= _vocabulary(fit.read_bytes)), fits[-1])
    batch = fixed.get("batch_tokens") or _batch(fit.tokens, fit.sequence_len, shards)
    steps = fixed.get("steps") or max(1, int(fit.tokens // batch))
    return Proposal(
        vocab_size=fit.vocab_size,
        depth=fit.depth,
        sequence_len=fit.sequence_len,
        batch_tokens=batch,
        steps=steps,
        text_tokens=text.tokens(fit.vocab_size),
        parameters=matrix_parameters(fit.depth, fit.vocab_size) + model_width(fit.depth) * _padded(fit.vocab_size),
        flops=float(steps) * batch * flops_per_token(fit.depth, fit.vocab_size, fit.sequence_len),
    )


class _Fit(NamedTuple):
    """A model for a vocabulary, the tokens to train it on, and the bytes of these, repeated ones too."""

    vocab_size: int
    depth: int
    sequence_len: int
    tokens: float
    read_bytes: float


def _fit(
    text: TextAmount,
    vocab_size: int,
    flops: float | None,
    depths: Sequence[int],
    fixed: Mapping[str, int],
    on_cpu: bool,
) -> _Fit:
    """The depth whose tokens for each parameter are nearest to the best number, as a factor."""
    there = text.tokens(vocab_size)

    def fit(depth: int) -> _Fit:
        length = fixed.get("sequence_len") or _context(text, depth)
        tokens = PASSES * there
        if flops is not None:
            tokens = min(tokens, flops / flops_per_token(depth, vocab_size, length))
        return _Fit(vocab_size, depth, length, tokens, text.bytes * tokens / there)

    def distance(fit: _Fit) -> float:
        return abs(math.log(fit.tokens / layer_parameters(fit.depth) / tokens_per_parameter(fit.depth, on_cpu)))

    return min(map(fit, depths), key=distance)


def tokens_per_parameter(depth: int, on_cpu: bool) -> float:
    """The best number of tokens for each parameter of the layers' matrices; fewer on a GPU, as said in `propose`."""
    return min(MOST_TOKENS_PER_PARAMETER, depth + (5 if on_cpu else 2))


def layer_parameters(depth: int) -> int:
    """Parameters of the layers' matrices: 4 squares of the width in attention and 8 in the MLP of each."""
    return 12 * depth * model_width(depth) ** 2


def matrix_parameters(depth: int, vocab_size: int) -> int:
    """Parameters in matrix products: those of the layers, and the head."""
    return counted_parameters(ModelConfig(depth=depth), vocab_size)


def flops_per_token(depth: int, vocab_size: int, sequence_len: int) -> int:
    """As `jaxchat.train.budget.flops_per_token` for a model with full attention, without building it."""
    width = model_width(depth)
    return 6 * matrix_parameters(depth, vocab_size) + 12 * width * sequence_len * depth


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _is_possible(depth: int, tensor: int) -> bool:
    try:
        return ModelConfig(depth=depth).kv_heads % tensor == 0
    except Impossible:
        return False


def _vocabulary(read_bytes: float) -> int:
    """A power of two for so many bytes of training: 4,096 for 1 MB, growing with their power of 0.32, and at least 512.

    Twice as large ones were worse where about 1 MB was read, and better where 4 and 280 MB were.
    """
    return max(VOCABULARIES[0], 1 << round(math.log2(4096 * (max(1.0, read_bytes) / 1e6) ** 0.32)))


def _context(text: TextAmount, depth: int) -> int:
    """As long as documents are and as the model can use: at most 128 tokens a layer, or all of them from 12 on."""
    tokens = min(text.longer, text.bytes / 4) / BYTES_PER_TOKEN  # a text of one document has to fill rows too
    most = min(2 * tokens, CONTEXTS[-1] if depth >= 12 else 128 * depth)
    return max((each for each in CONTEXTS if each <= most), default=CONTEXTS[0])


def _batch(tokens: float, length: int, shards: int) -> int:
    """A power of two of rows on each device, for as many tokens as suit a training on `tokens`.

    It grows with their power of 0.7, from 2,048 for 0.6 million, where smaller ones were hardly better and larger ones
    worse on a d2, to 524,288 for 1.6 billion, as many as a d12 deserves.
    """
    wanted = min(LARGEST_BATCH, max(LEAST_BATCH, LARGEST_BATCH * (tokens / 1.6e9) ** 0.7))
    rows = 1 << max(0, round(math.log2(wanted / (length * shards))))
    return rows * length * shards
