"""Numbers in the forms in which people and models write them, and in those that are not one number."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.tasks.numbers import first_number, format_number, last_number, parse_number

READ = {
    "72": "72  72.  72.0  72.00  072  +72  $72  $ 72  $72.00  €72  72€  £72  ¥72  ₹72  US$72  C$72  (72)  [72]",
    "-3": "-3  −3  ﹣3  －3  ‐3  ‑3  –3  —3  -$3  −€3  $-3  €−3  -£3  -3%  **-3**  -**3**  \\boxed{-3}  -\\boxed{3}",
    "1250": "1250  1,250  1,250.00  $1,250  1\u00a0250  1\u202f250  1\u2009250  1{,}250  1\\,250  1٬250  1.25e3",
    "8250": "8,250  8,\\!250  8\\;250  8.25k  $8.25K  8.25 thousand",
    "1234567.5": "1234567.5  1,234,567.5  $1,234,567.50  1\u00a0234\u00a0567.5  1.2345675e6",
    "-1250": "-1250  -$1,250  -1.25 × 10^3  -1.25×10³  -$1.25k  −1,250.00",
    "0.00125": "0.00125  1.25 × 10^-3  1.25 × 10⁻³  1.25 \\times 10^{-3}  1.25e-3",
    "2.5": "2.5  5/2  2 1/2  2\\frac{1}{2}  2 \\frac{1}{2}  2\\tfrac12  \\frac52  \\dfrac{5}{2}",
    "12": "12  1️⃣2️⃣  𝟏𝟐  1.2 * 10^1  1.2x10^1",
    "0.5": ".5  0.5  0.50  $.50  1/2  \\frac{1}{2}  5e-1",
    "7.25": "7.25  7.250  ７.２５  ٧.٢٥  ٧٫٢٥  29/4  725e-2",
    "0": "0  -0  0.0  −0  $0.00  0e5",
    "100000000000000000000": "100000000000000000000  100,000,000,000,000,000,000  1e20",
}
MARKED = ["**72**", "__72__", "_72_", "`72`", "\\boxed{72}", "$72$", "\\(72\\)", "\\text{72}", "72%", "72\\%", "72 %"]
SENTENCES = [
    ("72 apples", "72"),
    ("72km", "72"),
    ("72 USD", "72"),
    ("USD 72", "72"),
    ("USD72", "72"),
    ("EUR -3", "-3"),
    ("-USD 3", "-3"),
    ("Rs.72", "72"),
    ("Rs. 72", "72"),
    ("minus 5", "-5"),
    ("Negative 5", "-5"),
    ("It is - 5", "-5"),
    ("-(5)", "-5"),
    ("the answer—5", "5"),
    ("so 72, in total", "72"),
    ("72/week", "72"),
    ("2 1/2 cups", "5/2"),
    ("2 million people", "2000000"),
    ("$1.5 billion", "1500000000"),
    ("5 thousand", "5000"),
    ("72k", "72000"),
    ("$72K a year", "72000"),
    ("$1.5M", "1500000"),
    ("$2B", "2000000000"),
    ("€1.5bn", "1500000000"),
    ("72 m", "72"),
    ("24x3=72", "72"),
    ("144/2 = 72", "72"),
    ("72 -year-old", "72"),
    ("72 °C", "72"),
    ("90^\\circ", "90"),
    ("the 3rd", "3"),
    ("=> 72", "72"),
    ("Answer:72", "72"),
    ("It ended...5", "5"),
    ("\u200e-5", "-5"),
]
NOT_ONE_NUMBER = (
    "12,50  1 250  1 250 000  1234,567  1,2345  1,23,456  ,5,0  0,123  1.250.000  1.250,00  1'250  1_250  "
    "5:30  1.2.3  12/5/2024  10^2  "
    "10²  2½  10/2  1/0  1e999999999  1e5000"
).split("  ")
OPERANDS = ["10-5", "10 - 5", "10 − 5", "3–5", "34 + 58", "34 and 58", "3 to 5", "5 from 10", "92 or 93", "2**3"]
OPERANDS += ["$5 + $7", "3 x 4", "3 × 4", "3 \\times 4", "10 minus 5", "6 / 4", "10 =", "4 - -4", "not 92", "isn't 92"]
OPERANDS += [
    "24x3",
    "2x4x8",
    "184/2",
    "±72",
    "92 ± 1",
    "√72",
    "34 × 10^2",
    "34 +",
    "34 + ",
    "34 plus ",
    "34 × ",
    "(34) - ",
]
WORDS = ["", "none", "x7", "x-7", "r2d2", "v1.7", "COVID-19", "a_7", "seventy-two", "$", "-", ".", "½", "²"]


@pytest.mark.parametrize(
    ("value", "text"), [(value, text) for value, texts in READ.items() for text in texts.split("  ")]
)
def test_forms_of_a_number(value, text):
    assert parse_number(text) == first_number(text) == last_number(text) == Fraction(value)


@pytest.mark.parametrize("text", MARKED)
def test_marks_around_a_number(text):
    assert parse_number(text) == last_number(text) == last_number(f"It is {text}.") == 72


@pytest.mark.parametrize(("text", "value"), SENTENCES)
def test_numbers_in_sentences(text, value):
    assert first_number(text) == last_number(text) == Fraction(value)


@pytest.mark.parametrize("text", NOT_ONE_NUMBER)
def test_what_is_not_one_number_has_no_value(text):
    assert parse_number(text) is None
    assert first_number(text) is None
    # Nor does it leave the answer to a number before it.
    assert last_number(f"From 17 to {text}") is None


@pytest.mark.parametrize("text", [*OPERANDS, *WORDS])
def test_no_number_is_stated(text):
    if text != "10 =":
        assert first_number(text) is None
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("34 + 58 = 92.", 92, 92),
        ("10-5=5", 5, 5),
        ("3 - 5 = -2", -2, -2),
        ("$34 + $58 = $92", 92, 92),
        ("34 and 58 make 92", 92, 92),
        ("92 is the sum of 34 and 58.", 92, 92),
        ("The answer is 92 (34 plus 58).", 92, 92),
        ("It is 93, not 92.", 93, 93),
        ("72 apples, 3 pears", 72, 3),
        ("First 17, then 1,250.50", 17, Fraction("1250.5")),
        ("9 2", 9, 2),
        ("The letter r appears 3 times in r2d2", 3, 3),
    ],
)
def test_the_first_and_the_last_number_that_are_stated(text, first, last):
    assert (first_number(text), last_number(text)) == (first, last)


@given(st.integers(-(10**12), 10**12), st.integers(0, 6), st.booleans(), st.booleans())
def test_decimals_are_read_exactly(digits, places, commas, currency):
    value = Fraction(digits, 10**places)
    text = format_number(value)
    if commas:
        sign, (whole, point, rest) = "-" * (value < 0), text.removeprefix("-").partition(".")
        text = f"{sign}{int(whole):,}{point}{rest}"
    if currency:
        text = text.replace("-", "-$") if value < 0 else f"${text}"
    assert parse_number(text) == last_number(f"First 17, then {text}.") == value


@given(st.fractions())
def test_every_fraction_has_a_text(value):
    assert Fraction(format_number(value)) == value


@given(st.text("0123456789 .,-+−–/*^$€()[]{}\\eE_'’:&xnot½\u00a0", max_size=300) | st.text())
def test_any_text_is_read(text):
    for read in (parse_number, first_number, last_number):
        value = read(text)
        assert value is None or isinstance(value, Fraction)


@pytest.mark.parametrize("piece", ["9", "9,", "1 ", "-", "1-", "1/", " ", "$", "9.", "e", "1e", "(", "_", "x"])
def test_a_long_text_is_read_in_linear_time(piece):
    # A quadratic reader would take minutes.
    assert last_number(piece * 20_000 + " so it is 92") == 92
