"""Chat in the terminal or in a pipe: questions are read, and answers printed as they are generated."""

from __future__ import annotations

import contextlib
import itertools
import math
import secrets
import sys
from collections.abc import Iterable
from typing import TextIO

from jaxchat import stopping
from jaxchat.errors import UserError, check
from jaxchat.infer.trained import load_model
from jaxchat.serve.conversation import Conversation
from jaxchat.serve.standard_input import piped_message, typed_lines
from jaxchat.serve.writer import Writer
from jaxchat.stopping import Cause
from jaxchat.verbatim import Style, one_line, write

HELP = """\
/clear   forget the conversation
/quit    leave (or press Ctrl-D)
/help    show this list
Ctrl-C stops an answer; pressed twice, it leaves."""


def chat(
    run_dir: str,
    stage: str | None,
    prompt: str | None,
    *,
    step: str | None,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    max_tokens: int,
) -> int:
    """Answers one message, or whatever a person types until it ends. Returns the exit code.

    The message is `prompt`. Without one, or if it is `-`, standard input is the message, all of its lines; without one
    on a terminal, each line is a question. Only what the model writes, and a line break after it, goes to standard
    output; remarks go to standard error.

    Raises:
      UserError: no such run, stage or step, an option out of its range, or a message that cannot be read or answered.
    """
    finite = math.isfinite(temperature)
    check(finite and temperature >= 0, f"--temperature is {temperature}; it must be 0 (the most likely token) or more")
    check(top_k is None or top_k >= 1, f"--top-k is {top_k}; it must be at least 1")
    check(max_tokens >= 1, f"--max-tokens is {max_tokens}; it must be at least 1")
    check(prompt is None or bool(prompt.strip()), "the prompt is empty; give --prompt some text")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    interactive = prompt is None and sys.stdin is not None and sys.stdin.isatty()
    piped = prompt == "-" or (prompt is None and not interactive)
    if sys.stderr.isatty():
        _note(f"loading {run_dir}")
    model = load_model(run_dir, stage, step)
    base = model.stage == "pretrain"
    conversation = Conversation(
        model.engine(),
        base=base,
        temperature=temperature,
        top_k=top_k,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        max_tokens=max_tokens,
    )
    message = piped_message(sys.stdin) if piped else prompt
    if message is not None:
        return 130 if reply(conversation, message, sys.stdout, sys.stderr) else 0
    what = "a base model, which continues your text" if base else "/help lists the commands"
    _note(f"{run_dir} · {model.stage} · {what}")
    for line in typed_lines():
        if not line.startswith("/"):
            try:
                reply(conversation, line, sys.stdout, sys.stderr)
            except UserError as error:
                _note(f"error: {error}", style="")
        elif line in ("/quit", "/exit"):
            break
        elif line == "/clear":
            conversation.turns.clear()
            _note("forgotten")
        else:
            if line != "/help":
                _note(f"unknown command {line}")
            write(HELP, sys.stderr, style="dim", end="\n")
    return 0


def _note(text: str, style: Style = "dim") -> None:
    write(one_line(text), sys.stderr, style=style, end="\n")


def reply(conversation: Conversation, text: str, out: TextIO, notes: TextIO | None) -> bool:
    """Asks, prints the answer as it is generated, and remarks on `notes` if it was cut. Returns whether it was stopped.

    Raises:
      UserError: the text does not fit into the context.
    """
    writer = Writer(conversation.engine.tokenizer)
    with stopping.deferred(alone=False, notice="") as request:  # no computation breaks off in the middle
        answer = conversation.ask(text)
        with contextlib.closing(answer.chunks):
            for tokens in answer.chunks:
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


def show(pieces: Iterable[tuple[str, Style]], out: TextIO) -> None:
    """Writes pieces of text and their styles."""
    for _, run in itertools.groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1]):
        texts, styles = zip(*run, strict=True)
        write("".join(texts), out, style=styles[0])
