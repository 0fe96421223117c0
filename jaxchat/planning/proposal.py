"""Sizes of a model and its training that fit an amount of text, and the compute there is. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxchat.config import Impossible, ModelConfig, model_width
from jaxchat.errors import UserError
from jaxchat.model.config import VOCAB_MULTIPLE
from jaxchat.planning.text_amount import VOCABULARIES, TextAmount

# Muennighoff et al., "Scaling Data-Constrained Language Models" (2023): up to four passes over a text are nearly as
# good as new text; beyond about sixteen, more are worth nothing.
PASSES = 4.0
# Hoffmann et al., "Training Compute-Optimal Large Language Models" (2022), here for each parameter of the blocks'
# matrices: in small models embedding and head are most of the parameters, but an embedding costs nothing and both learn
# at rates of their own.
TOKENS_PER_PARAMETER = 20.0
DEPTHS = range(2, 33)
CONTEXTS = (128, 256, 512, 1024, 2048)
LEAST_BATCH, LARGEST_BATCH = 2048, 524_288


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
) -> Proposal:
    """The sizes for a text.

    Args:
      text: what is trained on.
      flops: of pretraining, at most; None for as many as the text deserves.
      fixed: sizes that are decided already, by their names in `Proposal`; the others follow from them too.
      shards: devices that share the rows of a batch.
      tensor: devices that share the heads of a layer.

    Raises:
      UserError: no depth suits the mesh.
    """
    fixed = fixed or {}
    vocab_size = fixed.get("vocab_size") or _vocabulary(text, flops)
    text_tokens = text.tokens(vocab_size)
    context = fixed.get("sequence_len")
    depths = [fixed["depth"]] if "depth" in fixed else [depth for depth in DEPTHS if _is_possible(depth, tensor)]
    if not depths:
        raise UserError(f"mesh.tensor is {tensor}; no depth up to {DEPTHS[-1]} has heads that it divides; lower it")
    chosen = depths[0]
    for depth in depths:
        length = context or _context(text, vocab_size, depth)
        tokens = _tokens(text_tokens, flops, depth, vocab_size, length)
        if matrices(depth) * TOKENS_PER_PARAMETER > tokens:
            break
        chosen = depth
    length = context or _context(text, vocab_size, chosen)
    tokens = _tokens(text_tokens, flops, chosen, vocab_size, length)
    if "steps" in fixed and "batch_tokens" not in fixed:
        tokens = min(tokens, fixed["steps"] * LARGEST_BATCH)
    batch = fixed.get("batch_tokens") or _batch(tokens, length, shards)
    steps = fixed.get("steps") or max(1, int(tokens // batch))
    width = model_width(chosen)
    return Proposal(
        vocab_size=vocab_size,
        depth=chosen,
        sequence_len=length,
        batch_tokens=batch,
        steps=steps,
        text_tokens=text_tokens,
        parameters=matrices(chosen) + 2 * width * _padded(vocab_size),
        flops=float(steps) * batch * flops_per_token(chosen, vocab_size, length),
    )


def matrices(depth: int) -> int:
    """Parameters of the blocks' matrices: 4 squares of the width in attention and 8 in the MLP of each layer."""
    return 12 * depth * model_width(depth) ** 2


def flops_per_token(depth: int, vocab_size: int, sequence_len: int) -> int:
    """As `jaxchat.train.budget.flops_per_token` for a model with full attention, without building it."""
    width = model_width(depth)
    return 6 * (matrices(depth) + width * _padded(vocab_size)) + 12 * width * sequence_len * depth


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _is_possible(depth: int, tensor: int) -> bool:
    try:
        return ModelConfig(depth=depth).kv_heads % tensor == 0
    except Impossible:
        return False


def _tokens(text_tokens: int, flops: float | None, depth: int, vocab_size: int, length: int) -> float:
    """Tokens to train on: `PASSES` over the text, or fewer where compute ends before."""
    most = PASSES * text_tokens
    return most if flops is None else min(most, flops / flops_per_token(depth, vocab_size, length))


def _vocabulary(text: TextAmount, flops: float | None) -> int:
    """The power of two that is nearest to the root of the bytes that are read at least once."""
    size = text.bytes
    if flops is not None:
        size = min(size, round(4 * math.sqrt(TOKENS_PER_PARAMETER * flops / 6)))
    nearest = 1 << round(math.log2(math.sqrt(max(1, size))))
    known = [each for each in text.bytes_per_token if each <= max(nearest, VOCABULARIES[0])]
    return max(known, default=min(text.bytes_per_token))


def _context(text: TextAmount, vocab_size: int, depth: int) -> int:
    """As long as documents are and as the model can use: at most 64 tokens a layer, or all of them from 12 on."""
    tokens = text.longer * text.tokens(vocab_size) / max(1, text.bytes)
    most = min(2 * tokens, CONTEXTS[-1] if depth >= 12 else 128 * depth)
    return max((each for each in CONTEXTS if each <= most), default=CONTEXTS[0])


def _batch(tokens: float, length: int, shards: int) -> int:
    """A power of two of rows on each device. A batch grows with the root of the tokens, as in d12's 131,072 of 50M."""
    wanted = min(LARGEST_BATCH, max(LEAST_BATCH, 4 * math.sqrt(tokens)))
    rows = 1 << max(0, round(math.log2(wanted / (length * shards))))
    return rows * length * shards
