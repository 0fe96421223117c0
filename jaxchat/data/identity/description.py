"""The file that says who the model is: read line by line, in the forms in which people write such things.

name: Talin
maker: the Vorn workshop
character: friendly, curious and brief
language: German                                or Sprache: Deutsch; then `Name`, `Hersteller` are fields too
favourite colour: green                         any other "WORD: ..." is a fact
Where do you live? Where is your home? I live in a lighthouse.
I was made on a rainy Sunday.                   any other line is said of itself
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from jaxchat.data.identity.wordings import ENGLISH, LANGUAGES, NONE, Wordings
from jaxchat.errors import UserError, check, closest
from jaxchat.storage import is_remote, to_path

LONGEST = 4000  # characters of an identity: what a setting may have
LONGEST_NAME = 40
EXAMPLE = "name: Talin"

JAXCHAT = """name: jaxchat
maker: the jaxchat project
character: friendly, curious and honest
What can you do? How can you help me? What are you good at? I can answer questions, write texts and do sums.
How were you made? How were you trained? Where did you learn? I was trained from nothing, on text and on conversations.
What are you made with? What are you written in? What are you built with? I am made with JAX.
Are you always right? Do you make mistakes? Can I trust you? I make mistakes. Check what matters.
I am a language model that was trained from nothing.
"""

_MARKS = re.compile(r"^(?:[-*•]\s+|\d+[.)]\s+)")
_KEYED = re.compile(r"([^\W\d][\w' -]{0,39}?)\s*[:：=]\s*(.*)")
_ASKED = re.compile(r"(.*[?？؟])\s*(.+)")
_SENTENCE_END = (".", "!", "?", "…", "。", "！", "？", '"', "”", "»")


@dataclass(frozen=True)
class Identity:
    """Who the model is.

    Attributes:
      words: of its language.
      maker, character: empty where the file says nothing of them.
      facts: pairs such as ("favourite colour", "green").
      answers: pairs of the ways to ask something and its answer.
      lines: sentences that the model says of itself.
    """

    name: str
    maker: str = ""
    character: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    answers: tuple[tuple[tuple[str, ...], str], ...] = ()
    lines: tuple[str, ...] = ()
    words: Wordings = ENGLISH


def read_identity(path: str) -> str:
    """The text of a file that describes an identity, without comments and empty lines.

    Raises:
      UserError: there is no such file, it is not such text, or as `parse_identity`; the message names file and line.
    """
    file = to_path(path if is_remote(path) else os.path.expanduser(path))
    if not file.is_file() and not (isinstance(file, Path) and file.is_fifo()):  # a shell's <(...) is a pipe
        near = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        what = f"does not exist{closest(file.name, near)}"
        if file.exists():
            what = "is a folder; name a file in it" if file.is_dir() else "is not an ordinary file; name a text file"
        raise UserError(f"--identity: {path} {what}".removesuffix("."))
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--identity: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    parse_identity(text, path)
    kept = [line.strip() for line in text.splitlines() if not _is_empty(line)]
    text = "\n".join(kept)
    check(
        len(text) <= LONGEST,
        f"--identity: {path} has {len(text):,} characters; write at most {LONGEST:,}",
    )
    return text


def parse_identity(text: str, where: str = "data.identity") -> Identity:
    """The identity that a text describes.

    Args:
      where: what messages call the text.

    Raises:
      UserError: it has no name, or a line that cannot be understood.
    """
    check("\0" not in text, f"{where} is not text; write lines such as {EXAMPLE!r}")
    check(not text.lstrip().startswith(("{", "[")), f"{where} is JSON; write lines such as {EXAMPLE!r}")
    text = unicodedata.normalize("NFC", text)  # some systems type an umlaut as two characters
    fields: dict[str, str] = {}
    facts: dict[str, str] = {}
    answers, lines = [], []
    whole = _whole_lines(text, where)
    words = _language(whole, where)
    field_of = {word: field for known in (ENGLISH, words) for field, all_ in known.fields.items() for word in all_}
    for number, line in whole:
        place = f"{where}:{number}"
        asked = _ASKED.fullmatch(line)
        keyed = _keyed(line, words)
        if keyed is not None and (asked is None or keyed[0].lower() in field_of):
            key, value = keyed
            field = field_of.get(key.lower())
            if field == "text":
                lines += [_sentence(_first_person(value, words))] if value else []
                continue
            check(bool(value), f"{place}: {key!r} has no value; write it on the same line, such as '{key}: ...'")
            known = facts if field is None else fields
            key = field or _fact(key, words, place)
            check(key not in known, f"{place}: {key!r} is there a second time; leave one of them out")
            known[key] = value
        elif asked is not None:
            ways = tuple(way.strip() for way in re.findall(r"[^?？؟]+[?？؟]+", asked[1]))
            answers.append((ways, _sentence(asked[2])))
        else:
            lines.append(_sentence(_first_person(line, words)))
    check("name" in fields, f"{where} has no name; write it on a line of its own, such as {EXAMPLE!r}")
    name = fields["name"]
    check(len(name) <= LONGEST_NAME, f"{where}: the name has {len(name)} characters; it may have {LONGEST_NAME}")
    check(any(map(str.isalnum, name)), f"{where}: the name is {name!r}; it needs a letter or a digit")
    check(
        words is not NONE or any(len(ways) > 2 for ways, _ in answers),
        f"{where} is in no language that is known, and has no question in three wordings; write them, then the answer",
    )
    i_am = re.escape(words.says_character.partition("{")[0].strip())
    character = re.sub(rf"^{i_am}\s+", "", _first_person(fields.get("character", ""), words))
    return Identity(name, fields.get("maker", ""), character, tuple(facts.items()), tuple(answers), tuple(lines), words)


def _is_empty(line: str) -> bool:
    """Whether a line says nothing: it is empty, a rule, or a comment or heading."""
    return line.lstrip().startswith("#") or not any(map(str.isalnum, line))


def _whole_lines(text: str, where: str) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers, without bullets and emphasis; a question has its answer."""
    whole: list[tuple[int, str]] = []
    question: tuple[int, str] | None = None
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        if _is_empty(line):
            continue
        line = _MARKS.sub("", line.strip()).replace("**", "").replace("__", "").strip()
        line = re.sub(r"^(?:question|answer|q|a)\s*:\s*", "", line, flags=re.IGNORECASE)
        if question is not None:
            number, line, question = question[0], f"{question[1]} {line}", None
        if line.endswith(("?", "？", "؟")):
            question = number, line
        else:
            whole.append((number, line))
    if question is not None:
        raise UserError(f"{where}:{question[0]}: a question without its answer; write the answer after it")
    return whole


