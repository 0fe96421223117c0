"""Cross-entropy of softcapped logits, with its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat.ops.dispatch import Level, operation
from jaxchat.ops.linear import Quantized, times
from jaxchat.ops.triton import launch, load, store

NEVER = -1e30  # the logit of a vocabulary id that exists only as padding
KERNEL_CAP = 60.0  # the kernel subtracts no maximum: e^60 times any vocabulary is finite in fp32


def softcap(scores: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """cap · tanh(scores / cap): keeps logits within ±cap (Gemma 2, arXiv:2408.00118)."""
    return cap * jnp.tanh(scores / cap)


def capped_logits(
    hidden: Float[Array, "... D"], head: Float[Array, "D V"] | Quantized, vocab_size: int, cap: float
) -> Float[Array, "... V"]:
    """Softcapped logits in fp32; ids from `vocab_size` on, which are only padding, get -1e30.

    The head is in the dtype of `hidden`, or in 8 bits.
    """
    scores = softcap(times(hidden, head, jnp.float32), cap)
    return jnp.where(jnp.arange(head.shape[1]) < vocab_size, scores, NEVER)


def nll_of(capped: Float[Array, "... V"], targets: Int[Array, "..."]) -> tuple[Array, Array]:
    """The logarithm of the sum of exp(logits), and -log p(target) in nats, which is 0 where the target is negative.

    With an axis more than the logits have positions, `targets` are several to a position: [B, T, K].
    """
    if targets.ndim == capped.ndim:
        log_sum = jax.nn.logsumexp(capped, axis=-1)
        target_scores = jnp.take_along_axis(capped, jnp.maximum(targets, 0), axis=-1)
        return log_sum, jnp.where(targets >= 0, log_sum[..., None] - target_scores, 0.0)
    target_score = jnp.take_along_axis(capped, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    log_sum = jax.nn.logsumexp(capped, axis=-1)
    return log_sum, jnp.where(targets >= 0, log_sum - target_score, 0.0)


# What a loss has to do with the entropies of the distributions that its targets come from.
Entropy = Literal["unused", "measured", "trained"]


class Weighed(NamedTuple):
    """What a loss makes of its targets' log-probabilities and entropies.

    Attributes:
      loss: over all targets.
      weights: its derivatives for the targets' -log p; 0 where there is no target. Of several targets to a position
        they are constants, whatever -log p is.
      entropy_weights: minus its derivatives for the entropies, if these are trained; 0 where there is no target.
      sums: of what is measured, over all targets.
    """

    loss: Float[Array, ""]
    weights: Float[Array, "B T *K"]
    entropy_weights: Float[Array, "B T"] | None
    sums: dict[str, Float[Array, ""]]


Weigh = Callable[[Float[Array, "B T *K"], Float[Array, "B T"] | None], Weighed]  # from -log p and entropies, in nats


@operation
def loss_and_gradients(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T *K"],
    weigh: Weigh,
    entropy: Entropy,
    vocab_size: int,
    cap: float,
) -> tuple[Float[Array, ""], Float[Array, "B T D"], Float[Array, "D V"], dict[str, Float[Array, ""]]]:
    """What `weigh` makes of the targets that are not negative: the loss, its gradients for `hidden` and `head`, sums.

    `head` has the dtype of `hidden`; its gradient is fp32. The logits of all positions are held at once. Several
    targets to a position, [B, T, K], share its logits, and so cost no products; they come without entropies.
    """
    capped = capped_logits(hidden, head, vocab_size, cap)
    log_sum, nll = nll_of(capped, targets)
    log_p = capped - log_sum[..., None]
    p = jnp.exp(log_p)
    entropies = None if entropy == "unused" else -jnp.sum(p * log_p, axis=-1)
    weighed = weigh(nll, entropies)
    hit = jnp.arange(head.shape[1]) == targets[..., None]
    # d(cap · tanh(s / cap))/ds = 1 - tanh²; a padded id's softmax is exactly zero, so its column gets no gradient.
    slope = jnp.where(capped > NEVER, 1.0 - jnp.square(capped / cap), 0.0)
    if targets.ndim == hidden.ndim:
        weights = weighed.weights[..., None]
        grad = (p * jnp.sum(weights, axis=-2) - jnp.sum(weights * hit, axis=-2)) * slope
    else:
        grad = (p - hit) * slope * weighed.weights[..., None]
    if weighed.entropy_weights is not None and entropies is not None:
        # The entropy's derivative for a logit is -p (log p + entropy).
        grad += p * (log_p + entropies[..., None]) * slope * weighed.entropy_weights[..., None]
    grad = grad.astype(hidden.dtype)
    return weighed.loss, grad @ head.T, _head_gradient(hidden, grad), weighed.sums


def _head_gradient(hidden, grad):
    return jnp.einsum("btd,btv->dv", hidden, grad, preferred_element_type=jnp.float32)


# --- Triton: from logits to their gradient, in place if both have the model's dtype -----------------------------------


@loss_and_gradients.kernel(
    Level.TRITON,
    # A trained entropy needs another pass over the row.
    accepts=lambda *operands: operands[-1] <= KERNEL_CAP and operands[-3] != "trained",
)
def _(hidden, head, targets, weigh, entropy, vocab_size, cap):
    # With an entropy the answers were sampled, from fp32 logits: rounded ones would be those of another policy.
    dtype = hidden.dtype if entropy == "unused" else jnp.float32
    scores = jnp.matmul(hidden, head, preferred_element_type=dtype).reshape(-1, head.shape[1])
    several, whole = targets.ndim == hidden.ndim, None
    if several:  # their weights, which are constants, decide what the row's gradient is
        weights = weigh(jnp.zeros(targets.shape), None).weights
        whole = jnp.sum(weights, axis=-1)
        shares = (weights / jnp.where(whole == 0, 1.0, whole)[..., None]).reshape(-1, targets.shape[-1])
    nll, factor, grad, entropies = cross_entropy_rows(
        scores,
        targets.reshape(-1, *targets.shape[2:]),
        vocab_size,
        cap,
        shares=shares if several else None,
        with_entropy=entropy == "measured",
        dtype=hidden.dtype,
    )
    weighed = weigh(nll.reshape(targets.shape), None if entropies is None else entropies.reshape(targets.shape))
    factor = (factor.reshape(hidden.shape[:2]) * (weighed.weights if whole is None else whole))[..., None]
    grad = grad.reshape(*hidden.shape[:2], -1)
    # The rows' factors multiply what is narrower than the logits, on one side of each product.
    head_grad = _head_gradient((hidden * factor).astype(hidden.dtype), grad)
    return weighed.loss, ((grad @ head.T) * factor).astype(hidden.dtype), head_grad, weighed.sums


def cross_entropy_rows(
    scores: Float[Array, "N V"],
    targets: Int[Array, "N *K"],
    vocab_size: int,
    cap: float,
    *,
    shares: Float[Array, "N K"] | None = None,
    with_entropy: bool = False,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "N *K"], Float[Array, "N"], Float[Array, "N V"], Float[Array, "N"] | None]:
    """-log p(target) in nats of each row, in fp32, and its gradient for `scores`; `with_entropy` also the entropy.

    `scores` are raw: p is the softmax of cap · tanh(scores / cap) over the first `vocab_size` columns. The gradient
    comes as a factor for each row, in fp32, and a matrix of `dtype`, or None for that of `scores`, whose place it takes
    if the dtypes are the same. Where the target is negative, the loss and the factor are 0.

    With `shares`, K targets to a row, the gradient is that of the mean of their -log p with these weights, which sum to
    1, or to 0 where there is no target; the share of one that is negative is 0.

    The cap bounds the exponentials (e^±cap), so that no maximum needs to be subtracted, and their sum can be divided by
    later, as the row's factor: a program reads its row once.
    """
    rows, width = scores.shape
    given = [] if shares is None else [shares.reshape(-1)]
    count = 1 if shares is None else shares.shape[1]
    wide = min(2048, pl.next_power_of_2(width))
    dtype = scores.dtype if dtype is None else jnp.dtype(dtype)

    def exponential(scores):
        """The exponent cap · tanh(scores / cap), its exponential, and the exponent's derivative.

        With r = 1 / (1 + e^(2 scores / cap)), tanh is 1 - 2r and its derivative 4r (1 - r). r comes from 1/√, which is
        one instruction, where a division is many.
        """
        root = jax.lax.rsqrt(1.0 + jnp.exp(scores * (2.0 / cap)))
        r = root * root
        exponent = cap - (2.0 * cap) * r
        return exponent, jnp.exp(exponent), 4.0 * r * (1.0 - r)

    def kernel(scores_ref, targets_ref, *refs):
        shares_refs, (nll_ref, factor_ref, grad_ref, *entropy_refs) = refs[: len(given)], refs[len(given) :]
        row = pl.program_id(0)
        places = [row * count + k for k in range(count)] if given else [row]
        found = [triton.load(targets_ref.at[place]) for place in places]
        at_targets = [row * width + jnp.maximum(target, 0) for target in found]
        of_targets = [exponential(load(scores_ref, at_target)) for at_target in at_targets]

        def part(step, sums):
            columns = step * wide + jnp.arange(wide)
            inside = None if width % wide == 0 else columns < width
            exponent, values, slope = exponential(load(scores_ref, row * width + columns, inside))
            if vocab_size < width or inside is not None:
                values = jnp.where(columns < vocab_size, values, 0.0)
            store(grad_ref, row * width + columns, values * slope, inside)
            more = (values, values * exponent)[: len(sums)]
            return tuple(total + of_part for total, of_part in zip(sums, more, strict=True))

        nothing = (jnp.zeros(wide, jnp.float32),) * (1 + len(entropy_refs))
        sums = jax.lax.fori_loop(0, pl.cdiv(width, wide), part, nothing)
        # The sum waits for all threads of the program, so that what they stored of the row precedes this store.
        total = jnp.sum(sums[0])
        parts = [load(ref, place) for ref in shares_refs for place in places]
        for k, (place, target, at_target) in enumerate(zip(places, found, at_targets, strict=True)):
            (exponent, value, slope), counts, pull = of_targets[k], target >= 0, total
            if parts:  # the same token may be several of the targets
                pull *= sum(jnp.where(other == target, part, 0.0) for other, part in zip(found, parts, strict=True))
            store(grad_ref, at_target, (value - pull) * slope, counts)
            store(nll_ref, place, jnp.where(counts, jnp.log(total) - exponent, 0.0))
        any_counts = functools.reduce(jnp.logical_or, [target >= 0 for target in found])
        store(factor_ref, row, jnp.where(any_counts, 1.0 / total, 0.0))
        for entropy_ref in entropy_refs:
            store(entropy_ref, row, jnp.log(total) - jnp.sum(sums[1]) / total)

    of_rows = jax.ShapeDtypeStruct((rows,), jnp.float32)
    of_each = jax.ShapeDtypeStruct((rows * count,), jnp.float32)
    out = [of_each, of_rows, jax.ShapeDtypeStruct((scores.size,), dtype), *[of_rows] * with_entropy]
    call = launch(kernel, (rows,), out, warps=8, aliases={0: 2} if scores.dtype == dtype else None)
    nll, factor, grad, *entropies = call(scores.reshape(-1), targets.reshape(-1), *given)
    return nll.reshape(targets.shape), factor, grad.reshape(scores.shape), entropies[0] if with_entropy else None
