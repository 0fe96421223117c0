"""The data and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxchat.config.ranges import Range, Section, UserPath

NUM_BYTES = 256
MIN_VOCAB = NUM_BYTES + 9  # the special tokens of conversations


@dataclass(frozen=True)
class TokenizerConfig(Section):
    """The tokenizer: trained on the experiment's text, or brought by the user."""

    section = "tokenizer"

    vocab_size: Annotated[int, Range(at_least=MIN_VOCAB, at_most=1 << 20)] = 32768
    """Number of tokens, with the 256 bytes and the special tokens."""
    max_chars: Annotated[int, Range(at_least=1, at_most=10**12)] = 2_000_000_000
    """Characters of text to train on, at most."""
    path: Annotated[str | None, UserPath()] = None
    """A trained tokenizer to use instead: a tokenizer.json, a folder with one, or a .tiktoken file. None: train one."""
    backend: Literal["rust", "huggingface"] = "rust"
    """Library that trains the tokenizer: jaxchat's own in Rust, or Hugging Face's tokenizers."""


@dataclass(frozen=True)
class DataConfig(Section):
    """Text and conversations: the user's folder, downloads, or a synthetic corpus."""

    section = "data"

    path: Annotated[str | None, UserPath()] = None
    """Folder with the user's data, the same as --data. None: data/ with downloads, else the synthetic corpus."""
    download: tuple[str, ...] = ()
    """Data sets of "jaxchat data list" to download during training, pretraining text as NAME:SHARDS: fineweb-edu, or
    climbmix, which models learn faster from (CC BY-NC 4.0: not for commercial use). Text of your own in the data
    folder takes their place."""
    val_shard: str | None = None
    """Name of the text file that is kept for validation. None: the one that the manifest names, else what is called
    val, dev or test, else the last."""
    generate: bool = False
    """Whether to generate a synthetic corpus where there is no data folder."""
    synthetic_documents: Annotated[int, Range(at_least=100, at_most=10**8)] = 40_000
    """Documents of the synthetic corpus."""
    synthetic_conversations: Annotated[int, Range(at_least=100, at_most=10**8)] = 40_000
    """Conversations of the synthetic corpus; used with a data folder without conversations too."""
    shuffle: bool = False
    """Whether each epoch takes the blocks of the text in another order."""
    packing: Literal["best-fit", "concat"] = "best-fit"
    """How documents fill the rows of pretraining: each row begins with a document and holds whole ones that fit
    (best-fit), or documents are laid end to end and cut (concat)."""
    mask_borders: Literal["none", "loss", "attention", "both"] = "none"
    """What stops at the border of two documents in a row: the loss does not predict the next document's beginning,
    attention does not see other documents, or both."""
    lanes: Annotated[int, Range(at_least=1, at_most=1 << 16)] = 1
    """Parts of the text that are read independently, for training on many hosts: each process reads only its lanes.
    Divides the rows of pretraining's batch."""
    identity: str | None = None
    """Who the model is, as the text of the file of --identity, which sets it. None: jaxchat, for the task identity."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What damaged or too long text does, and a conversation or question that cannot be read: stop the run (refuse), or
    be reported, counted and left out (skip)."""

    @property
    def folder(self) -> str | None:
        """Where the data is, or is downloaded to; None where it is generated."""
        return "data" if self.path is None and self.download else self.path
