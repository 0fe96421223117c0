"""How answers are drawn: the settings that are options of `jaxchat chat`, and that `/set` changes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxchat.config import Range, shown
from jaxchat.errors import UserError, closest

NONE = "none"  # how the absence of a value is written


@dataclass(frozen=True)
class Settings:
    """The settings of a conversation. `seed` is that of the next answer."""

    temperature: float = 0.6
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """What a setting may be, and a line of help."""

    name: str
    letter: str  # for the value, on a help page
    help: str
    limits: Range
    whole: bool = False
    optional: bool = False

    @property
    def field(self) -> str:
        """The attribute of `Settings`."""
        return self.name.replace("-", "_")

    @property
    def default(self) -> Any:
        """The value that `Settings` has without it."""
        return next(field.default for field in fields(Settings) if field.name == self.field)

    def parse(self, text: str) -> Any:
        """The value that `text` stands for.

        Raises:
          UserError: there is none, or it is out of range; the message goes on after the setting's name.
        """
        if self.optional and text == NONE:
            return None
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            kind = "a whole number" if self.whole else "a number"
            raise UserError(f"takes {kind}{', or none' if self.optional else ''}") from None
        if problem := self.limits.problem(value, self.whole):
            raise UserError(f"is {shown(value)}; it must be {problem}")
        return value


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "temperature", "X", "Sampling temperature; 0 always takes the likeliest token.", Range(at_least=0)
        ),
        Setting(
            "top-k", "K", "Sample from the K likeliest tokens; none for all.", Range(at_least=1),
            whole=True, optional=True,
        ),
        Setting(
            "top-p", "P", "Sample from the likeliest tokens that together reach this probability.",
            Range(above=0, at_most=1),
        ),
        Setting(
            "min-p", "P", "Sample only tokens that have at least this share of the likeliest one's probability.",
            Range(at_least=0, at_most=1),
        ),
        Setting(
            "repetition-penalty", "X", "Makes tokens less likely that were there before; 1 leaves them as they are.",
            Range(above=0),
        ),
        Setting("max-tokens", "N", "Longest answer, in tokens.", Range(at_least=1), whole=True),
        Setting("seed", "N", "Random seed, to repeat a conversation exactly.", Range(at_least=0), whole=True),
    )
}  # fmt: skip


def find_setting(name: str) -> Setting:
    """The setting of that name, also written as an option (`--top-k`) or in Python (`top_k`).

    Raises:
      UserError: there is none.
    """
    plain = name.lstrip("-").replace("_", "-")
    if plain not in SETTINGS:
        near = closest(plain, SETTINGS)
        raise UserError(f"there is no setting {shown(name)}{near} Choose one of {', '.join(SETTINGS)}")
    return SETTINGS[plain]


def described(settings: Settings) -> str:
    """The settings and their values in a line."""
    return " · ".join(f"{setting.name} {_written(getattr(settings, setting.field))}" for setting in SETTINGS.values())


def _written(value: float | None) -> str:
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)
