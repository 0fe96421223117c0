"""What training may join: split patterns, the published ones too, and how the libraries' regex engines read a pattern.

jaxchat and tiktoken split with Rust's `fancy-regex`, Hugging Face's `tokenizers` with Oniguruma.
"""

from __future__ import annotations

import re

import jaxchat_tokenizer as rust

SPLIT_PATTERN: str = rust.DEFAULT_PATTERN
# Training makes no token longer than this. Without a limit a line of a million dashes, which is one piece, becomes
# tokens of up to half a million: places in the vocabulary that no other text can use, and files that load slowly.
MAX_TOKEN_BYTES = 128

# GPT-2's, which is built into Hugging Face's `ByteLevel`.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# OpenAI's, as tiktoken publishes them. r50k's cuts text exactly as GPT-2's does.
R50K_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}*{_SMALL}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}+{_SMALL}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# The pattern of a `.tiktoken` file with this name.
TIKTOKEN_PATTERNS = {
    "gpt2": R50K_PATTERN,
    "r50k_base": R50K_PATTERN,
    "p50k_base": R50K_PATTERN,
    "p50k_edit": R50K_PATTERN,
    "cl100k_base": CL100K_PATTERN,
    "o200k_base": O200K_PATTERN,
    "o200k_harmony": O200K_PATTERN,
}

# These patterns match every character, and cut between `<|`, the letters and `|>`.
KNOWN = {SPLIT_PATTERN, GPT2_PATTERN, R50K_PATTERN, CL100K_PATTERN, O200K_PATTERN}

_ITEM = re.compile(
    r"""(?P<property>\\[pP]\{\^?\w+\})
      | (?P<escape>\\.)
      | (?P<class>\[(?:\\[pP]\{\^?\w+\}|\\.|[^\]\\])+\])
      | (?P<group>\((?:\?(?:<[=!]|[a-zA-Z-]*[:)]|[^)]))?)
      | (?P<count>\{[^}]*\}\+?)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_SAME_ESCAPES = set("sSdDrntfv") | set("\\.+*?()|[]{}^$#&-~/'\"!%,:;<=>@_` ")
_SAME_GROUPS = {"(", "(?:", "(?i:", "(?i)", "(?=", "(?!", "(?<=", "(?<!", "(?>"}


def read_differently(pattern: str) -> str | None:
    """The first part of a pattern that Oniguruma may interpret differently from fancy-regex; None if there is none.

    To Oniguruma `^` and `$` are ends of lines, `{1,3}+` is a repetition of a repetition, and `\\w` excludes joiners.
    """
    for item in _ITEM.finditer(pattern):
        kind, text = str(item.lastgroup), item[0]
        if kind == "class":
            text = re.sub(r"\\[pP]\{\^?\w+\}", "", text[2:-1] if text[1] == "^" else text[1:-1])
            escapes = re.findall(r"\\(.)", text, re.DOTALL)
            same = set(escapes) <= _SAME_ESCAPES and not re.search(r"\[|&&|--|~~", text)
        else:
            same = {
                "property": True,
                "escape": text[-1] in _SAME_ESCAPES,
                "group": text in _SAME_GROUPS,
                "count": re.fullmatch(r"\{\d+(,\d*)?\}", text) is not None,
                "other": text not in "^$[]{}\\",
            }[kind]
        if not same:
            return item[0]
    return None


def for_oniguruma(pattern: str) -> str:
    """The pattern with the ends of the text and possessive counts written in a way that Oniguruma understands."""
    out: list[str] = []
    for item in _ITEM.finditer(pattern):
        kind, text = item.lastgroup, item[0]
        if kind == "count" and text.endswith("+") and out and out[-1] != ")":
            out[-1] = f"(?>{out[-1]}{text[:-1]})"
        else:
            out.append({"^": r"\A", "$": r"\z"}.get(text, text) if kind == "other" else text)
    return "".join(out)


def literal(text: str) -> str:
    """The pattern that matches exactly `text`."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", text)


def cuts(name: str, pattern: str) -> bool:
    """Whether the pattern cuts every occurrence of `name`, a special token's, so that no piece can be `name`."""
    return pattern in KNOWN and re.fullmatch(r"<\|[a-zA-Z0-9_]*[a-zA-Z][a-zA-Z0-9_]*\|>", name) is not None
