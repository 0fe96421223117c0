"""What a run may take: a time, or a price, as the user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxchat.errors import check

UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
LONGEST = 366 * 86400
_TIME = re.compile(r"(?:\d+(?:\.\d+)?\s*(?:sec|s|min|m|h|d)\s*)+")
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(sec|s|min|m|h|d)")
_DOLLARS = re.compile(r"\$(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)\s*(?:usd|\$)")


@dataclass(frozen=True)
class Amount:
    """What the user allows, as written: a time, or a price."""

    text: str
    seconds: float | None = None
    dollars: float | None = None

    def seconds_on(self, devices: int, dollars_per_device_hour: float) -> float:
        """The time, or the time that the price pays for so many devices.

        Raises:
          UserError: the devices cost nothing, or so little that it pays for more than a year.
        """
        if self.seconds is not None:
            return self.seconds
        rate = devices * dollars_per_device_hour
        check(rate > 0, f"--budget is {self.text}, but cost.dollars-per-device-hour is 0; give a time, such as 2h")
        seconds = 3600 * (self.dollars or 0.0) / rate
        check(seconds <= LONGEST, f"--budget is {self.text}, which pays for more than a year; give a time, such as 2h")
        return seconds


def parse_amount(text: str) -> Amount:
    """`15m`, `1h30m`, `90s`, `2d` or `10usd` as an amount.

    Raises:
      ValueError: it is none of these; the message goes on after the option's name.
    """
    written = text.strip().lower()
    if re.fullmatch(r"\d+(?:\.\d+)?", written):
        raise ValueError(f"is {written}; give a unit: {written}m, {written}h or {written}usd")
    amount = None
    if found := _DOLLARS.fullmatch(written):
        amount = Amount(written, dollars=float(found[1] or found[2]))
    elif _TIME.fullmatch(written):
        amount = Amount(written, seconds=sum(float(n) * UNITS[unit] for n, unit in _PART.findall(written)))
    if amount is None:
        raise ValueError(f"is {text[:60]!r}; give a time or a price: 15m, 1h30m, 2h or 10usd")
    if not (amount.seconds or amount.dollars):
        raise ValueError(f"is {written}; it must be more than nothing, such as 15m")
    if (amount.seconds or 0) > LONGEST:
        raise ValueError(f"is {written}; it must be at most a year")
    return amount
