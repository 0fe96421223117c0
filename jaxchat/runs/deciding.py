"""Which settings decide what a stage makes, and are therefore fixed once it has made something.

All others only look (evaluation, samples, logging, saving, cost) or say how the work is done (devices, rows at once,
what is recomputed), which changes results by rounding at most. They may change at any time.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

from jaxchat.config import Experiment

# Fields of a stage's own section. Rows at once: a step's batch and the mean over it stay the same.
_FREE = {
    "eval_every", "sample_every", "save_every", "eval_tokens", "eval_questions", "pass_k", "device_rows", "humaneval",
    "uncontained", "core_every", "core_per_task", "tasks_every", "task_questions",
}  # fmt: skip
# Where tasks are only scored; reinforcement learning trains on its own.
_FREE_OF = {"midtrain": {"tasks"}, "sft": {"tasks"}}
# How long a stage trains: fixed when it is finished; before that `jaxchat.stages.training` checks what is possible.
_LENGTH = {"num_iterations", "target_flops", "tokens_per_param", "tokens_per_matrix_param", "epochs"}
_TEXT = {"download", "val_shard"}  # which text the tokenizer and pretraining read
_ORDER = {"shuffle", "packing", "lanes"}  # and how pretraining reads it
# Values that earlier versions had where nobody chose one, and those of today: a finished stage is the same with both.
_EARLIER = {"rl.top_k": (50, None), "rl.schedule.decay_ratio": (0.2, 1.0)}
OWN = "a folder of your own"


def deciding(experiment: Experiment, stage: str, *, finished: bool) -> dict[str, Any]:
    """The settings that decide what `stage` makes, by their names on the command line; {} for one that only looks.

    The path of the data is not among them, only whether there is one: a folder may be moved.
    """
    if stage not in ("tokenizer", "pretrain", "midtrain", "sft", "rl"):
        return {}
    every = dataclasses.asdict(experiment)
    data, own = every["data"], experiment.data.folder is not None
    chosen: dict[str, Any] = {"data.path": OWN if own else None}
    fields = set()
    if stage in ("tokenizer", "pretrain"):
        fields |= _TEXT if own else {"synthetic_documents"}
    elif not own:
        fields.add("synthetic_conversations")
    if stage in ("midtrain", "sft") and experiment.reads_text(stage):
        fields |= _TEXT if own else {"synthetic_documents"}
    if stage != "tokenizer" and experiment.reads_text(stage):
        fields |= _ORDER
    if stage != "tokenizer":
        fields.add("mask_borders")  # a part of the model
        sections = ("model", "optimizer")
        chosen |= {"seed": experiment.seed, "precision": experiment.precision}
        chosen |= {f"{section}.{name}": value for section in sections for name, value in _flat(every[section])}
    elif not own:
        chosen["seed"] = experiment.seed
    chosen |= {f"data.{name}": data[name] for name in sorted(fields)}
    if stage in ("midtrain", "sft") and data["identity"] is not None:
        begins = data["identity"].partition("\n")[0][:40]
        chosen["data.identity"] = f"{begins!r} ({zlib.crc32(data['identity'].encode()):08x})"
    free = _FREE | _FREE_OF.get(stage, set()) | (set() if finished else _LENGTH)
    chosen |= {f"{stage}.{name}": value for name, value in _flat(every[stage]) if name not in free}
    if finished:
        chosen |= {name: today for name, (earlier, today) in _EARLIER.items() if chosen.get(name, today) == earlier}
    return {name.replace("_", "-"): value for name, value in chosen.items()}


def _flat(section: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, value in section.items():
        nested = isinstance(value, dict)
        found += [(f"{name}.{inner}", deep) for inner, deep in _flat(value)] if nested else [(name, value)]
    return found


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
