"""Makes a data folder in another language from a Debian package of translated manual pages.

    apt-get download manpages-de                        # or manpages-fr, manpages-es, manpages-ru, ...
    python examples/manpages.py manpages-de_*.deb german

german/pretrain/   the text, a page a line
german/chat/       conversations: what the commands are for, and sums with the calculator
german/eval/       questions: the same commands and other sums, in wordings that no conversation has

It needs nothing but Python, and reads the package on any system. A page's text keeps the translators' licence (GPL-3+
for most, see usr/share/doc in the package). For another language, add its wordings to WORDINGS.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 500  # characters of a page
COMMON = 4  # pages that have a paragraph
NO_PROSE = re.compile(r"@|https?:|Copyright|©|\](?:…|\.\.\.| \[)")  # addresses, licences, synopses
SUMS = 4000  # conversations
TESTS = 200  # of each kind


class Wordings:
    """How a language asks. `{x}` is a command, `{a} + {b}` a sum; the last ones of each are for the test alone."""

    def __init__(self, purpose: list[str], sums: list[str], answer: str):
        self.purpose, self.purpose_held_out = purpose[:-2], purpose[-2:]
        self.sums, self.sums_held_out = sums[:-2], sums[-2:]
        self.answer = answer


WORDINGS = {
    "de": Wordings(
        ["Wozu dient {x}?", "Was macht {x}?", "Was ist {x}?", "Wofür ist {x} da?", "Erkläre {x}.", "Was tut {x}?",
         "Was macht der Befehl {x}?", "Was kann {x}?", "Wozu ist {x} gut?", "Wozu dient der Befehl {x}?",
         "Ich möchte wissen, was {x} macht.", "Sag mir, wozu {x} dient.",
         "Wofür braucht man {x}?", "Kannst du mir sagen, was {x} macht?"],
        ["Was ist {a} + {b}?", "Wie viel ist {a} + {b}?", "Rechne {a} + {b}.", "Was ergibt {a} + {b}?",
         "Wie viel sind {a} + {b}?", "Berechne {a} + {b}.", "Addiere {a} und {b}.", "{a} + {b}?",
         "Kannst du {a} + {b} ausrechnen?", "Kannst du mir sagen, was {a} + {b} ist?",
         "Kannst du {a} und {b} addieren?",
         "Sag mir, wie viel {a} + {b} ist.", "Bitte rechne {a} + {b}.", "Sag mir, was {a} und {b} ergeben.",
         "Kannst du {a} + {b} rechnen?", "Sag mir, was {a} + {b} ist."],
        "Das Ergebnis ist {c}.",
    ),
    "fr": Wordings(
        ["À quoi sert {x} ?", "Que fait {x} ?", "Qu'est-ce que {x} ?", "Explique {x}.", "Que fait la commande {x} ?",
         "Je voudrais savoir ce que fait {x}.", "Dis-moi à quoi sert {x}.", "Que peut faire {x} ?",
         "Peux-tu me dire à quoi sert {x} ?", "Pourquoi utilise-t-on {x} ?"],
        ["Combien font {a} + {b} ?", "Calcule {a} + {b}.", "Que vaut {a} + {b} ?", "{a} + {b} ?",
         "Quel est le résultat de {a} + {b} ?", "Additionne {a} et {b}.",
         "Peux-tu additionner {a} et {b} ?", "Peux-tu me dire ce que font {a} + {b} ?",
         "Dis-moi ce que vaut {a} + {b}.",
         "Peux-tu calculer {a} + {b} ?", "Dis-moi combien font {a} + {b}."],
        "Le résultat est {c}.",
    ),
    "es": Wordings(
        ["¿Para qué sirve {x}?", "¿Qué hace {x}?", "¿Qué es {x}?", "Explica {x}.", "¿Qué hace la orden {x}?",
         "Quiero saber qué hace {x}.", "Dime para qué sirve {x}.", "¿Qué puede hacer {x}?",
         "¿Puedes decirme qué hace {x}?", "¿Para qué se usa {x}?"],
        ["¿Cuánto es {a} + {b}?", "Calcula {a} + {b}.", "¿Cuánto son {a} + {b}?", "¿{a} + {b}?",
         "¿Cuál es el resultado de {a} + {b}?", "Suma {a} y {b}.",
         "¿Puedes sumar {a} y {b}?", "¿Puedes decirme cuánto es {a} + {b}?", "Dime el resultado de {a} + {b}.",
         "¿Puedes calcular {a} + {b}?", "Dime cuánto es {a} + {b}."],
        "El resultado es {c}.",
    ),
    "ru": Wordings(
        ["Для чего нужна {x}?", "Что делает {x}?", "Что такое {x}?", "Объясни {x}.", "Что делает команда {x}?",
         "Я хочу знать, что делает {x}.", "Скажи, для чего нужна {x}.", "Что умеет {x}?",
         "Можешь сказать, что делает {x}?", "Зачем нужна команда {x}?"],
        ["Сколько будет {a} + {b}?", "Вычисли {a} + {b}.", "Чему равно {a} + {b}?", "{a} + {b}?",
         "Сложи {a} и {b}.", "Посчитай {a} + {b}.",
         "Можешь сложить {a} и {b}?", "Можешь вычислить {a} + {b}?", "Скажи, чему равно {a} + {b}.",
         "Можешь посчитать {a} + {b}?", "Скажи, сколько будет {a} + {b}."],
        "Ответ: {c}.",
    ),
}  # fmt: skip

PARAGRAPHS = {"PP", "P", "LP", "HP", "sp", "RS", "RE", "IP", "TP", "TQ", "br", "UE", "ME"}
INLINE = {"B", "I", "BR", "BI", "IR", "IB", "RB", "RI", "SM", "SB"}  # macros whose arguments are text
BLOCKS = {"nf": "fi", "EX": "EE", "TS": "TE", "de": ".", "Vb": "Ve"}  # code, tables, definitions
PLAIN_WORD = re.compile(r"(?<![\w/.=])(?<!\s-)(?<!--)(?<!^-)[^\W\d_]{2,}(?![\w/=])")
CHARACTERS = {
    "en": "–", "em": "—", "bu": "•", "aq": "'", "co": "©", "at": "@", "rs": "\\", "ha": "^", "dq": '"', "ti": "~",
    "hy": "-", "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "Fo": "«", "Fc": "»", "->": "→", "mu": "×", ">=": "≥",
    "<=": "≤", "ss": "ß", "sc": "§", "de": "°", "mc": "µ", "+-": "±", "tm": "™", "rg": "®", "12": "½",
}  # fmt: skip
ESCAPE = re.compile(
    r"\\(?:"
    r"f(?:\[[^]]*\]|\(..|.)|s[-+]?\d+|s\[[^]]*\]|[mM]\[[^]]*\]|m\(..|[hvwlLbDxNkz]'[^']*'|\*(?:\[[^]]*\]|\(..|.)"
    r"|n[-+]?(?:\[[^]]*\]|\(..|.)|\((?P<two>..)|\[(?P<name>[^]]*)\]|(?P<one>.)|$)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="a package of translated manual pages, such as manpages-de_*.deb")
    parser.add_argument("folder", type=Path, help="the data folder to make")
    options = parser.parse_args()
    if options.folder.exists() and any(options.folder.iterdir()):
        sys.exit(f"{options.folder} is not empty; name another folder")
    try:
        language, pages = read_package(options.package)
    except (OSError, ValueError, tarfile.TarError) as error:
        sys.exit(f"{options.package} is not a Debian package of manual pages ({error}); name a .deb file")
    if not pages:
        sys.exit(f"{options.package} has no translated manual pages; take one such as manpages-de")
    texts = texts_of(pages)
    write_split(options.folder / "pretrain", [{"text": text} for text in texts])
    print(f"{options.folder}/pretrain: {len(texts)} pages, {sum(map(len, texts)) / 1e6:.1f} million characters")
    if language not in WORDINGS:
        sys.exit(f"there are no conversations in '{language}' ({', '.join(WORDINGS)}); add its wordings to {__file__}")
    count, tests = write_chats(WORDINGS[language], purposes(pages), options.folder)
    print(f"{options.folder}/chat: {count} conversations; {options.folder}/eval: {tests} questions")


def read_package(path: Path) -> tuple[str, dict[str, str]]:
    """The language and the pages (such as `man1/ls`, with their roff source) of a .deb.

    Raises:
      ValueError: it is not a .deb.
    """
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError("it is no ar archive")
        while header := file.read(60):
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                break
            file.seek(size + size % 2, 1)
        else:
            raise ValueError("it has no data.tar")
        data = io.BytesIO(file.read(size))
    languages: dict[str, dict[str, str]] = {}
    with tarfile.open(fileobj=data) as archive:
        for member in archive:
            found = re.search(r"share/man/([a-z]{2}\w*)/(man\d)/(.+)\.\d\w*\.gz$", member.name)
            source = archive.extractfile(member) if found and member.isfile() else None
            if found and source:
                pages = languages.setdefault(found[1], {})
                pages[f"{found[2]}/{found[3]}"] = gzip.decompress(source.read()).decode("utf-8", "replace")
    language = max(languages, key=lambda name: len(languages[name]), default="")
    return language, dict(sorted(languages.get(language, {}).items()))


def texts_of(pages: dict[str, str]) -> list[str]:
    """The text of each page. What many pages say, as of licences and bugs, is left out."""
    split = [list(paragraphs(source)) for source in pages.values()]
    times = Counter(paragraph for page in split for paragraph in set(page))
    kept = ([text for text in page if times[text] < COMMON and not NO_PROSE.search(text)] for page in split)
    texts = [text for text in map("\n".join, kept) if len(text) >= SHORTEST]
    random.Random(0).shuffle(texts)  # neighbours are of one subject
    return texts


def paragraphs(source: str) -> Iterator[str]:
    """The paragraphs of a page in roff's macros `man`: prose and the explanations of options, without code."""
    if re.search(r"^\.Dd", source, re.MULTILINE):
        return  # the macros `mdoc`
    words: list[str] = []
    label, skip_to = False, None
    for line in [*source.splitlines(), ".PP"]:
        macro, _, rest = line[1:].strip().partition(" ") if line[:1] in (".", "'") else ("", "", line)
        if skip_to is not None:
            skip_to = None if macro == skip_to else skip_to
            continue
        if not line.strip() or macro in PARAGRAPHS | {"SH", "SS"} or macro in BLOCKS:
            if not (label and macro in ("PP", "br", "TQ")):
                text = plain(" ".join(words))
                if is_prose(text):
                    yield text
                words, label = [], False
            skip_to = BLOCKS.get(macro)
        if macro == "TP":
            label = True
        elif macro == "IP":
            words = [f"{arguments(rest)[0]}"] if arguments(rest) and "bu" not in rest else []
        elif macro in INLINE:
            parts = arguments(rest)
            words.append((" " if macro in ("B", "I", "SM", "SB") else "").join(parts))
        elif not macro and line.strip():
            words.append(line)
        if label and words:
            words, label = [words[0].rstrip(":") + ":"], False


