"""What is different in the early phases of pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxchat.config.optimizer import RATE
from jaxchat.config.ranges import Range, Section, shown

SHARE = Range(above=0, below=1)
BATCH = Range(at_least=1, at_most=1 << 30)


@dataclass(frozen=True)
class PhasesConfig(Section):
    """Pretraining in phases: growing windows and batches, and tokens ahead at first."""

    section = "pretrain.phases"

    windows: Annotated[tuple[float, ...], SHARE] = ()
    """Windows that grow: in each phase but the last, how far back layers see, as a share of what they do in the last,
    such as 0.25,0.5. Each phase is a program of its own. (): always the same."""
    batch_tokens: Annotated[tuple[int, ...], BATCH] = ()
    """A batch that grows: the tokens of a step in each phase but the last, which has pretrain.batch-tokens, such as
    131072,262144. (): always the same."""
    rates: Annotated[tuple[float, ...], RATE] = ()
    """With batch-tokens: the factor on all learning rates in each phase but the last. (): the root of the ratio of its
    batch to the last one."""
    until: Annotated[tuple[float, ...], SHARE] = ()
    """The share of all tokens after which each phase but the last ends, such as 0.3,0.6. (): phases of equally many
    tokens."""
    ahead: Annotated[tuple[float, ...], RATE] = ()
    """Tokens ahead: the weights, at the first step, of the losses of the token after the next one, the token after
    that, and so on, beside that of the next one, such as 0.5,0.25. (): the next one alone."""
    ahead_until: Annotated[float, Range(above=0, at_most=1)] = 0.3
    """The share of all tokens over which the weights of tokens ahead fall to 0, in a line."""

    def __post_init__(self):
        super().__post_init__()
        lengths = {"windows": len(self.windows), "batch-tokens": len(self.batch_tokens), "until": len(self.until)}
        given = {name: count for name, count in lengths.items() if count}
        (first, count), *others = given.items() or {"windows": 0}.items()
        for name, other in others:
            self.check(
                other == count,
                f"{name} has {other} and {first} has {count}; give both as many: one for each phase but the last",
            )
        self.check(given.keys() != {"until"}, "until is given, but neither windows nor batch-tokens; leave it out")
        self.check(
            len(self.rates) in (0, len(self.batch_tokens)),
            f"rates has {len(self.rates)} and batch-tokens has {len(self.batch_tokens)}; give as many, or no rates",
        )
        for name in ("windows", "batch_tokens", "until"):
            values = getattr(self, name)
            if list(values) != sorted(values) or (name == "until" and len(set(values)) < len(values)):
                self.refuse(name, "in rising order")

    @property
    def change(self) -> bool:
        """Whether anything changes during pretraining."""
        return self.count > 1 or bool(self.ahead)

    @property
    def count(self) -> int:
        """The number of phases of windows and batches."""
        return 1 + max(len(self.windows), len(self.batch_tokens))

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of all tokens that each phase has."""
        until = self.until or tuple((i + 1) / self.count for i in range(self.count - 1))
        ends = (0.0, *until, 1.0)
        return tuple(end - begin for begin, end in zip(ends, ends[1:], strict=False))


def check_batches(phases: PhasesConfig, batch_tokens: int) -> None:
    """Raises `Impossible` if a phase's batch is larger than that of the last phase, `batch_tokens`."""
    for tokens in phases.batch_tokens:
        phases.check(
            tokens <= batch_tokens,
            f"batch-tokens is {shown(phases.batch_tokens)}; it must be at most pretrain.batch-tokens, {batch_tokens}",
        )
