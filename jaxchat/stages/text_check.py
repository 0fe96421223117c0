"""The text of a run before the first stage: says what is read as what, and refuses what pretraining would refuse."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from jaxchat.config import Experiment
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.text.describe import check_fills_row, look_through, text_lines
from jaxchat.data.text.folder import TextSplits, find_text
from jaxchat.tokenizer import BaseTokenizer

SLOW = 3.0  # seconds after which the user is told how long it took
Say = Callable[[str], None]


def check_text(experiment: Experiment, text: TextSplits, say: Say) -> None:
    """Says which text is read as what, and looks through it.

    Raises:
      UserError: as `look_through`.
    """
    began = time.perf_counter()
    for line in text_lines(text):
        say(f"data      {line}")
    found = look_through(text, sequence_len=experiment.model.sequence_len, lanes=experiment.data.lanes)
    for line in [] if found is None else found.lines():
        say(f"data      {line}")
    if (seconds := time.perf_counter() - began) >= SLOW:
        say(f"data      the text checked in {seconds:.0f} s")


def check_tokens(experiment: Experiment, text: TextSplits, tokenizer: BaseTokenizer) -> None:
    """Checks with the run's tokenizer that the text fills a row.

    Raises:
      UserError: as `check_fills_row`.
    """

    def count_tokens(documents: Sequence[str]) -> int:
        return len(tokenizer.encode_to_numpy(list(documents))[0])

    if text.train.wait is None and experiment.data.lanes == 1:
        check_fills_row(text, experiment.model.sequence_len, count_tokens)


def text_that_is_there(experiment: Experiment, say: Say) -> TextSplits | None:
    """The experiment's text without a run; None if it is still to be downloaded or generated.

    Raises:
      UserError: as `find_text`.
    """
    data = experiment.data
    if data.folder is None or any(request.is_text for request in parse_requests(data.download)):
        return None
    return find_text(data.folder, data.val_shard, on_bad=data.on_bad, say=lambda line: say(f"data      {line}"))
