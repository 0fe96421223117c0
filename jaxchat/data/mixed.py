"""Rows of text among rows of conversations, so that what pretraining taught is kept while the model learns to converse.

Text and conversations have their rows at fixed places of the global batch, the same for any number of processes. Every
process takes the whole batch of both and keeps its own rows: to plan conversations it needs all of them in any case.
"""

from __future__ import annotations

from typing import Any

import grain.python as grain
import numpy as np
from jaxtyping import Bool


def text_places(text_rows: int, rows: int) -> Bool[np.ndarray, " rows"]:
    """Which of a batch's rows are text: `text_rows` of them, spread evenly."""
    before = np.arange(rows + 1) * text_rows // rows
    return np.diff(before).astype(bool)


class MixedBatches:
    """One process's share of batches of text and conversations.

    Args:
      chats, text: whole global batches of each, as iterators with `get_state` and `set_state`.
      is_text: which rows of a global batch are text.
      rows: rows of this process's batches.
      process_index: which part of a global batch's rows this process gets.
    """

    def __init__(
        self,
        chats: grain.DatasetIterator,
        text: grain.DatasetIterator,
        is_text: Bool[np.ndarray, " rows"],
        rows: int,
        process_index: int,
    ):
        self._chats, self._text, self._is_text = chats, text, is_text
        self._own = slice(process_index * rows, (process_index + 1) * rows)

    def __iter__(self) -> MixedBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        chats, text = next(self._chats), next(self._text)
        return {name: self._laid_among(chats[name], text[name]) for name in chats}

    def _laid_among(self, chats: np.ndarray, text: np.ndarray) -> np.ndarray:
        batch = np.empty((len(self._is_text), chats.shape[1]), chats.dtype)
        batch[self._is_text], batch[~self._is_text] = text, chats
        return batch[self._own]

    def get_state(self) -> dict[str, Any]:
        return {**self._chats.get_state(), "text": self._text.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position. Raises `UserError` if it was saved for other text or conversations."""
        self._chats.set_state(state)
        self._text.set_state(state["text"])
