"""The amount of an experiment's text: counted where it is there, otherwise known from where it will come from."""

from __future__ import annotations

import random
from collections.abc import Callable

from jaxchat.config import Experiment
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.synthetic.stories import write_document
from jaxchat.data.synthetic.world import build_world
from jaxchat.infer.trained import load_tokenizer_of
from jaxchat.planning.text_amount import TextAmount, amount_of, measure_text
from jaxchat.runs.directory import RunDirectory
from jaxchat.stages.text_check import text_that_is_there
from jaxchat.tokenizer import BaseTokenizer, load_tokenizer

GENERATED_SAMPLE = 1000  # documents
# A shard of the catalogue's texts, and how long tokens of English web pages are: those of the vocabularies that jaxchat
# trains.
SHARD_BYTES, SHARD_DOCUMENTS = 250_000_000, 53_000
ENGLISH = {512: 2.05, 1024: 2.58, 2048: 3.07, 4096: 3.53, 8192: 3.95, 16384: 4.33, 32768: 4.72, 65536: 4.95}
Say = Callable[[str], None]


def find_amount(experiment: Experiment, begun: RunDirectory | None, say: Say) -> TextAmount | None:
    """How much text the experiment trains on; None if it has none.

    Tokens are those of the run's tokenizer or the user's, else of one that would be trained: of the experiment's size,
    or of several sizes where it is still to be chosen.

    Raises:
      UserError: as `find_text`, `measure_text`, `load_tokenizer` and `load_tokenizer_of`.
    """
    data = experiment.data
    open_choice = experiment.sizes == "auto" and begun is None
    size = None if open_choice else experiment.tokenizer.vocab_size
    tokenizer = _known_tokenizer(experiment, begun)
    text = text_that_is_there(experiment, lambda line: None)
    if text is not None:
        return measure_text(text.train, vocab_size=size, tokenizer=tokenizer, say=say)
    shards = sum(request.shards for request in parse_requests(data.download) if request.is_text)
    if shards:
        return TextAmount(
            SHARD_BYTES * shards, SHARD_DOCUMENTS * shards, False, ENGLISH, SHARD_BYTES // SHARD_DOCUMENTS
        )
    if not data.generate:
        return None
    world, draw = build_world(experiment.seed), random.Random(f"pretrain {experiment.seed}")
    sample = [write_document(world, draw) for _ in range(GENERATED_SAMPLE)]
    lengths = [len(text.encode()) for text in sample]
    share = GENERATED_SAMPLE / data.synthetic_documents
    return amount_of(lengths, sample, share, vocab_size=size, tokenizer=tokenizer)


def _known_tokenizer(experiment: Experiment, begun: RunDirectory | None) -> BaseTokenizer | None:
    if experiment.tokenizer.path is not None:
        return load_tokenizer(experiment.tokenizer.path)
    if begun is None or not begun.finished("tokenizer"):
        return None
    return load_tokenizer_of(begun)
