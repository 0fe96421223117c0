"""What a start says about the amount of text, in plain lines."""

from __future__ import annotations

from jaxchat.config import Experiment
from jaxchat.model.config import GPTConfig
from jaxchat.planning.proposal import DEPTHS, PASSES, Proposal, layer_parameters
from jaxchat.planning.text_amount import TextAmount
from jaxchat.runs.progress import format_number, format_roughly

MANY = 1.1 * PASSES  # passes that deserve a warning: a few per cent more than four are no other training
WORTHLESS = 16.0  # passes beyond which repeating teaches nothing: Muennighoff et al. (2023)
WORTHWHILE = 20  # steps that are a training at all


def amount_line(amount: TextAmount, vocab_size: int) -> str:
    """How much text there is."""
    about = "" if amount.exact else "about "
    documents = format_number(amount.documents, "document")
    return (
        f"{about}{format_bytes(amount.bytes)} of text to train on in {about}{documents}: "
        f"about {format_tokens(amount.tokens(vocab_size))} tokens with a vocabulary of {vocab_size:,}"
    )


def proposal_lines(proposal: Proposal, amount: TextAmount, flops: float | None, seconds: float) -> list[str]:
    """What is proposed for a text, and why.

    Args:
      flops: the compute that was allowed; None for any.
      seconds: about how long pretraining will take.
    """
    ratio = proposal.tokens / layer_parameters(proposal.depth)
    why = f"{ratio:.1f} tokens for each parameter of the layers"
    if proposal.depth == DEPTHS[0]:
        why = f"the smallest depth, because there are only {format_tokens(proposal.tokens)} tokens to read"
    if proposal.passes >= 0.75 * PASSES:
        why += f"; more than {PASSES:.0f} passes teach little"
    elif flops is not None:
        why += "; the time sets the limit, not the text"
    return [
        amount_line(amount, proposal.vocab_size),
        f"depth {proposal.depth} ({format_tokens(proposal.parameters)} parameters), vocabulary "
        f"{proposal.vocab_size:,}, context {proposal.sequence_len:,}, {proposal.steps:,} steps of "
        f"{proposal.batch_tokens:,} tokens: {format_passes(proposal.passes)}",
        f"{why}; pretraining takes very roughly {format_roughly(seconds)} here",
    ]


def length_lines(experiment: Experiment, amount: TextAmount) -> list[str]:
    """How much text there is, how often pretraining reads it, and a warning if that is often."""
    from jaxchat.train.budget import training_length, training_tokens  # imports JAX

    config, vocab_size = experiment.pretrain, experiment.tokenizer.vocab_size
    model = GPTConfig.of(experiment.model, vocab_size)
    steps, tokens, there = training_length(config, model), training_tokens(config, model), amount.tokens(vocab_size)
    passes = tokens / there
    lines = [
        amount_line(amount, vocab_size),
        f"pretraining reads {format_tokens(tokens)} tokens ({steps:,} steps): {format_passes(passes)}",
    ]
    if passes > MANY:
        fewer = int(PASSES * there // config.mean_batch_tokens)
        stop = f", and --pretrain.num-iterations={fewer} stops after {PASSES:.0f} passes" if fewer >= WORTHWHILE else ""
        worth = f"less and less, and nothing beyond about {WORTHLESS:.0f} times"
        lines.append(
            f"warning: a text that is read more than {PASSES:.0f} times teaches {worth}; add text, or --sizes=auto "
            f"chooses a model that suits it{stop}"
        )
    return lines


def format_bytes(size: int) -> str:
    """`1.2 MB` and the like, in powers of 1,000."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:,.1f} {unit}"
    return format_number(size, "byte")


def format_tokens(number: float) -> str:
    """`1.2 million` and the like."""
    for word, power in (("billion", 9), ("million", 6), ("thousand", 3)):
        if number >= 10**power:
            return f"{number / 10**power:,.{1 if number < 10 ** (power + 2) else 0}f} {word}"
    return f"{number:.0f}"


def format_passes(passes: float) -> str:
    """How often a text is read: `3.9 passes`, or `3 % of it` where it is not read once."""
    return f"{passes:.1f} passes over it" if passes >= 0.95 else f"{passes:.0%} of it"