def is_prose(text: str) -> bool:
    """Whether a paragraph is in words, not a list of options, files or other pages."""
    letters = sum(map(len, PLAIN_WORD.findall(text)))
    return letters >= 20 and letters >= 0.7 * len(text.replace(" ", ""))


def arguments(text: str) -> list[str]:
    return [quoted or bare for quoted, bare in re.findall(r'"((?:[^"]|"")*)"|(\S+)', text)]


def plain(text: str) -> str:
    """Roff's text without its escapes, with single spaces."""

    def character(found: re.Match[str]) -> str:
        if name := found["two"] or found["name"]:
            return CHARACTERS.get(name, "")
        return {"-": "-", "e": "\\", " ": " ", "0": " ", "~": " ", "\\": "\\", "'": "'"}.get(found["one"] or "", "")

    return " ".join(ESCAPE.sub(character, text).split())


def purposes(pages: dict[str, str]) -> dict[str, str]:
    """What each command is for, as the first section of its page says it."""
    found = {}
    for name, source in pages.items():
        first = re.search(r"^\.SH [^\n]*\n(.*?)^\.SH", source, re.MULTILINE | re.DOTALL)
        if not name.startswith("man1/") or first is None:
            continue
        lines = [line for line in first[1].splitlines() if not line.startswith((".", "'"))]
        command, dash, purpose = plain(" ".join(lines)).replace(" – ", " - ").partition(" - ")
        if dash and command == name.removeprefix("man1/") and 8 <= len(purpose) <= 80:
            found[command] = purpose.rstrip(".")
    return found


