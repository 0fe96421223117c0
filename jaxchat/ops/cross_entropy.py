"""Cross-entropy of softcapped logits, with its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
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
    """The logarithm of the sum of exp(logits), and -log p(target) in nats, which is 0 where the target is negative."""
    target_score = jnp.take_along_axis(capped, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    log_sum = jax.nn.logsumexp(capped, axis=-1)
    return log_sum, jnp.where(targets >= 0, log_sum - target_score, 0.0)


@operation
def loss_and_gradients(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    vocab_size: int,
    cap: float,
) -> tuple[Float[Array, ""], Float[Array, "B T D"], Float[Array, "D V"]]:
    """Σ weight · -log p(target) over the targets that are not negative, and its gradients for `hidden` and `head`.

    `head` has the dtype of `hidden`; its gradient is fp32. The logits of all positions are held at once.
    """
    capped = capped_logits(hidden, head, vocab_size, cap)
    log_sum, nll = nll_of(capped, targets)
    weights = jnp.where(targets >= 0, weights, 0.0)
    hit = jnp.arange(head.shape[1]) == targets[..., None]
    # d(cap · tanh(s / cap))/ds = 1 - tanh²; a padded id's softmax is exactly zero, so its column gets no gradient.
    slope = 1.0 - jnp.square(capped / cap)
    grad = (jnp.exp(capped - log_sum[..., None]) - hit) * jnp.where(capped > NEVER, slope, 0.0) * weights[..., None]
    grad = grad.astype(hidden.dtype)
    return jnp.sum(nll * weights), grad @ head.T, _head_gradient(hidden, grad)


def _head_gradient(hidden, grad):
    return jnp.einsum("btd,btv->dv", hidden, grad, preferred_element_type=jnp.float32)


# --- Triton: from logits in the model's dtype to their gradient, in place ---------------------------------------------


@loss_and_gradients.kernel(Level.TRITON, accepts=lambda *operands: operands[-1] <= KERNEL_CAP)
def _(hidden, head, targets, weights, vocab_size, cap):
    scores = (hidden @ head).reshape(-1, head.shape[1])
    nll, factor, grad = cross_entropy_rows(scores, targets.reshape(-1), vocab_size, cap)
    nll, factor = nll.reshape(targets.shape), (factor.reshape(targets.shape) * weights)[..., None]
    # The rows' factors multiply what is narrower than the logits, on one side of each product.
    grad = grad.reshape(*targets.shape, -1)
    head_grad = _head_gradient((hidden * factor).astype(hidden.dtype), grad)
    return jnp.sum(nll * weights), ((grad @ head.T) * factor).astype(hidden.dtype), head_grad


def cross_entropy_rows(
    scores: Float[Array, "N V"], targets: Int[Array, "N"], vocab_size: int, cap: float
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N V"]]:
    """-log p(target) in nats of each row, in fp32, and its gradient for `scores`.

    `scores` are raw: p is the softmax of cap · tanh(scores / cap) over the first `vocab_size` columns. The gradient
    comes as a factor for each row, in fp32, and a matrix that takes the place and dtype of `scores`. Where the target
    is negative, the loss and the factor are 0.

    The cap bounds the exponentials (e^±cap), so that no maximum needs to be subtracted, and their sum can be divided by
    later, as the row's factor: a program reads its row once.
    """
    rows, width = scores.shape
    wide = min(2048, pl.next_power_of_2(width))

    def exponential(scores):
        """The exponent cap · tanh(scores / cap), its exponential, and the exponent's derivative.

        With r = 1 / (1 + e^(2 scores / cap)), tanh is 1 - 2r and its derivative 4r (1 - r). r comes from 1/√, which is
        one instruction, where a division is many.
        """
        root = jax.lax.rsqrt(1.0 + jnp.exp(scores * (2.0 / cap)))
        r = root * root
        exponent = cap - (2.0 * cap) * r
        return exponent, jnp.exp(exponent), 4.0 * r * (1.0 - r)

    def kernel(scores_ref, targets_ref, nll_ref, factor_ref, grad_ref):
        row = pl.program_id(0)
        target = triton.load(targets_ref.at[row])
        counts = target >= 0
        at_target = row * width + jnp.maximum(target, 0)
        exponent_of_target, of_target, slope_of_target = exponential(load(scores_ref, at_target))

        def part(step, total):
            columns = step * wide + jnp.arange(wide)
            inside = None if width % wide == 0 else columns < width
            _, values, slope = exponential(load(scores_ref, row * width + columns, inside))
            if vocab_size < width:
                values = jnp.where(columns < vocab_size, values, 0.0)
            store(grad_ref, row * width + columns, values * slope, inside)
            return total + values

        total = jax.lax.fori_loop(0, pl.cdiv(width, wide), part, jnp.zeros(wide, jnp.float32))
        # The sum waits for all threads of the program, so that what they stored of the row precedes this store.
        total = jnp.sum(total)
        store(grad_ref, at_target, (of_target - total) * slope_of_target, counts)
        store(nll_ref, row, jnp.where(counts, jnp.log(total) - exponent_of_target, 0.0))
        store(factor_ref, row, jnp.where(counts, 1.0 / total, 0.0))

    of_rows = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out = [of_rows, of_rows, jax.ShapeDtypeStruct((scores.size,), scores.dtype)]
    call = launch(kernel, (rows,), out, warps=8, aliases={0: 2})
    nll, factor, grad = call(scores.reshape(-1), targets)
    return nll, factor, grad.reshape(scores.shape)
