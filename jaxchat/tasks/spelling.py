"""Spelling: counting a letter in a word through the tool, and writing a word letter by letter. Made, not loaded."""

from __future__ import annotations

import random
from pathlib import Path

from jaxchat.data.synthetic.questions import (
    answer_letters,
    ask_letters,
    ask_spelling,
    draw_letter,
    draw_word,
    spell,
    split_of,
)
from jaxchat.errors import UserError
from jaxchat.tasks.base import Conversation, Split, Task, conversation
from jaxchat.tasks.checkable import score_value

SIZES = {"train": 100_000, "val": 500, "test": 500}


class Spelling(Task):
    """Item i follows from the split and i alone. A word is on one side of the split only, so test words are new.

    The words are those of the generated corpus, half of them made of syllables; with `words`, these instead.
    """

    name = "spelling"

    def __init__(self, split: Split, words: tuple[str, ...] = (), limit: int | None = None):
        self.split = split
        self.side = {"train": "train", "val": "rl", "test": "test"}[split]
        self.words = tuple(word for word in words if split_of(word) == self.side)
        if words and not self.words:
            raise UserError(
                f"spelling: none of the {len(words)} words falls to the {split} split; give some hundred words"
            )
        self.size = SIZES[split] if limit is None else min(limit, SIZES[split])

    def __len__(self) -> int:
        return self.size

    def item(self, index: int) -> Conversation:
        rng = random.Random(f"spelling {self.split} {index}")
        word = rng.choice(self.words) if self.words else draw_word(rng, self.side)
        if index % 2:
            return conversation(ask_spelling(word, rng), f"{spell(word)}", answer=spell(word), source=self.name)
        letter = draw_letter(rng, word)
        question, answer = ask_letters(word, letter, rng), answer_letters(word, letter, rng)
        return conversation(question, answer, answer=str(word.count(letter)), source=self.name)

    def score(self, conversation: Conversation, completion: str) -> float:
        return score_value(conversation["answer"], (), completion)


def load_spelling(split: Split, data_dir: Path, limit: int | None) -> Spelling:
    """With the words of `eval/words.txt` (one a line, lower case), if the data folder has it."""
    path = data_dir / "eval" / "words.txt"
    words = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return Spelling(split, tuple(word for word in words if word.isalpha()), limit)
