"""Chat in the terminal or in a pipe: questions are read, and answers printed as they are generated."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from jaxchat import stopping
from jaxchat.errors import UserError, check
from jaxchat.infer.quantized import KVCache, Weights
from jaxchat.infer.trained import load_model
from jaxchat.serve.commands import HELP, Commands, completions, split
from jaxchat.serve.conversation import Conversation
from jaxchat.serve.line_editor import LineEditor
from jaxchat.serve.settings import Settings
from jaxchat.serve.standard_input import piped_message, typed
from jaxchat.serve.writer import Writer
from jaxchat.stopping import Cause
from jaxchat.tools.choice import choose_tool
from jaxchat.verbatim import Style, one_line, write

PATIENCE = 3.0  # seconds without a word of the answer
WAITING = "(compiling what the first answer needs; it is kept for the next start)"


def chat(
    run_dir: str,
    stage: str | None,
    prompt: str | None,
    *,
    step: str | None = None,
    settings: Settings,
    system: str = "",
    tools: str = "calculator",
    uncontained: bool = False,
    history: Path | None = None,
    weights: Weights = "auto",
    kv_cache: KVCache = "auto",
) -> int:
    """Answers one message, or whatever a person types until it ends. Returns the exit code.

    The message is `prompt`. Without one, or if it is `-`, standard input is the message, all of its lines; without one
    on a terminal, a person types. Only what the model writes, and a line break after it, goes to standard output;
    remarks go to standard error.

    Args:
      settings: checked values, as `serve.settings` parses them.
      system: a system prompt; empty for none.
      tools, uncontained: as for `choose_tool`.
      history: the file for what is typed; None to keep nothing.
      weights, kv_cache: as for `Engine`.

    Raises:
      UserError: no such run, stage or step, a tool that would run programs which this machine cannot contain, or a
        message that cannot be read or answered.
    """
    check(prompt is None or bool(prompt.strip()), "the prompt is empty; give --prompt some text")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    interactive = prompt is None and sys.stdin is not None and sys.stdin.isatty()
    piped = prompt == "-" or (prompt is None and not interactive)
    # A program that the model has written does not go on once its answer is stopped.
    tool = choose_tool(tools, uncontained=uncontained, cancelled=lambda: stopping.asked() or not conversation.answering)
    if sys.stderr.isatty():
        _note(f"loading {run_dir}")
    model = load_model(run_dir, stage, step)
    base = model.stage == "pretrain"
    # The cache has room for another answer beside the last one, whose beginning both share.
    room = {"rows": 1, "cache_tokens": 2 * model.model.sequence_len}
    conversation = Conversation(
        model.engine(weights=weights, kv_cache=kv_cache, **room), settings, base=base, tool=tool.answer
    )
    if system:
        conversation.instruct(system)
    if tool.says and not base:
        _note(tool.says)
    message = piped_message(sys.stdin) if piped else prompt
    if message is not None:
        return 130 if reply(conversation, message, sys.stdout, sys.stderr) else 0
    what = "a base model, which continues your text" if base else "/help lists the commands"
    _note(f"{run_dir} · {model.stage} · {what}")
    commands = Commands(conversation, f"tools {'none' if base else tools}")
    for line in typed(LineEditor(history, completions)):
        try:
            if line.block or not line.text.startswith("/"):
                reply(conversation, line.text, sys.stdout, sys.stderr)
            elif (name := split(line.text)[0]) in ("/quit", "/exit"):
                break
            elif name == "/help":
                write(HELP, sys.stderr, style="dim", end="\n")
            elif name == "/retry":
                reply(conversation, None, sys.stdout, sys.stderr)
            else:
                _note(commands.run(line.text))
        except UserError as error:
            _note(f"error: {error}", style="red")
    return 0


def _note(text: str, style: Style = "dim") -> None:
    write(one_line(text), sys.stderr, style=style, end="\n")


def reply(conversation: Conversation, text: str | None, out: TextIO, notes: TextIO | None) -> bool:
    """Asks, prints the answer as it is generated, and remarks on `notes` if it was cut. Returns whether it was stopped.

    Args:
      text: the question; None for another answer to the last one.

    Raises:
      UserError: the text does not fit into the context, or there is no last question.
    """
    writer = Writer(conversation.engine.tokenizer)
    with stopping.deferred(alone=False, notice="") as request:  # no computation breaks off in the middle
        answer = conversation.retry() if text is None else conversation.ask(text)
        with contextlib.closing(answer.chunks), _explained_wait(notes) as waiting:
            for tokens in answer.chunks:
                if tokens:
                    waiting.cancel()
                show(writer.write(tokens), out)
                if request.cause:
                    break
        show([*writer.close(), ("\n", "")], out)
        if answer.forgets:
            write("(the context is full: the oldest turns are now being forgotten)", notes, style="dim", end="\n")
        stopped = request.cause is Cause.CTRL_C
        if stopped:
            request.cause = None  # that was all that was asked for; anything else ends the chat
            write("(stopped)", notes, style="dim", end="\n")
        elif answer.cut:
            write(f"(cut: {answer.cut})", notes, style="dim", end="\n")
    return stopped


@contextlib.contextmanager
def _explained_wait(notes: TextIO | None) -> Iterator[threading.Timer]:
    """A timer that tells a person why nothing comes, unless it is cancelled before."""
    timer = threading.Timer(PATIENCE, write, [WAITING, notes], {"style": "dim", "end": "\n"})
    if notes is not None and notes.isatty():
        timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


def show(pieces: Iterable[tuple[str, Style]], out: TextIO) -> None:
    """Writes pieces of text and their styles."""
    for _, run in itertools.groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1]):
        texts, styles = zip(*run, strict=True)
        write("".join(texts), out, style=styles[0])
