"""The commands at the prompt, such as `/save FILE`: what each does to the conversation, and what is said about it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxchat.config import shown
from jaxchat.errors import UserError, check, closest
from jaxchat.serve.conversation import Conversation
from jaxchat.serve.line_editor import files_like
from jaxchat.serve.saved import read_messages, write_messages
from jaxchat.serve.settings import NONE, SETTINGS, described, find_setting

HELP = """\
/retry            another answer to the last question
/undo             take back the last question and its answer
/clear            forget the conversation
/system TEXT      what the model is told first; /system none removes it, /system shows it
/set NAME VALUE   change a setting, as in /set temperature 0.3
/settings         show all settings
/save FILE        write the conversation to a file; /save! FILE replaces one that is there
/load FILE        go on with the conversation in a file
/help             show this list
/quit             leave (or press Ctrl-D)
A message of several lines: end a line with \\, or begin and end the message with \"""; pasted lines are one message.
Ctrl-C stops an answer; pressed twice, it leaves."""


class Commands:
    """The commands on a conversation; `/quit`, `/help` and `/retry` are the terminal's own.

    Args:
      tools: a line on what answers the model's calls.
    """

    def __init__(self, conversation: Conversation, tools: str):
        self._conversation, self._tools = conversation, tools
        self._own: Path | None = None  # the file of this conversation, which /save may replace

    def run(self, line: str) -> str:
        """Carries out a command, and returns the line to say about it.

        Raises:
          UserError: there is no such command, or it cannot be carried out; then nothing has changed.
        """
        name, argument = split(line)
        command = self._commands().get(name)
        if command is None:
            raise UserError(f"unknown command {name[:40]}{closest(name, NAMES)} /help lists the commands")
        if name in ("/clear", "/undo", "/settings"):
            check(not argument, f'{name} takes nothing after it; a message that begins with / goes between """')
        return command(argument)

    def _commands(self) -> dict[str, Callable[[str], str]]:
        return {
            "/undo": self._undo,
            "/clear": self._clear,
            "/system": self._system,
            "/set": self._set,
            "/settings": self._settings,
            "/save": self._save,
            "/save!": lambda argument: self._save(argument, replace=True),
            "/load": self._load,
        }

    def _undo(self, _: str) -> str:
        return f"taken back: {shown(self._conversation.undo())}"

    def _clear(self, _: str) -> str:
        self._conversation.clear()
        self._own = None
        return "forgotten" + ("; the system prompt stays" if self._conversation.system else "")

    def _system(self, argument: str) -> str:
        if not argument:
            return f"system prompt: {self._conversation.system or NONE}"
        self._conversation.instruct("" if argument == NONE else argument)
        return "no system prompt from now on" if argument == NONE else "system prompt set, from the next answer on"

    def _settings(self, _: str) -> str:
        return f"{described(self._conversation.settings)} · system {self._conversation.system or NONE} · {self._tools}"

    def _set(self, argument: str) -> str:
        words = argument.replace("=", " ", 1).split()
        check(len(words) == 2, f"write /set NAME VALUE, as in /set temperature 0.3; names: {', '.join(SETTINGS)}")
        setting = find_setting(words[0])
        try:
            value = setting.parse(words[1])
        except UserError as error:
            raise UserError(f"{setting.name} {error}") from None
        self._conversation.settings = dataclasses.replace(self._conversation.settings, **{setting.field: value})
        return f"{setting.name} {words[1]}, from the next answer on"

    def _save(self, argument: str, *, replace: bool = False) -> str:
        path = self._own if self._own is not None and not argument else _path(argument, "/save")
        messages = self._conversation.messages()
        write_messages(path, messages, replace=replace or path == self._own)
        self._own = path
        return f"{_counted(len(messages))} saved to {path}"

    def _load(self, argument: str) -> str:
        path = _path(argument, "/load")
        messages = read_messages(path)
        self._conversation.resume(messages)
        self._own = path
        unanswered = self._conversation.unanswered
        more = "" if unanswered is None else f"; the last one has no answer yet, /retry asks {shown(unanswered)}"
        return f"{_counted(len(messages))} loaded from {path}{more}"


NAMES = ("/retry", "/undo", "/clear", "/system", "/set", "/settings", "/save", "/save!", "/load", "/help", "/quit")


def split(line: str) -> tuple[str, str]:
    """The name of a command, and what stands after it."""
    name, *rest = line.split(maxsplit=1)
    return name, "".join(rest).strip()


def completions(before: str, word: str) -> Sequence[str]:
    """What `word` may become at the prompt after the text `before`."""
    match before.split():
        case []:
            return [f"{name} " for name in NAMES if word.startswith("/") and name.startswith(word)]
        case ["/set"]:
            return [f"{name} " for name in SETTINGS if name.startswith(word)]
        case ["/save" | "/save!" | "/load", *_]:
            return files_like(word)
    return ()


def _counted(messages: int) -> str:
    return f"{messages} message{'s' * (messages != 1)}"


def _path(argument: str, command: str) -> Path:
    check(bool(argument), f"{command} needs the name of a file, as in {command} chat.json")
    return Path(os.path.abspath(os.path.expanduser(argument)))
