"""The evaluation of CORE: all items of all tasks through the model, and what that makes of each task.

Three things happen at once: a thread encodes items and fills batches with them, the devices compute the next batches,
and the results of earlier ones become decisions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from jaxchat.devices.mesh import data_shards, put_whole
from jaxchat.errors import check
from jaxchat.eval.core.batches import Batch, Layout, batches_of, lay_out
from jaxchat.eval.core.bundle import BASELINES, VERSIONS, Bundle, CoreTask, Version
from jaxchat.eval.core.kept import Kept, digest
from jaxchat.eval.core.prompts import Question, examples_of, order_of, questions_of
from jaxchat.eval.core.scoring import checksums, score
from jaxchat.eval.statistics import wilson_interval
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params
from jaxchat.ops.compute import FP32, Compute
from jaxchat.stopping import before_end, raise_if_asked
from jaxchat.tokenizer import BaseTokenizer

ROWS, ROWS_ON_CPU = 512, 64  # of a shard's part of a batch
ENCODED_AT_ONCE = 1024  # items
READY, COMPUTING = 3, 2  # batches that wait for the devices, and that the devices work on

# Called with how much is done, of how much (in characters of prompts, to which the time is proportional), and the task.
Progress = Callable[[int, int, str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class TaskScore:
    """The score of a task.

    Attributes:
      accuracy: the share of items that were answered right.
      count: of items.
      low, high: the 95 % confidence interval of the accuracy.
      centered: for each version of the baselines, the accuracy on a scale where guessing is 0 and all is 1. Empty for a
        task that is not one of CORE's.
      unaligned: how many items nanochat could not ask with this vocabulary, see `Question`.
    """

    label: str
    accuracy: float
    count: int
    low: float
    high: float
    centered: Mapping[Version, float]
    unaligned: int


@dataclass(frozen=True)
class CoreResult:
    """The scores of the tasks that were asked, in the bundle's order.

    Attributes:
      missing: the tasks of CORE that were not asked, and why.
      max_per_task: the limit of items a task; None if all were asked.
    """

    tasks: Mapping[str, TaskScore]
    missing: Mapping[str, str]
    max_per_task: int | None = None

    def scores(self) -> dict[str, float]:
        """`core_v1` and `core_v2`, the plain means of the centered accuracies of all 22 tasks.

        Where tasks are missing, the means over the N that are there have other names: `centered_mean_v1_of_N` and
        `centered_mean_v2_of_N`. Empty if none of CORE's tasks was asked.
        """
        counted = [task.centered for task in self.tasks.values() if task.centered]
        if not counted:
            return {}
        whole = len(counted) == len(BASELINES)
        means: dict[str, float] = {}
        for version in VERSIONS:
            name = version if whole else f"centered_mean_{version.removeprefix('core_')}_of_{len(counted)}"
            means[name] = math.fsum(task[version] for task in counted) / len(counted)
        return means


def evaluate_core(
    config: GPTConfig,
    params: Params,
    tokenizer: BaseTokenizer,
    bundle: Bundle,
    *,
    compute: Compute = FP32,
    max_per_task: int | None = None,
    tasks: Sequence[str] | None = None,
    keep: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> CoreResult:
    """Asks the model the tasks of a bundle, with the prompts and the decisions of nanochat's `core_eval.py`.

    Prompts that are longer than the model's context run at their full length, as they do there. Of several processes
    each must make the same call, and gets the whole result.

    Args:
      params: as `compute.mesh` places them.
      compute: its dtype and mesh. Numbers published for nanochat are of bf16; compare item by item in fp32.
      max_per_task: the most items of each task. Another limit means other items and other examples.
      tasks: labels of tasks; None for all that the bundle has.
      keep: a folder for the decision on each item (see `kept.py`). What is there already, of the same model and
        settings, is not computed again.
      progress: called at the beginning, if there is anything to do, and after each batch.

    Raises:
      UserError: a task that the bundle lacks, or too few items for the examples; another model's tokenizer.
    """
    check(
        tokenizer.vocab_size <= config.vocab_size,
        f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,}: it is another model's; "
        "use the tokenizer that the model was trained with",
    )
    bundle = bundle if tasks is None else bundle.only(tuple(tasks))
    orders = {task.label: order_of(task, max_per_task) for task in bundle.tasks}
    digests = {}
    if keep is not None:
        model = dataclasses.asdict(config), checksums(params), tokenizer.to_json()
        of_all = digest(*model, str(compute.dtype), max_per_task)
        # Where the file lies does not matter.
        digests = {t.label: digest(of_all, dataclasses.asdict(dataclasses.replace(t, path=""))) for t in bundle.tasks}
    kept = Kept(keep, digests, {label: len(order) for label, order in orders.items()})
    with before_end(kept.save):
        try:
            _ask(config, params, tokenizer, bundle, compute, orders, kept, progress)
        finally:
            kept.save()
    scored = {task.label: _task_score(task, kept) for task in bundle.tasks}
    missing = {label: why for label, why in bundle.missing.items() if label in BASELINES}
    return CoreResult(scored, missing, max_per_task)


def _task_score(task: CoreTask, kept: Kept) -> TaskScore:
    rights = kept.right[task.label]
    accuracy = sum(map(bool, rights)) / len(rights)
    centered: dict[Version, float] = {v: (accuracy - b) / (1 - b) for v, b in task.baselines.items()}
    unaligned = kept.aligned[task.label].count(False)
    return TaskScore(task.label, accuracy, len(rights), *wilson_interval(accuracy, len(rights)), centered, unaligned)


def _ask(
    config: GPTConfig,
    params: Params,
    tokenizer: BaseTokenizer,
    bundle: Bundle,
    compute: Compute,
    orders: Mapping[str, list[int]],
    kept: Kept,
    progress: Progress | None,
) -> None:
    """Makes the decisions that are not there yet."""
    sizes = {task.label: _sizes(task, orders[task.label]) for task in bundle.tasks}
    total = sum(map(sum, sizes.values()))
    done = sum(
        size
        for label, own in sizes.items()
        for size, right in zip(own, kept.right[label], strict=True)
        if right is not None
    )
    if progress is not None and done < total:
        progress(done, total, bundle.tasks[0].label)  # the first batch waits for the program to be compiled
    by_label = {task.label: task for task in bundle.tasks}

    def layouts() -> Iterator[Layout]:
        for task in bundle.tasks:
            order = orders[task.label]
            left = [index for index, right in enumerate(kept.right[task.label]) if right is None]
            for first in range(0, len(left), ENCODED_AT_ONCE):
                questions = questions_of(task, order, left[first : first + ENCODED_AT_ONCE], tokenizer)
                made = [lay_out(question) for question in questions]
                # Long ones first: they fill a batch with little room left, and prompts of one length suit each other
                # where attention is computed for all rows up to the longest.
                yield from sorted(made, key=lambda layout: -len(layout.pages))

    def settle(batch: Batch, result: tuple[jax.Array, jax.Array]) -> None:
        nonlocal done
        nll, best = (np.asarray(x).reshape(len(batch.parts), -1) for x in result)
        label = ""
        for part, own_nll, own_best in zip(batch.parts, nll, best, strict=True):
            at = 0
            for layout in part.layouts:
                question, label = layout.question, layout.question.label
                span = slice(at, at + len(layout.targets))
                line = _decision(by_label[label], orders[label], question, own_nll[span], own_best[span], tokenizer)
                kept.add(label, line)
                done += sizes[label][question.index]
                at = span.stop
        kept.save_sometimes()
        if progress is not None:
            progress(done, total, label)

    shards = 1 if compute.mesh is None else data_shards(compute.mesh)
    put = jax.device_put if compute.mesh is None else functools.partial(_put, compute.mesh)
    rows = ROWS_ON_CPU if jax.default_backend() == "cpu" else ROWS
    computing: deque[tuple[Batch, tuple[jax.Array, jax.Array]]] = deque()
    for batch in _ahead(batches_of(layouts(), rows, shards), READY):
        raise_if_asked()
        computing.append((batch, score(config, compute, params, put(batch.arrays))))
        if len(computing) > COMPUTING:
            settle(*computing.popleft())
    while computing:
        settle(*computing.popleft())


def _put(mesh: jax.sharding.Mesh, arrays: Any) -> Any:
    return jax.tree.map(functools.partial(put_whole, mesh), arrays)


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, of which a thread makes some ahead of need."""
    with ThreadPoolExecutor(1, "core") as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, items, None))
                yield item
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


