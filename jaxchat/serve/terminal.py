"""Chat in the terminal: the conversation is kept as tokens, and answers are printed as they are generated."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import math
import secrets
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console

from jaxchat.errors import UserError, check
from jaxchat.infer.engine import Engine
from jaxchat.infer.trained import load_model
from jaxchat.tokenizer import BaseTokenizer

HELP = """\
/clear   forget the conversation
/quit    leave (or press Ctrl-D)
/help    show this list
Ctrl-C stops an answer."""
# Control characters written by a model must not reach the terminal, except line breaks and tabs.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})

Styled = tuple[str, str]  # a piece of text, and rich's style for it


@dataclass(frozen=True)
class Turn:
    """A question and its answer as token ids, with special tokens."""

    question: list[int]
    answer: list[int]


class Conversation:
    """The turns so far, as the prompt of the next one; when the context is full, the oldest turns are forgotten.

    A base model (`base`) has no turns: it continues each text on its own.
    """

    def __init__(
        self, engine: Engine, *, base: bool, temperature: float, top_k: int | None, seed: int, max_tokens: int
    ):
        self.engine, self.base, self.max_tokens = engine, base, max_tokens
        self.sampling = {"temperature": temperature, "top_k": top_k}
        self.seed = seed
        self.turns: list[Turn] = []
        self.forgets = False  # whether turns have been forgotten

    def ask(self, text: str) -> tuple[bool, Generator[list[int], None, None]]:
        """Whether turns were forgotten now for the first time, and the answer's tokens in chunks.

        The turn is added when the chunks are exhausted or closed.

        Raises:
          UserError: the text alone leaves no room in the context.
        """
        tokenizer, context = self.engine.tokenizer, self.engine.model_config.sequence_len
        bos = [tokenizer.bos_token_id]
        if self.base:
            question = tokenizer.encode(text)
        else:
            question = tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})[1:]
        check(
            len(bos) + len(question) < context,
            f"this message has {len(question)} tokens, more than the model's context of {context}; shorten it",
        )
        room = min(self.max_tokens, context // 4)
        first, turns = not self.forgets, len(self.turns)
        while self.turns and len(self._prompt(bos, question)) + room > context:
            del self.turns[0]
        self.forgets |= len(self.turns) < turns
        return first and self.forgets, self._answer(self._prompt(bos, question), question)

    def _prompt(self, bos: list[int], question: list[int]) -> list[int]:
        return bos + [token for turn in self.turns for token in turn.question + turn.answer] + question

    def _answer(self, prompt: list[int], question: list[int]) -> Generator[list[int], None, None]:
        stream = self.engine.stream(
            [prompt], max_new_tokens=self.max_tokens, **self.sampling, seed=self.seed, tools=not self.base
        )
        self.seed += 1
        answer: list[int] = []
        try:
            for chunk in stream:
                tokens = [token for _, token, _ in chunk if token not in self.engine.stops]
                answer.extend(tokens)
                yield tokens
        finally:
            if answer and not self.base:
                end = self.engine.tokenizer.encode_special("<|assistant_end|>")
                self.turns.append(Turn(question, [*answer, end]))


class Writer:
    """Turns tokens into styled text: whole characters only, tool calls dimmed as `⟨34 + 58 → 92⟩`."""

    def __init__(self, tokenizer: BaseTokenizer):
        self._tokenizer = tokenizer
        marks = {
            "<|python_start|>": ("⟨", True),
            "<|python_end|>": ("", True),
            "<|output_start|>": (" → ", True),
            "<|output_end|>": ("⟩ ", False),
        }
        self._marks = {tokenizer.encode_special(name): mark for name, mark in marks.items()}
        self._special = set(tokenizer.special_tokens.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_call = False

    def write(self, tokens: Iterable[int]) -> Iterator[Styled]:
        """The text that these tokens complete."""
        for token in tokens:
            if token not in self._special:
                yield self._styled(self._decoder.decode(self._tokenizer.id_to_bytes(token)))
                continue
            yield self._flush()
            text, in_call = self._marks.get(token, ("", self._in_call))
            yield text, "dim"
            self._in_call = in_call

    def close(self) -> Iterator[Styled]:
        """The text still held back at the end of an answer."""
        yield self._flush()
        if self._in_call:
            yield "⟩", "dim"

    def _flush(self) -> Styled:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return self._styled(text)

    def _styled(self, text: str) -> Styled:
        return text.translate(_CONTROLS), "dim" if self._in_call else ""


class _Interrupt:
    """A context in which the first Ctrl-C sets `pressed`, so that no computation breaks off in the middle.

    A second Ctrl-C interrupts as usual.
    """

    pressed = False

    def __enter__(self):
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number, frame):
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


@contextlib.contextmanager
def _ctrl_c_kills() -> Iterator[None]:
    """Ctrl-C kills the process while a model is loaded: Orbax's threads would wait forever for an interrupted one."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
    """Answers `prompt` if there is one, otherwise questions from standard input until it ends. Returns the exit code.

    Raises:
      UserError: no such run, stage or step, or an option out of its range.
    """
    finite = math.isfinite(temperature)
    check(finite and temperature >= 0, f"--temperature is {temperature}; it must be 0 (the most likely token) or more")
    check(top_k is None or top_k >= 1, f"--top-k is {top_k}; it must be at least 1")
    check(max_tokens >= 1, f"--max-tokens is {max_tokens}; it must be at least 1")
    check(prompt is None or bool(prompt.strip()), "the prompt is empty; give --prompt some text")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    out, notes = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    if notes.is_terminal:
        notes.print(f"loading {run_dir}", style="dim", markup=False)
    with _ctrl_c_kills():
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
    if prompt is not None:
        return 130 if _reply(conversation, prompt, out, notes) else 0
    if sys.stdin.isatty():
        what = "a base model, which continues your text" if base else "/help lists the commands"
        notes.print(f"{run_dir} · {model.stage} · {what}", style="dim", markup=False)
    for line in _lines():
        if not line.startswith("/"):
            try:
                _reply(conversation, line, out, notes)
            except UserError as error:
                notes.print(f"error: {error}", markup=False)
            except KeyboardInterrupt:  # pressed twice
                notes.print()
        elif line in ("/quit", "/exit"):
            break
        elif line == "/clear":
            conversation.turns.clear()
            notes.print("forgotten", style="dim")
        else:
            notes.print(HELP if line == "/help" else f"unknown command {line}\n{HELP}", style="dim", markup=False)
    return 0


def _lines() -> Iterator[str]:
    """The lines that are not blank, until Ctrl-D or the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(press Ctrl-D or type /quit to leave)")
            continue
        if line:
            yield line


def _reply(conversation: Conversation, text: str, out: Console, notes: Console) -> bool:
    """Asks, and prints the answer as it is generated. Returns whether it was interrupted."""
    writer = Writer(conversation.engine.tokenizer)
    with _Interrupt() as interrupt:
        forgets, chunks = conversation.ask(text)
        if forgets:
            notes.print("(the context is full: the oldest turns are now being forgotten)", style="dim")
        with contextlib.closing(chunks):
            for tokens in chunks:
                _print(out, writer.write(tokens))
                if interrupt.pressed:
                    break
        _print(out, writer.close())
        out.print(" (stopped)" if interrupt.pressed else "", style="dim", markup=False)
    return interrupt.pressed


def _print(out: Console, pieces: Iterable[Styled]) -> None:
    for style, run in itertools.groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1]):
        out.print("".join(text for text, _ in run), style=style, end="", markup=False)
    out.file.flush()
