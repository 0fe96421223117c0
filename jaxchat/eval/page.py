"""A page to read answers and failures in: one file of HTML, which needs no network."""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.runs.progress import format_number

MOST = 500  # items of a task in the page, those that are wrong first
LONGEST = 4000  # characters of a text in the page
Item = dict[str, Any]
Group = dict[str, Any]


def page(title: str, model: str, groups: Sequence[Group]) -> str:
    """The page. `groups` are of `task_group` and `text_group`; `title` and `model` are its heading."""
    data = json.dumps({"title": title, "model": model, "groups": groups}, ensure_ascii=False)
    # Within a script only "<" could end it.
    return (Path(__file__).parent / "page.html").read_text("utf-8").replace("DATA", data.replace("<", "\\u003c"), 1)


def group(
    name: str, figure: str, about: str, items: Sequence[Item], file: str, order: tuple[str, str] | None = None
) -> Group:
    """A part of the page.

    Args:
      name, figure, about: what it is, its score, and what else to say of that.
      items: in the order in which they are to be read.
      file: which has all of them.
      order: of items with a `value`, what to call the order from the highest value on, and the one from the lowest on.
    """
    shown = sorted(items, key=lambda item: item.get("score", 0) == 1)[:MOST]
    wrong = sum(item.get("score", 1) < 1 for item in items)
    about = f"{about}; {len(items):,} in all" + (f", {wrong:,} wrong" if wrong else "")
    if len(shown) < len(items):
        about += f"; here are {len(shown):,} of them"
    found = {"name": name, "figure": figure, "about": f"{about}. All of them: {file}", "items": shown}
    return found if order is None else {**found, "order": order}


def answer_item(answer: Mapping[str, Any]) -> Item:
    """An answer to a question of a task, a line of the task's file."""
    samples = answer.get("samples") or []
    marks = [f"question {answer.get('index', 0):,}", *(answer[key] for key in ("id", "subject") if answer.get(key))]
    cut = answer["cut"] or any(sample["cut"] for sample in samples)
    texts = [{"text": cut_text(answer["answer"])}]
    for i, one in enumerate(samples, start=1):
        label = f"sample {i}, score {one['score']:g}{', cut' if one['cut'] else ''}"
        texts = [*(texts if i > 1 else []), {"label": label, "text": cut_text(one["answer"])}]
    if answer.get("logprobs"):
        # One answer has no room to say how sure it was.
        likely = sorted(answer["logprobs"].items(), key=lambda pair: -pair[1])
        texts[0]["label"] = "log-probabilities: " + ", ".join(f"{letter} {value:.2f}" for letter, value in likely)
    return {
        "score": answer["score"],
        "cut": cut,
        "marks": [*marks, *(["cut"] if cut else [])],
        "question": cut_text(answer["question"]),
        "right": cut_text(answer["right"]),
        "answers": texts,
    }


def core_item(line: Mapping[str, Any]) -> Item:
    """A decision of CORE, a line of a task's file: the choices with their mean nats a token, or what was predicted."""
    item = {
        "score": float(line["right"]),
        "cut": False,
        "marks": [f"item {line['index']:,}", f"line {line['line']:,}"],
        "question": cut_text(line["question"]),
        "right": "",
        "answers": [],
    }
    if "choices" not in line:
        return {**item, "answers": [{"text": cut_text(line["predicted"])}], "right": cut_text(line["expected"])}
    choices = []
    for i, (text, nats) in enumerate(zip(line["choices"], line["scores"], strict=True)):
        marks = [*(["chosen"] if i == line["chosen"] else []), *(["right"] if i == line["gold"] else [])]
        value = "" if nats is None else f"{nats:.4f}"
        choices.append({"mark": ", ".join(marks), "value": value, "text": cut_text(text), "right": i == line["gold"]})
    return {**item, "choices": choices}


def document_item(document: Mapping[str, Any]) -> Item:
    """A document whose bits per byte were measured, a line of `text.jsonl`."""
    size = f"{document['bytes']:,} bytes, {document['tokens']:,} tokens"
    return {
        "marks": [f"{document['bits_per_byte']:.4f} bits per byte", f"{document['source']}, document "
                  f"{document['index']:,}", size],
        "question": document["beginning"],
        "right": "",
        "answers": [],
    }  # fmt: skip


def rollout_item(line: Mapping[str, Any]) -> Item:
    """A question with all answers that it got in a step of RL, a line of `rollouts.jsonl`; equal ones are one."""
    samples = line["samples"]
    of_answer = operator.itemgetter("answer", "reward", "advantage", "tokens", "cut")
    rewards = [sample["reward"] for sample in samples if sample["reward"] is not None]
    cut = any(sample["cut"] for sample in samples)
    mean = sum(rewards) / len(rewards) if rewards else None
    return {
        "value": mean,
        "cut": cut,
        "marks": [
            f"mean reward {_number(mean)}",
            line["task"],
            *([] if len(set(rewards)) > 1 else ["no signal"]),
            *([] if line["used"] else ["not trained on"]),
            *(["cut"] if cut else []),
        ],
        "question": cut_text(line["question"]),
        "right": cut_text(line["right"]),
        "answers": [
            {
                "value": reward,
                "label": f"reward {_number(reward)}, advantage {_number(advantage)}, {format_number(tokens, 'token')}"
                f"{', cut' if was_cut else ''}{f', {times:,} times' if times > 1 else ''}",
                "text": cut_text(text),
            }
            for (text, reward, advantage, tokens, was_cut), times in Counter(map(of_answer, samples)).items()
        ],
    }


def change_item(change: float, times: int, lines: Sequence[Mapping[str, Any]]) -> Item:
    """A question that was asked several times in RL, with its best and its worst answer each time.

    Args:
      change: of the mean reward, from the first time to the last.
      times: how often it was asked.
      lines: some of these, as in `rollouts.jsonl`, in order.
    """
    answers, cut = [], False
    for line in lines:
        scored = [sample for sample in line["samples"] if sample["reward"] is not None]
        mean = sum(sample["reward"] for sample in scored) / len(scored)
        best, worst = (choose(scored, key=lambda sample: sample["reward"]) for choose in (max, min))
        differ = best["reward"] > worst["reward"]
        named = [("the best", best), ("the worst", worst)] if differ else [("one of them", best)]
        for i, (name, sample) in enumerate(named):
            step = f"step {line['step']:,}, mean reward {_number(mean)} of {len(scored):,}: " if i == 0 else ""
            label = f"{step}{name}, reward {_number(sample['reward'])}{', cut' if sample['cut'] else ''}"
            answers.append({"label": label, "text": cut_text(sample["answer"])})
            cut |= sample["cut"]
    return {
        "value": change,
        "cut": cut,
        "marks": [f"mean reward {change:+.3g}", lines[0]["task"], f"asked {times:,} times"],
        "question": cut_text(lines[0]["question"]),
        "right": cut_text(lines[0]["right"]),
        "answers": answers,
    }


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def cut_text(text: str) -> str:
    """A text of at most `LONGEST` characters."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
