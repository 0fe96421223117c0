"""Text and conversations to batches of token ids."""

IGNORE = -1  # the target at a position that is not trained on