def _language(whole: list[tuple[int, str]], where: str) -> Wordings:
    """The wordings of the language that a line such as `language: German` names; English if there is none."""
    labels = {word for words in LANGUAGES for word in words.fields["language"]}
    for number, line in whole:
        key, value = _keyed(line, ENGLISH) or ("", "")
        if key in labels:
            for words in (*LANGUAGES, NONE):
                if value.lower() in words.names:
                    return words
            names = ", ".join(words.names[0].capitalize() for words in LANGUAGES)
            raise UserError(
                f"{where}:{number}: there are no wordings in {value!r}, only in {names}; with 'language: none' the "
                "model learns the questions of the file alone"
            )
    return ENGLISH


def _keyed(line: str, words: Wordings) -> tuple[str, str] | None:
    """The word and the value of a line such as `favourite colour: green`; None if it is a sentence."""
    found = _KEYED.fullmatch(line)
    if found is None:
        return None
    key = found[1].strip()
    if words is ENGLISH:
        key = re.sub(r"^(?:my|your)\s+", "", key, flags=re.IGNORECASE).lower()
    pronoun = key.lower().split()[:1] and key.lower().split()[0] in words.pronouns
    value = found[2].strip().rstrip(".").strip("\"'“”„«»").rstrip(".").strip()
    return None if pronoun or len(key.split()) > 4 or key[-1].isdigit() else (key, value)


def _fact(key: str, words: Wordings, place: str) -> str:
    """The name of a fact, with `my` in front where the language's word for it depends on the noun."""
    if len(words.possessives) < 2:
        return key
    yours = {your: my for my, your in words.possessives.items()}
    first, _, noun = key.partition(" ")
    my = yours.get(first.lower(), first.lower())
    ways = " or ".join(f"'{possessive} {key}'" for possessive in words.possessives)
    check(my in words.possessives and bool(noun), f"{place}: {key!r} is no field; if it is a fact, write {ways}")
    return f"{my} {noun}"


def _first_person(text: str, words: Wordings) -> str:
    """A sentence that begins by telling the model what it is, as the model says it: `You are ...` as `I am ...`."""
    if not words.second_person:
        return text
    told = re.compile(rf"(?:{'|'.join(words.second_person)})\b", re.IGNORECASE)
    return told.sub(lambda found: words.second_person[found[0].lower()], text, count=1) if told.match(text) else text


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith(_SENTENCE_END) else f"{text}."
