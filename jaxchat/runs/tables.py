"""Tables of Markdown with results of evaluations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

VERSIONS = ("core_v1", "core_v2")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table without the columns that are empty; all but the first `left` are aligned to the right."""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[header[i] for i in used], ["---" if i < left else "---:" for i in used]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *([row[i] for i in used] for row in rows)])


def interval(low: float | None, high: float | None, *, scale: float = 100, digits: int = 1) -> str:
    """Such as `41.1 to 45.4`; empty where there is none."""
    return "" if low is None or high is None else f"{scale * low:.{digits}f} to {scale * high:.{digits}f}"


def core_means(metrics: Iterable[str]) -> list[str]:
    """Those of some metrics that are means over the tasks of CORE, in order."""
    return sorted(name for name in metrics if re.fullmatch(r"core_v\d|centered_mean_v\d_of_\d+", name))


def core_table(core: Mapping[str, Any]) -> str:
    """The tasks of CORE, and the means over them.

    Args:
      core: the means by name; `tasks`, for each `accuracy`, `low`, `high`, `count` and, by version of the baselines,
        `centered`; `missing`, the tasks of CORE that were not asked; `max_per_task`; `dtype`.
    """
    tasks, means = core["tasks"], {name: core[name] for name in core_means(core)}
    rows = [
        [
            label,
            f"{entry['accuracy']:.1%}",
            interval(entry["low"], entry["high"]),
            f"{entry['count']:,}",
            *(f"{entry['centered'][version]:.4f}" if version in entry["centered"] else "" for version in VERSIONS),
        ]
        for label, entry in tasks.items()
    ]
    if means:
        rows.append([f"mean of {sum(bool(entry['centered']) for entry in tasks.values())}", "", "", "",
                     *(f"{value:.4f}" for value in means.values())])  # fmt: skip
    shown = table(["CORE task", "right", "95 % interval", "items", "centered, v1", "centered, v2"], rows)
    limit = f", at most {core['max_per_task']:,} items of each task" if core["max_per_task"] else ""
    values = ", ".join(f"{name} {value:.4f}" for name, value in means.items()) or "none of CORE's own tasks"
    notes = [f"{values} (in {core['dtype']}{limit})."]
    if means and core["missing"]:
        notes.append(f"Without {', '.join(core['missing'])} the mean is not CORE.")
    return f"{shown}\n\n{' '.join(notes)}"
