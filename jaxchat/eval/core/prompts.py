"""What CORE asks: the examples before an item, its prompts as tokens, and which of these are scored.

The algorithm is that of nanochat's `core_eval.py`, to the letter. It has stayed the same since its first version, so
that values published for nanochat compare.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxchat.errors import check
from jaxchat.eval.core.bundle import CoreTask
from jaxchat.tokenizer import BaseTokenizer

ORDER_SEED, EXAMPLES_SEED = 1337, 1234
Item = Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """The tokens of a prompt that are scored.

    Attributes:
      row: which of the question's `inputs` the prompt begins.
      start: how many tokens come before the first that is scored; at least 1.
      targets: the tokens that are scored. May be empty.
    """

    row: int
    start: int
    targets: Int[np.ndarray, " S"]


@dataclass(frozen=True)
class Question:
    """An item as the model reads it.

    Attributes:
      label: of the task.
      index: of the item, in the order in which its task is asked.
      inputs: the prompts up to the last token that predicts a scored one, without duplicates: choices of one token
        behind the same text are a single input.
      spans: one for each choice, or the one of a language modeling item.
      aligned: whether the scored tokens of a language modeling item are exactly those of its continuation. Where a
        token covers both the end of the context and the beginning of the continuation, nanochat stops with an error.
        Here the tokens from that one on are scored.
    """

    label: str
    index: int
    inputs: tuple[Int[np.ndarray, " _"], ...]
    spans: tuple[Span, ...]
    aligned: bool = True


def order_of(task: CoreTask, limit: int | None) -> list[int]:
    """The numbers of the items to ask, in the order in which they are asked: shuffled, and then cut to `limit`.

    Raises:
      UserError: there are not enough of them for the examples, which come from the same items.
    """
    check(limit is None or limit > 0, f"{limit} items a task are too few; ask for at least 1")
    order = list(range(len(task.items)))
    random.Random(ORDER_SEED).shuffle(order)
    order = order[:limit]
    check(
        len(order) > task.shots,
        f"{task.label} puts {task.shots} other items before each as examples, and {len(order)} items are too few for "
        f"that; " + (f"ask for at least {task.shots + 1}" if limit else f"{task.path} is incomplete"),
    )
    return order


def examples_of(index: int, count: int, shots: int) -> list[int]:
    """Which of `count` items are the examples before item `index`: drawn from all others, with a seed of its own."""
    drawn = random.Random(EXAMPLES_SEED + index).sample(range(count - 1), shots)
    return [other + (other >= index) for other in drawn]


def prompts_of(task: CoreTask, examples: Sequence[Item], item: Item) -> list[str]:
    """The prompts of an item: one for each choice; in language modeling those without and with the continuation."""
    before = "".join(_solved(task, example) + "\n\n" for example in examples)
    if task.kind == "multiple_choice":
        return [before + item["query"] + task.delimiter + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [before + option + task.delimiter + item["continuation"] for option in item["context_options"]]
    asked = before + item["context"].strip() + task.delimiter
    # The space that ends the delimiter belongs to the first token of the continuation.
    return [asked.strip(), asked + item["continuation"]]


def _solved(task: CoreTask, item: Item) -> str:
    if task.kind == "multiple_choice":
        return item["query"] + task.delimiter + item["choices"][item["gold"]]
    if task.kind == "schema":
        return item["context_options"][item["gold"]] + task.delimiter + item["continuation"]
    return item["context"].strip() + task.delimiter + item["continuation"]


def questions_of(
    task: CoreTask, order: Sequence[int], indices: Sequence[int], tokenizer: BaseTokenizer
) -> list[Question]:
    """The items at `indices` of `order` as questions. Each prompt is encoded as a whole, behind `<|bos|>`."""
    texts: list[str] = []
    ends = []
    for index in indices:
        examples = [task.items[order[i]] for i in examples_of(index, len(order), task.shots)]
        texts += prompts_of(task, examples, task.items[order[index]])
        ends.append(len(texts))
    ids, offsets = tokenizer.encode_to_numpy(texts, prepend=tokenizer.bos_token_id)
    ids = ids.astype(np.int32)
    prompts = [ids[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
    starts = [0, *ends[:-1]]
    return [_question(task, i, prompts[a:b]) for i, a, b in zip(indices, starts, ends, strict=True)]


def _question(task: CoreTask, index: int, prompts: list[np.ndarray]) -> Question:
    aligned = True
    if task.kind == "multiple_choice":
        start = common_length(prompts)
        scored = [(prompt, start) for prompt in prompts]
    elif task.kind == "schema":
        length = common_length([prompt[::-1] for prompt in prompts])
        # A suffix that reaches the first token, as that of equal options, leaves nothing that could be predicted.
        scored = [(prompt, len(prompt) - length or len(prompt)) for prompt in prompts]
    else:
        without, prompt = prompts
        start = common_length(prompts)
        aligned = start == len(without) < len(prompt)
        scored = [(prompt, min(start, len(prompt) - 1))]
    numbers: dict[bytes, int] = {}
    inputs, spans = [], []
    for prompt, start in scored:
        read = prompt[: len(prompt) - 1 if start < len(prompt) else 0]
        row = numbers.setdefault(read.tobytes(), len(inputs))
        if row == len(inputs):
            inputs.append(read)
        spans.append(Span(row, start, prompt[start:]))
    return Question(task.label, index, tuple(inputs), tuple(spans), aligned)


def common_length(sequences: Sequence[np.ndarray]) -> int:
    """The length of the longest prefix that all sequences share."""
    length = min(map(len, sequences))
    first = sequences[0][:length]
    for other in sequences[1:]:
        differs = np.flatnonzero(first[:length] != other[:length])
        length = int(differs[0]) if len(differs) else length
    return length
