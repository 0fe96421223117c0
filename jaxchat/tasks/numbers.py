"""Reading numbers as people and models write them: the only reader, for right answers and for given ones.

A number is read as an exact fraction, so that 72, 72.00, $72, **72**, 7.2e1 and 72/1 are equal and nothing is rounded.
What only looks like one number (12,50 or 1234,567, 5:30, 1.2.3, 10^2) is a number without a value, which equals none.
`docs/evaluation.md` has a table of the forms.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 1000  # digits and exponent of a number; no question asks for more, and conversions take quadratic time

# Full-width forms, the minus signs and hyphens of Unicode, Arabic separators; what has no width goes.
_PLAIN = str.maketrans(
    {
        **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},
        **dict.fromkeys("\u2212\ufe63\u2010\u2011\u2012", "-"),
        "\u066b": ".",
        "\u066c": ",",
        **dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff", ""),
        **dict.fromkeys("\ufe0f\u20e3", ""),  # what makes a digit an emoji
    }
)
_LATEX = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{", "{"),
        (r"(?<=\d)(?:,?\\!|\\[,;]|\{,\})(?=\d{3})", ","),
        (r" ?\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d))", r" \1\3/\2\4"),
        (r"\\(?:times|cdot)\b", "*"),
        (r"\\div\b", "/"),
        (r"\^\{?\\circ\}?", "°"),
        (r"\\(?=[$%&])", ""),
    )
)
_CURRENCY = (
    r"(?:[A-Z]{0,3}[$€£¥₹₩₽₺₴₪₫฿]|(?:USD|EUR|GBP|JPY|CNY|INR|CAD|AUD|NZD|CHF|SEK|NOK|DKK|PLN|MXN|BRL|ZAR|Rs)\.?)"
)
# A long dash is a sign only where a number follows directly and no word or number precedes directly: –5, not 3–5.
_LONG_DASH_SIGN = re.compile(rf"(?<![^\s(\[*_:=])[–—](?={_CURRENCY}?[.\d])")
# Repeated marks are bounded, so that the time is linear in the length of the text.
_TOKEN = re.compile(
    r"(?:(?P<word>\b(?:minus|negative)\s{1,9})|(?P<sign>(?<!-)[-+]\s{0,9}))?"
    rf"(?P<currency>(?<![^\W_]){_CURRENCY}\s{{0,9}})?(?:(?<=[-+])\()?[{{*_`]{{0,9}}"
    r"(?P<digits>"
    r"(?P<mantissa>[1-9](?:\.\d+)?)\s?[*×x]\s?10(?:\^[{(]?(?P<power>[-+]?\d{1,4}(?!\d))[})]?|(?P<raised>[⁻⁺]?[⁰¹²³⁴-⁹]{1,4}))"
    r"|(?P<mixed>\d+ (?=\d+/\d+(?![\d/])))?(?P<run>"
    r"\d{1,3}(?:[ \u00a0\u2007\u2009\u202f]\d{3})+(?![\d/])(?:\.\d+)?|(?:(?<![\w.])\.)?\d(?:[\d.,:/_'’]*\d)?)"
    r"(?P<exponent>e[-+]?\d+(?![^\W_]))?)",
    re.IGNORECASE,
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SCALE = re.compile(r"(?:\s?(?:hundred|thousand|million|billion|trillion)|bn|(?-i:[kKMB]))\b", re.IGNORECASE)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"k": 10**3, "m": 10**6, "b": 10**9, "bn": 10**9}
_LINK = re.compile(
    r"[\s)\]}$€£%°]*(?:\*\*|//|[-+*/×x÷·⋅^–—&±]|(?:plus|minus|times|and|or|to|from|by|over|multiplied by|divided by)\b)"
    rf"\s*(?:[-+]\s*)?[(\[{{]*(?:{_CURRENCY}\s*)?",
    re.IGNORECASE,
)
_DIVISION = re.compile(r"\d+/\d+")
_UNFINISHED = re.compile(r"[)\]}]*\s+(?:[-+/×÷·]|\*(?!\*)|(?:plus|minus)\b)\s*\Z", re.IGNORECASE)
_DENIED = re.compile(r"(?:(?:\bnot|n['’]t|\bnever)\s+|[±√]\s*)\Z", re.IGNORECASE)
_NEARBY = 24  # characters before a number in which what denies it is looked for


@dataclass(frozen=True)
class Number:
    """A number in a text, with its sign and currency.

    Attributes:
      value: None if it is not well formed.
      start, end: where it stands.
      stated: it is not an operand or one of several, as in `34 + 58`, `10/2`, `5 from 10`, `3-5` and `92 or 93`, nor
        denied, nor does the text end with an operator after it.
    """

    value: Fraction | None
    start: int
    end: int
    stated: bool


def plain_text(text: str) -> str:
    """`text` with ASCII in place of full-width forms, minus signs and hyphens, and without the marks of LaTeX."""
    text = text.translate(_PLAIN)
    if "\\" in text or "{,}" in text:
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
    return _LONG_DASH_SIGN.sub("-", text)


def first_number(text: str) -> Fraction | None:
    """The value of the first number that is stated in `text`; None if there is none, or it is not well formed."""
    return next((number.value for number in _numbers(plain_text(text)) if number.stated), None)


def last_number(text: str) -> Fraction | None:
    """The value of the last number that is stated in `text`; None if there is none, or it is not well formed."""
    return next((number.value for number in reversed(_numbers(plain_text(text))) if number.stated), None)


def parse_number(text: str) -> Fraction | None:
    """The value of `text` if it is one number and nothing else but marks such as `$`, `%`, `**` and a final period."""
    text = plain_text(text)
    found = _numbers(text)
    if len(found) != 1 or (text[: found[0].start] + text[found[0].end :]).strip("\\()[]{}*_`$€£% \t\r\n.,"):
        return None
    return found[0].value


def format_number(value: Fraction) -> str:
    """The number in decimal digits, or as a fraction if they have no end: 1250, 0.5, 1/3."""
    twos, rest = 0, value.denominator
    while rest % 2 == 0:
        twos, rest = twos + 1, rest // 2
    fives = 0
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    if rest > 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    whole, part = digits[: len(digits) - places], digits[len(digits) - places :]
    return "-" * (value < 0) + whole + "." * bool(part) + part


def _numbers(text: str) -> list[Number]:
    """All numbers of a plain text, in their order."""
    found = list(_read(text))
    stated = [_is_stated(text, *number) for number in found]
    for i, ((_, _, _, end), (_, _, digits, _)) in enumerate(zip(found, found[1:], strict=False)):
        if _LINK.fullmatch(text, end, digits):
            stated[i] = stated[i + 1] = False
    if found and _UNFINISHED.match(text, found[-1][3]):
        stated[-1] = False
    return [Number(value, start, end, own) for (value, start, _, end), own in zip(found, stated, strict=True)]


def _is_stated(text: str, value: Fraction | None, start: int, digits: int, end: int) -> bool:
    """Whether a number is stated as far as it and what stands before it tell."""
    undone = value is None and _DIVISION.fullmatch(text, digits, end)  # 10/2: nobody has divided
    return not undone and not _DENIED.search(text[max(0, start - _NEARBY) : start])


def _read(text: str) -> Iterator[tuple[Fraction | None, int, int, int]]:
    """(value, start with sign and currency, start of the digits, end) of each number."""
    for token in _TOKEN.finditer(text):
        start, end = token.span()
        before = text[max(0, start - 2) : start]
        # A number joined to a word is a part of it: r2d2, v1.7, COVID-19. A currency in front is no word, nor x in 2x3.
        joined = before[-1:].isalpha() or (before[-1:] == "_" and before[:1].isalnum())
        if joined and not (token["word"] or token["currency"] or (before[-1:] in "xX" and before[:1].isdigit())):
            continue
        value = _value(token)
        follows = text[end : end + 1]
        if follows == "^" or (follows and unicodedata.category(follows) == "No"):  # 10^2, 10², 2½
            value = None
        scale = _SCALE.match(text, end)
        if scale is not None:
            end = scale.end()
            value = value and value * _SCALES[scale[0].strip().lower()]
        negative = token["word"] or (token["sign"] or "").startswith("-")
        yield (-value if negative and value else value), start, token.start("digits"), end


def _value(token: re.Match[str]) -> Fraction | None:
    if token["mantissa"]:
        power = int(token["power"] or token["raised"].translate(_RAISED))
        return Fraction(token["mantissa"]) * Fraction(10) ** power if abs(power) <= LONGEST else None
    run, exponent = token["run"], token["exponent"] or ""
    if len(run) > LONGEST or len(exponent) > 5 or abs(int(exponent[1:] or 0)) > LONGEST:
        return None
    if run.isdecimal() and not exponent:
        return Fraction(int(run))
    if _DIVISION.fullmatch(run) and not exponent:
        above, below = map(int, run.split("/"))
        # 1/2 is a number; 10/2 is a division that nobody has done.
        return int(token["mixed"] or 0) + Fraction(above, below) if below and math.gcd(above, below) == 1 else None
    run = re.sub("[\u00a0\u2007\u2009\u202f]", "", run)
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", run):
        run = run.replace(",", "")
    return Fraction(run + exponent) if re.fullmatch(r"\d*(?:\.\d+)?", run) else None
