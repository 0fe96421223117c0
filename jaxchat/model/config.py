"""What the GPT is built from: the user's settings, and what follows from the run's tokenizer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from jaxchat.config import ModelConfig

VOCAB_MULTIPLE = 128
BIGRAM_ROWS = 5  # times the vocabulary, as in modded-nanogpt


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """The settings of `ModelConfig`, the size of the vocabulary, and the token that begins a document.

    The model pads the vocabulary to a multiple of 128. With a `border_token`, attention over whole rows does not reach
    back beyond the last such token. `reach` is the share of its windows that the model has in a phase of pretraining.
    """

    vocab_size: int = 32_768
    border_token: int | None = None
    reach: float = 1.0

    @classmethod
    def of(cls, settings: ModelConfig, vocab_size: int, border_token: int | None = None) -> GPTConfig:
        """The model that `settings` describe, for a tokenizer of `vocab_size` ids."""
        fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ModelConfig)}
        return cls(**fields, vocab_size=vocab_size, border_token=border_token)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """As those of `ModelConfig`, each of them, or the whole context, times `reach`."""
        if self.reach == 1:
            return super().windows
        whole = (self.sequence_len if window is None else window for window in super().windows)
        return tuple(math.ceil(self.reach * window) for window in whole)

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def bigram_rows(self) -> int:
        """Rows of the table of bigrams, which pairs of tokens share by chance."""
        return BIGRAM_ROWS * self.padded_vocab_size