def write_chats(wordings: Wordings, known: dict[str, str], folder: Path) -> tuple[int, int]:
    """Writes conversations and questions, and returns how many there are of each."""
    rng = random.Random(0)
    chats, facts = [], []
    for command, purpose in known.items():
        answer = f"{command}: {purpose}."
        chats += [chat(form.format(x=command), answer) for form in wordings.purpose]
        facts += [{**chat(form.format(x=command), answer), "answer": purpose} for form in wordings.purpose_held_out]
    pairs = sorted({(rng.randrange(1, 1000), rng.randrange(1, 1000)) for _ in range(SUMS + TESTS)})
    rng.shuffle(pairs)
    chats += [sum_chat(rng.choice(wordings.sums), wordings.answer, a, b) for a, b in pairs[TESTS:]]
    sums = [
        {**sum_chat(rng.choice(wordings.sums_held_out), wordings.answer, a, b), "answer": a + b}
        for a, b in pairs[:TESTS]
    ]
    facts = rng.sample(facts, min(TESTS, len(facts)))
    rng.shuffle(chats)
    write_split(folder / "chat", chats)
    write_lines(folder / "eval" / "facts" / "test.jsonl", facts)
    write_lines(folder / "eval" / "sums" / "test.jsonl", sums)
    return len(chats), len(facts) + len(sums)


def sum_chat(form: str, answer: str, a: int, b: int) -> dict:
    """A sum, with a call of the calculator."""
    parts = [
        {"type": "python", "text": f"{a} + {b}"},
        {"type": "python_output", "text": str(a + b)},
        {"type": "text", "text": answer.format(c=a + b)},
    ]
    return chat(form.format(a=a, b=b), parts)


def chat(question: str, answer: str | list[dict[str, str]]) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_split(folder: Path, rows: list[dict]) -> None:
    """Every 20th is for validation."""
    write_lines(folder / "train.jsonl", [row for i, row in enumerate(rows) if i % 20 != 19])
    if held_out := rows[19::20]:
        write_lines(folder / "val.jsonl", held_out)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
