"""The live line on stderr while a stage runs, and how it formats counts and durations."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jaxchat.verbatim import Style, segments, write

PLAIN_SECONDS = 10.0
REDRAW_SECONDS = 0.2


class LiveLine:
    """One line on stderr, redrawn in place on a terminal; elsewhere printed about every ten seconds and at the end."""

    def __init__(self, stage: str, total_steps: int | None):
        self._stage, self._total = stage, total_steps
        self._values: dict[str, Any] = {}
        self._step: int | None = None
        self._first: tuple[float, int] | None = None
        self._drawn_at = -math.inf
        self._drawn_step: int | None = None
        self._doing, self._doing_since, self._done = "", (0.0, 0), 0
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._rich: Live | None = None

    def remember(self, values: dict[str, Any]) -> None:
        """Keeps values to be shown by the next update."""
        self._values.update({name: value for name, value in values.items() if value is not None})

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Shows a step; costs almost nothing if it is not yet time to draw."""
        self.remember(values)
        self._step = step
        # The estimate of the time left starts after the first step, which compiles.
        self._first = self._first or (time.monotonic(), step)
        if self._is_time():
            self._draw()

    def expect(self, total_steps: int) -> None:
        """Shows updates as steps of so many from now on."""
        self._total = total_steps

    def show_progress(self, doing: str, done: int, total: int) -> None:
        """Shows how far something has come that the steps wait for; costs almost nothing if it is not yet time to draw.

        Its time left is estimated from its first call on, which may come after programs were compiled.
        """
        now = time.monotonic()
        if doing != self._doing or done < self._done:
            self._doing, self._doing_since = doing, (now, done)
        self._done = done
        if self._is_time():
            since, before = self._doing_since
            left = (now - since) / (done - before) * (total - done) if done > before else None
            parts = [
                self._stage,
                doing,
                f"{done / max(1, total):.0%}",
                *([f"{format_duration(left)} left"] if left else []),
            ]
            self._show("  ".join(parts))

    def _is_time(self) -> bool:
        return time.monotonic() - self._drawn_at >= (REDRAW_SECONDS if self._terminal else PLAIN_SECONDS)

    def _draw(self) -> None:
        self._show(format_live(self._stage, self._step or 0, self._total, self._values, self._seconds_left()))
        self._drawn_step = self._step

    def _show(self, line: str) -> None:
        if self._terminal:
            if self._rich is None:
                # What is printed meanwhile goes above the line, unless it goes to a file.
                seen = sys.stdout.isatty()
                self._rich = Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=seen)
                self._rich.start()
            self._rich.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self._drawn_at = time.monotonic()

    def _seconds_left(self) -> float | None:
        if self._total is None or self._step is None or self._first is None or self._step <= self._first[1]:
            return None
        seconds, first_step = self._first
        return (time.monotonic() - seconds) / (self._step - first_step) * max(0, self._total - self._step)

    def show_note(self, text: str) -> None:
        """Prints `text` above the line."""
        self._print((f"{self._stage}  {text}", ""))

    def show_sample(self, step: int, prompt: str, completion: str) -> None:
        """Prints a prompt and the model's completion above the line."""
        title = f"{self._stage}  sample at step {step:,}: "
        self._print((title, "dim"), (prompt, "bold"), (completion, ""))

    def _print(self, *pieces: tuple[str, Style]) -> None:
        if self._rich:
            self._rich.console.print(segments(*pieces, ("\n", "")), soft_wrap=True)
            return
        for text, style in pieces:
            write(text, sys.stderr, style=style)
        write("\n", sys.stderr)

    def close(self) -> None:
        """Ends the line, leaving the last step on the screen."""
        if self._step != self._drawn_step:
            self._draw()
        if self._rich:
            self._rich.stop()


def format_live(
    stage: str, step: int, total_steps: int | None, values: dict[str, Any], seconds_left: float | None
) -> str:
    """The line, such as `pretrain  1234/5000  loss 2.345  412k tok/s  12m 05s left`, without unknown values."""
    parts = [stage, f"{step:>{len(str(total_steps))}}/{total_steps}" if total_steps else f"{step}"]
    for name, digits in (("loss", 3), ("bpb", 3), ("reward", 2), ("reward_eval", 2)):
        if name in values:
            parts.append(f"{name.replace('_', ' ')} {values[name]:.{digits}f}")
    if "tokens_per_second" in values:
        parts.append(f"{format_count(values['tokens_per_second'])} tok/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    if seconds_left is not None:
        parts.append(f"{format_duration(seconds_left)} left")
    return "  ".join(parts)


def format_count(number: float) -> str:
    """Three digits and a unit: 950, 1.23k, 412k, 1.31M, 10.5B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"


def format_number(count: int, noun: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_left_out(counts: Mapping[str, int]) -> str:
    """What was left out by kind, such as `1 bad conversation, 20 documents not UTF-8`."""
    words = {kind: kind.replace("_", " ").replace("utf8", "UTF-8") for kind in counts}
    singular = {kind: re.sub(r"s\b", "", text, count=1) for kind, text in words.items()}
    return ", ".join(f"{n:,} {(singular if n == 1 else words)[kind]}" for kind, n in sorted(counts.items()))


def format_duration(seconds: float) -> str:
    """The two largest units that matter: 8s, 9m 41s, 1h 05m, 2d 03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02}m"
    hours = round(minutes / 60)
    return f"{hours // 24}d {hours % 24:02}h"


def format_roughly(seconds: float) -> str:
    """A time that is estimated and deserves no more digits: `3 minutes`, `2 years`."""
    units = {"year": 365 * 86400, "day": 86400, "hour": 3600, "minute": 60}
    unit, size = next(((unit, size) for unit, size in units.items() if seconds >= 1.5 * size), ("minute", 60))
    return format_number(max(1, round(seconds / size)), unit)
