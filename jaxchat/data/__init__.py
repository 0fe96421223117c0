"""Text and conversations to batches of token ids."""

from typing import Literal

IGNORE = -1  # the target at a position that is not trained on
Trained = Literal["assistant", "all"]  # which tokens of a conversation are trained on