def _sizes(task: CoreTask, order: Sequence[int]) -> list[int]:
    """How many characters each item has together with its examples, all choices counted."""
    own = [
        sum(
            len(text)
            for value in task.items[i].values()
            for text in (value if isinstance(value, list) else [value])
            if isinstance(text, str)
        )
        for i in order
    ]
    return [
        own[index] + sum(own[other] for other in examples_of(index, len(order), task.shots))
        for index in range(len(own))
    ]


def _decision(
    task: CoreTask,
    order: Sequence[int],
    question: Question,
    nll: np.ndarray,
    best: np.ndarray,
    tokenizer: BaseTokenizer,
) -> dict[str, Any]:
    """What is kept of an item: the decision, what it rests on, and what a reader needs to understand it."""
    item = task.items[order[question.index]]
    ends = np.cumsum([len(span.targets) for span in question.spans])[:-1]
    scores = [float(np.mean(values)) if len(values) else math.nan for values in np.split(nll, ends)]
    line: dict[str, Any] = {"index": question.index, "line": task.lines[order[question.index]]}
    if task.kind == "language_modeling":
        line["right"] = bool((best == question.spans[0].targets).all())
        line |= {"question": item["context"], "expected": item["continuation"], "predicted": _text(tokenizer, best)}
        line |= {} if question.aligned else {"aligned": False}
    else:
        # Python's minimum of a list with NaN, the mean of an empty span: one that stands first stays the minimum, and a
        # later one is passed over.
        chosen = scores.index(min(scores))
        line["right"] = chosen == item["gold"]
        asked, options = ("query", "choices") if task.kind == "multiple_choice" else ("continuation", "context_options")
        line |= {"question": item[asked], "choices": item[options], "gold": item["gold"], "chosen": chosen}
    # The mean surprise of each choice, or of the continuation, in nats a token. JSON has no NaN.
    return line | {"scores": [None if math.isnan(score) else score for score in scores]}


def _text(tokenizer: BaseTokenizer, ids: np.ndarray) -> str:
    """The text of ids, of which the model may have more than the tokenizer."""
    return tokenizer.decode([int(i) for i in ids if i < tokenizer.vocab_size])
