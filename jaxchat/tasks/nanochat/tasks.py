"""ARC, MMLU, GSM8K, HumanEval and SpellingBee with the prompts, order and grading of nanochat (92d63d4, July 2026)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxchat.data.chat.forms import contents_of, to_conversation
from jaxchat.data.text.reading import Findings
from jaxchat.errors import MissingData, check
from jaxchat.storage import AnyPath
from jaxchat.tasks import gsm8k, humaneval, multiple_choice
from jaxchat.tasks.base import Conversation, ListTask, Mode, Split, multiple_choice_question, question_and_answer
from jaxchat.tasks.items import read_items
from jaxchat.tasks.nanochat.calculator import calculate
from jaxchat.tools.python import run_program

MODE = Mode(prompt_tokens=2048, max_new_tokens=512, top_k=50, seed=42, calculator=calculate, any_of_samples=True)
_ORDER_SEED = 42
_FINAL = re.compile(r"#### (-?[0-9.,]+)")
_CALL = re.compile(r"(<<[^>]+>>)")
_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)
_AS_SCRIPT = '__name__ = "__main__"'  # as which nanochat runs a program


class _NanochatTask(ListTask):
    """A task with its items in memory; a limit takes the first of them."""

    mode = MODE

    def __init__(self, name: str, items: Sequence[Any], limit: int | None = None):
        super().__init__(name, items[:limit])

    def subset(self, limit: int | None) -> Sequence[int]:
        return range(len(self))[:limit]


def _shuffled(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items in nanochat's order, which is that of `datasets` with seed 42; `id` is the place in the file."""
    order = np.random.default_rng(_ORDER_SEED).permutation(len(items)).tolist()
    return [{"id": str(i), **items[i]} for i in order]


class MultipleChoice(_NanochatTask):
    """Items as in `tasks.multiple_choice`; the letters are those of the data, which may be digits."""

    kind = "multiple_choice"

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        return multiple_choice_question(
            item["question"],
            item["choices"],
            item["gold"],
            heading="Multiple Choice question",
            letters=item.get("labels"),
            source=self.name,
            id=item["id"],
            subject=item.get("subject", ""),
        )

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        """1 if the completion is the right letter, and nothing else."""
        return float(completion == conversation["messages"][-1]["content"])


class Arithmetic(_NanochatTask):
    """Conversations whose `answer` stands behind `####` in the last message: GSM8K and SpellingBee."""

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        """1 if the text of the number behind the first `#### ` is that of the answer, but for commas."""
        return float(final_answer(completion) == conversation["answer"])


class GSM8K(Arithmetic):
    """Items with a `question` and an `answer`."""

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        parts = answer_parts(item["answer"])
        answer = final_answer(parts[-1]["text"])
        return question_and_answer(item["question"], parts, answer=answer, source=self.name, id=item["id"])


class HumanEval(_NanochatTask):
    """Items with `task_id`, `prompt`, `entry_point`, `canonical_solution` and `test`.

    The question is the prompt as it is. The imports at its beginning, the code of the answer and the tests run as one
    program, which passes if it ends without an error: unlike in `tasks.humaneval`, it can say so itself.
    """

    def item(self, index: int) -> Conversation:
        item = self.items[index]
        answer = f"{item['prompt']}\n{item['canonical_solution']}"
        extra = {"entry_point": item["entry_point"], "test": item["test"], "id": item["task_id"]}
        return question_and_answer(item["prompt"], answer, source=self.name, **extra)

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        return float(run_program(build_program(conversation, completion), context=_AS_SCRIPT))


def final_answer(text: str) -> str | None:
    """The text of the number behind the first `#### `, without commas; None if there is none."""
    found = _FINAL.search(text)
    return found[1].replace(",", "") if found else None


def answer_parts(answer: str) -> list[dict[str, str]]:
    """The text of an answer of GSM8K, and for each `<<48/2=24>>` the call and the output as they stand there."""
    parts = []
    for i, piece in enumerate(_CALL.split(answer)):
        if i % 2:
            call, equals, output = piece[2:-2].rpartition("=")
            parts.append({"type": "python", "text": call if equals else output})
            parts.append({"type": "python_output", "text": output if equals else ""})
        else:
            parts.append({"type": "text", "text": piece})
    return parts


def build_program(conversation: Conversation, completion: str) -> str:
    """The imports with which the prompt begins, the first fenced block or else the whole completion, and the tests."""
    imports = []
    for line in map(str.strip, conversation["messages"][0]["content"].split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    found = _BLOCK.search(completion)
    code = (found[1] if found else completion).strip()
    call = f"{conversation['test']}\ncheck({conversation['entry_point']})"
    return "\n\n".join(("\n".join(imports), code, call))


def load_arc(name: str, split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> MultipleChoice:
    """The questions of `tasks.multiple_choice.load_arc`; `name` is nanochat_arc_easy or nanochat_arc_challenge."""
    items = multiple_choice.read_arc(name.removeprefix("nanochat_"), split, data_dir, findings)
    return MultipleChoice(name, _shuffled(items), limit)


def load_mmlu(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> MultipleChoice:
    """The questions of `tasks.multiple_choice.load_mmlu`."""
    return MultipleChoice("nanochat_mmlu", _shuffled(multiple_choice.read_mmlu(split, data_dir, findings)), limit)


def load_gsm8k(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> GSM8K:
    """The problems of `tasks.gsm8k.load_gsm8k`."""
    items = gsm8k.read_gsm8k(split, data_dir, findings, parse=_parse_problem)
    return GSM8K("nanochat_gsm8k", _shuffled(items), limit)


def _parse_problem(record: Mapping[str, Any]) -> dict[str, str]:
    item = gsm8k.parse_item(record)
    if final_answer(answer_parts(item["answer"])[-1]["text"]) is None:
        raise ValueError(f"the answer {item['answer'][-30:]!r} does not end with '#### ' and a number in digits")
    return item


def load_humaneval(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> HumanEval:
    """The problems of `tasks.humaneval.load_humaneval`."""
    return HumanEval("nanochat_humaneval", _shuffled(humaneval.read_humaneval(split, data_dir, findings)), limit)


def load_spelling(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> Arithmetic:
    """Loads `eval/nanochat_spelling.jsonl`: conversations that nanochat's SpellingBee has made, in its order.

    nanochat had that task until July 2026, and makes its questions of a list of words that it downloads.
    """
    check(split == "test", "nanochat_spelling has no questions for training; train on spelling or letters")
    path = data_dir / "eval" / "nanochat_spelling.jsonl"
    try:
        items = read_items(path, _parse_spelling, "nanochat_spelling", findings)
    except MissingData as error:
        raise MissingData(f"{error}; nanochat itself writes it (docs/evaluation.md)") from None
    return Arithmetic("nanochat_spelling", [{"id": str(i), **item} for i, item in enumerate(items)], limit)


def _parse_spelling(record: Mapping[str, Any]) -> dict[str, Any]:
    conversation = to_conversation(contents_of(record))
    answer = conversation["messages"][-1]["content"]
    number = final_answer(answer if isinstance(answer, str) else answer[-1]["text"])
    if number is None:
        raise ValueError("the last message does not end with '#### ' and a number, such as #### 3")
    return {**conversation, "answer": number, "source": "nanochat_spelling"}
