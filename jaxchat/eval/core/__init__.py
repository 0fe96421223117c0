"""CORE, the score of a base model over 22 tasks (DCLM, arXiv:2406.11794), as nanochat computes it.

bundle = load_bundle(folder)
result = evaluate_core(config, params, tokenizer, bundle, compute=compute)
result.tasks["arc_easy"].accuracy
result.scores()                                    {"core_v1": ..., "core_v2": ...} if all 22 tasks are there
"""

from jaxchat.eval.core.bundle import BASELINES, Bundle, CoreTask, find_bundle, load_bundle
from jaxchat.eval.core.evaluate import CoreResult, Progress, TaskScore, evaluate_core

__all__ = [
    "BASELINES",
    "Bundle",
    "CoreResult",
    "CoreTask",
    "Progress",
    "TaskScore",
    "evaluate_core",
    "find_bundle",
    "load_bundle",
]
