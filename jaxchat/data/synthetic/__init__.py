"""The synthetic corpus: text, conversations and questions about a small invented world, generated without a download.

Everything follows from the seed. No question in an `eval/*/test.jsonl` occurs in the text or in a conversation: facts
are held out by (person, attribute), sums by their numbers, letter counting by the word.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.data.synthetic.chats import write_conversation
from jaxchat.data.synthetic.questions import (
    Purpose,
    Sum,
    answer_letters,
    answer_sum,
    ask_letters,
    ask_sum,
    draw_counted,
    draw_long_sum,
    draw_sum,
)
from jaxchat.data.synthetic.stories import write_document
from jaxchat.data.synthetic.world import QUESTIONS, VALUES, World, ask, build_world, reserved_form, state
from jaxchat.errors import check
from jaxchat.storage import AnyPath

TRAIN_SHARDS = 3
VALIDATION_SHARE = 0.02
ROW_GROUP_DOCUMENTS = 1024
TEST_QUESTIONS = 200
RL_QUESTIONS = 1000


def write_synthetic(
    directory: AnyPath,
    *,
    seed: int,
    documents: int = 40_000,
    conversations: int = 40_000,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes `pretrain/`, `chat/` and `eval/` into `directory`, in the layout of a data folder.

    Args:
      documents: documents of about 300 characters for pretraining; 2 % more go into the last shard, for validation.
      conversations: conversations in `chat/train.jsonl`; 2 % more go into `chat/val.jsonl`.
      say: called with a line for each part.

    Raises:
      UserError: fewer than 100 documents or conversations.
    """
    check(documents >= 100, f"data.synthetic-documents is {documents}; it must be at least 100")
    check(conversations >= 100, f"data.synthetic-conversations is {conversations}; it must be at least 100")
    world = build_world(seed)

    rng = random.Random(f"pretrain {seed}")
    validation = max(1, round(documents * VALIDATION_SHARE))
    bounds = [documents * i // TRAIN_SHARDS for i in range(TRAIN_SHARDS + 1)] + [documents + validation]
    (directory / "pretrain").mkdir(parents=True, exist_ok=True)
    for shard, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        texts = [write_document(world, rng) for _ in range(stop - start)]
        path = directory / "pretrain" / f"shard_{shard:05d}.parquet"
        with path.open("wb") as file:
            pq.write_table(pa.table({"text": texts}), file, row_group_size=ROW_GROUP_DOCUMENTS, compression="zstd")
        say(f"{path.name}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")

    rng = random.Random(f"chat {seed}")
    for name, count in (("train", conversations), ("val", max(1, round(conversations * VALIDATION_SHARE)))):
        _write_jsonl(directory / "chat" / f"{name}.jsonl", (write_conversation(world, rng) for _ in range(count)))
        say(f"chat/{name}.jsonl: {count:,} conversations")

    for name, make in QUESTION_MAKERS.items():
        files: tuple[tuple[str, Purpose, int], ...] = (("train", "rl", RL_QUESTIONS), ("test", "test", TEST_QUESTIONS))
        for side, purpose, count in files:
            items = make(world, random.Random(f"{name} {side} {seed}"), purpose, count)
            _write_jsonl(directory / "eval" / name / f"{side}.jsonl", items)
            say(f"eval/{name}/{side}.jsonl: {len(items):,} questions")


def _write_jsonl(path: AnyPath, items: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def _item(source: str, question: str, content: Any, answer: str, others: list[str] | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    item = {"messages": messages, "answer": answer, "source": source}
    return item | ({"others": others} if others is not None else {})


def make_sums(world: World, rng: random.Random, purpose: Purpose, count: int) -> list[dict[str, Any]]:
    """Distinct sums for one purpose."""
    return _sums("sums", draw_sum, rng, purpose, count)


def make_long_sums(world: World, rng: random.Random, purpose: Purpose, count: int) -> list[dict[str, Any]]:
    """Distinct sums of longer numbers, which are rare in the conversations, so that RL has something left to teach."""
    return _sums("long_sums", draw_long_sum, rng, purpose, count)


def _sums(name: str, draw: Callable[[random.Random, Purpose], Sum], rng: random.Random, purpose: Purpose, count: int):
    drawn: dict[str, Sum] = {}
    while len(drawn) < count:
        total = draw(rng, purpose)
        drawn[total.expression] = total
    return [_item(name, ask_sum(t, rng), answer_sum(t, rng), str(t.value)) for t in drawn.values()]


def make_letters(world: World, rng: random.Random, purpose: Purpose, count: int) -> list[dict[str, Any]]:
    """Distinct pairs of a word and a letter, with words for one purpose.

    The answers 0 to 3 are equally frequent, so that guessing is right one time in four at most.
    """
    drawn: set[tuple[str, str]] = set()
    while len(drawn) < count:
        drawn.add(draw_counted(rng, purpose, len(drawn) % 4))
    return [
        _item("letters", ask_letters(word, letter, rng), answer_letters(word, letter, rng), str(word.count(letter)))
        for word, letter in sorted(drawn)
    ]


def make_facts(world: World, rng: random.Random, purpose: Purpose, count: int) -> list[dict[str, Any]]:
    """At most `count` questions about facts, shuffled.

    For "test": every form of question about every held-out fact. For "rl": the one form of question about each other
    fact that is reserved for it. `others` are the values of the attribute that a right answer does not mention.
    """
    items = []
    for person, attribute in world.pairs(held_out=purpose == "test"):
        forms = range(len(QUESTIONS[attribute])) if purpose == "test" else [reserved_form(person, attribute)]
        for form in forms:
            value = person.facts[attribute]
            others = [other for other in VALUES[attribute] if other not in (value, person.name)]
            answer = state(person, attribute, rng.randrange(2))
            items.append(_item("facts", ask(person, attribute, form), answer, value, others))
    rng.shuffle(items)
    return items[:count]


QUESTION_MAKERS = {"sums": make_sums, "letters": make_letters, "facts": make_facts, "long_sums": make_long_sums}
