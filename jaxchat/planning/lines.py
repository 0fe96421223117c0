"""What a start says about the amount of text, in plain lines."""

from __future__ import annotations

from jaxchat.config import Experiment
from jaxchat.model.config import GPTConfig
from jaxchat.planning.proposal import PASSES, TOKENS_PER_PARAMETER, Proposal, matrices
from jaxchat.planning.text_amount import TextAmount
from jaxchat.runs.progress import format_number

MANY = 1.1 * PASSES  # passes that deserve a warning: a few per cent more than four are no other training


def amount_line(amount: TextAmount, vocab_size: int) -> str:
    """How much text there is."""
    about = "" if amount.exact else "about "
    documents = format_number(amount.documents, "document")
    return (
        f"{about}{format_bytes(amount.bytes)} of text to train on in {about}{documents}: "
        f"about {format_tokens(amount.tokens(vocab_size))} tokens with a vocabulary of {vocab_size:,}"
    )


def proposal_lines(experiment: Experiment, proposal: Proposal, amount: TextAmount, flops: float | None) -> list[str]:
    """What is proposed for a text, and why."""
    ratio = proposal.tokens / matrices(proposal.depth)
    lines = [
        amount_line(amount, proposal.vocab_size),
        f"depth {proposal.depth} ({format_tokens(proposal.parameters)} parameters), vocabulary "
        f"{proposal.vocab_size:,}, context {proposal.sequence_len:,}, {proposal.steps:,} steps of "
        f"{proposal.batch_tokens:,} tokens = {format_passes(proposal.passes)}",
    ]
    why = f"{ratio:.0f} tokens for each parameter of the layers (about {TOKENS_PER_PARAMETER:.0f} are best)"
    if proposal.passes >= 0.75 * PASSES:
        why += f"; more than {PASSES:.0f} passes teach little"
    elif flops is not None:
        why += "; this machine's time, not the text, sets the limit"
    lines.append(why)
    return lines


def length_lines(experiment: Experiment, amount: TextAmount) -> list[str]:
    """How much text there is, how often pretraining reads it, and a warning if that is often."""
    from jaxchat.train.budget import training_length  # imports JAX

    config, vocab_size = experiment.pretrain, experiment.tokenizer.vocab_size
    steps = training_length(config, GPTConfig.of(experiment.model, vocab_size))
    tokens, there = steps * config.batch_tokens, amount.tokens(vocab_size)
    passes = tokens / there
    lines = [
        amount_line(amount, vocab_size),
        f"pretraining reads {format_tokens(tokens)} tokens ({steps:,} steps): {format_passes(passes)}",
    ]
    if passes > MANY:
        fewer = max(1, int(PASSES * there // config.batch_tokens))
        change = f"--pretrain.num-iterations={fewer} reads it {PASSES:.0f} times, --sizes=auto chooses a smaller model"
        worth = "beyond about 16, repeating teaches nothing" if passes > 16 else "repeated text teaches less and less"
        lines.append(f"warning: pretraining reads the same text {passes:.0f} times; beyond about {PASSES:.0f} passes "
                     f"{worth}: add text, or {change}")  # fmt: skip
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
