"""Spelling: counting a letter in a word with the tool, and writing a word letter by letter. Generated, not loaded."""

from __future__ import annotations

import random

from jaxchat.data.synthetic.questions import (
    Purpose,
    answer_letters,
    ask_letters,
    ask_spelling,
    draw_letter,
    draw_word,
    purpose_of,
    spell,
)
from jaxchat.data.text.reading import Findings
from jaxchat.errors import UserError
from jaxchat.storage import AnyPath
from jaxchat.tasks.answers import score_value
from jaxchat.tasks.base import Conversation, Split, Task, question_and_answer

SIZES = {"train": 100_000, "val": 500, "test": 500}


class Spelling(Task):
    """Questions about the spelling of words; item i depends on the split and i alone.

    A word belongs to one split only, so that the words of the test are new. The words are those of the synthetic
    corpus, half of them made of syllables, or `words` instead.

    An answer is right (1, otherwise 0) if the last number that it states is the count, or if it has the word spelled
    `c-a-t`, as a whole. See `answers.score_value`.
    """

    name = "spelling"

    def __init__(self, split: Split, words: tuple[str, ...] = (), limit: int | None = None):
        self.split = split
        purposes: dict[Split, Purpose] = {"train": "train", "val": "rl", "test": "test"}
        self.purpose: Purpose = purposes[split]
        self.words = tuple(word for word in words if purpose_of(word) == self.purpose)
        if words and not self.words:
            raise UserError(
                f"spelling: none of the {len(words)} words belongs to the {split} split; give a few hundred words"
            )
        self.size = SIZES[split] if limit is None else min(limit, SIZES[split])

    def __len__(self) -> int:
        return self.size

    def item(self, index: int) -> Conversation:
        rng = random.Random(f"spelling {self.split} {index}")
        word = rng.choice(self.words) if self.words else draw_word(rng, self.purpose)
        if index % 2:
            return question_and_answer(ask_spelling(word, rng), f"{spell(word)}", answer=spell(word), source=self.name)
        letter = draw_letter(rng, word)
        question, answer = ask_letters(word, letter, rng), answer_letters(word, letter, rng)
        return question_and_answer(question, answer, answer=str(word.count(letter)), source=self.name)

    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        return score_value(conversation["answer"], (), completion, cut=cut)


def load_spelling(split: Split, data_dir: AnyPath, limit: int | None, findings: Findings) -> Spelling:
    """Uses the words of `eval/words.txt` (one a line, lower case), if the data folder has that file."""
    path = data_dir / "eval" / "words.txt"
    try:
        words = path.read_text(encoding="utf-8").split() if path.is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert or remove it") from None
    return Spelling(split, tuple(word for word in words if word.isalpha()), limit)
