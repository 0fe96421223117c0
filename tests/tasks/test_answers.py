"""What an answer says, and what it is worth: tables of answers as models write them, for each way of grading."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.tasks.answers import score_choice, score_value, visible_answer
from jaxchat.tasks.base import multiple_choice_question
from jaxchat.tasks.gsm8k import GSM8K

CALL = "<|python_start|>34 + 58<|python_end|>"
OUTPUT = "<|output_start|>92<|output_end|>"

# --- what was said


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("It is 92.", "It is 92."),
        ("It is 92.<|assistant_end|>", "It is 92."),
        (f"{CALL}{OUTPUT}It is 92.<|assistant_end|>", "It is 92."),
        (f"Let me see. {CALL}{OUTPUT}It is 92.", "Let me see. \nIt is 92."),
        (f"#### {CALL}{OUTPUT}92", "#### \n92"),
        (f"#### 92{CALL}{OUTPUT}", "#### 92"),
        (f"9{CALL}{OUTPUT}2", "9\n2"),
        (f"{CALL}It is 92.", "It is 92."),
        ("    return 1\n", "    return 1\n"),
        # Nothing, because the last tool part is not closed.
        (f"{CALL}{OUTPUT}", ""),
        (f"{CALL}<|output_start|>92", ""),
        (f"{CALL}<|output_start|>9", ""),
        ("<|python_start|>0 + 92", ""),
        ("<|python_start|>34 + 58<|output_end|>92", ""),
        (f"It is 92. {CALL}<|output_start|>92", ""),
        (f"{CALL}{OUTPUT}It is 92. <|python_start|>", ""),
        ("", ""),
    ],
)
def test_only_text_outside_of_tool_parts_is_said(completion, said):
    assert visible_answer(completion) == said


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("The answer is 9", "The answer is "),
        ("The answer is 92 ", "The answer is 92 "),
        ("#### 92\n", "#### 92\n"),
        ("#### 92.", "#### "),
        ("92", ""),
        ("It is 1\u202f2", "It is "),
        ("34 + 5", "34 + "),
        ("34 +", "34 +"),  # it is no answer
        (f"{CALL}{OUTPUT}It is 9", "It is "),
        (f"{CALL}{OUTPUT}9", ""),
        (f"#### 92{CALL}{OUTPUT}", "#### 92"),
        ("", ""),
    ],
)
def test_the_last_word_of_a_cut_answer_is_not_said(completion, said):
    assert visible_answer(completion, cut=True) == said


PIECES = ["92", " ", "\n", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "is", "<|"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_an_answer_within_a_tool_is_never_right(text):
    for opening in ("<|python_start|>", "<|output_start|>"):
        assert visible_answer(f"{text}{opening}92") == visible_answer(f"{text}{opening}", cut=True) == ""


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=5))
def test_what_a_cut_answer_says_stays_said(text, more):
    # However the model would have gone on in words, the whole words before stay what they are.
    assert visible_answer(text + more.replace("<", "")).startswith(visible_answer(text, cut=True).rstrip())


# --- a number

NUMBERS = [
    (
        "92",
        1,
        "92  92.  It is 92!  The answer is 92  34 + 58 = 92  34+58=92  34 + 58 is 92.  $92.00  **92**  92 apples",
    ),
    ("92", 1, "92 is the sum of 34 and 58.  The answer is 92 (34 plus 58).  It is 92, not 93.  92,  Answer: 92\n"),
    (
        "92",
        1,
        "34x1+58=92  184/2 = 92  (34) + (58) = 92  9.2 × 10^1  34 + 58 → 92  34 and 58 sum to 92  It's not 93, it's 92",
    ),
    ("92", 0, "92k  $92M  92 thousand  √92  ±92  92 × 2  92x2  92 vs. 93  either 92 or 93  between 90 and 92"),
    ("92", 0, "192  9 2  92,000  92 or 93  34 + 58  9.2  -92  no idea  v92  1e92  92^2  92.5  92:30  184/2"),
    ("-5", 1, "-5  −5  The answer is -5.  The answer is −5.  minus 5  negative 5  - 5  3 - 8 = -5  –5  -$5  $-5"),
    ("5", 0, "-5  −5  The answer is −5.  minus 5  negative 5  - 5  10-5  10 - 5  10 − 5  10 minus 5  –5  -$5  not 5"),
    ("5", 1, "10-5=5  10 - 5 = 5  10 minus 5 is 5.  The answer—5  +5"),
    ("1250", 1, "1,250  1250.0  1,250.  $1,250  1\u00a0250"),
    ("1250", 0, "1.250  12,50  1234,250"),
    ("1,250", 1, "1250"),
    ("$72", 1, "72"),
    ("50", 0, "12,50"),
    ("12", 0, "12th of May 1990"),
    ("7", 0, "v1.7  1e7  x7  1/7  5:7"),
    ("0", 1, "0  -0"),
    ("3", 1, 'There are 3 r\'s.  The letter "r" appears 3 times in "r2d2".'),
]


@pytest.mark.parametrize(
    ("answer", "score", "text"), [(a, s, text) for a, s, texts in NUMBERS for text in texts.split("  ")]
)
def test_a_value_that_is_a_number(answer, score, text):
    assert score_value(answer, (), text) == score


def test_a_cut_number_does_not_count():
    for text in ("The answer is 9", "9", "34 + 58 = 9", "The answer is 9."):
        assert score_value("9", (), text, cut=True) == 0
    assert score_value("5", (), "10 - 5 = ", cut=True) == 0
    for text in ("34 +", "34 + ", "34 + 5", "34 − 5", "34 plus 5", "34 × "):
        assert score_value("34", (), text, cut=True) == 0
    assert score_value("92", (), "The answer is 92 and", cut=True) == 1
    for text in (f"{CALL}<|output_start|>92", f"{CALL}{OUTPUT}", CALL):
        assert score_value("92", (), text, cut=True) == score_value("92", (), text) == 0


def documented():
    """The rows of the table of forms in docs/evaluation.md, as pairs of a value, or None, and a form."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().partition("## Forms of numbers")[2]
    rows = re.findall(r"^\| (no number|[-\d/]+) \| (`.*`) \|$", text, re.MULTILINE)
    return [
        (None if value == "no number" else value, form) for value, forms in rows for form in forms[1:-1].split("` `")
    ]


@pytest.mark.parametrize(("value", "form"), documented())
def test_the_documented_forms(value, form):
    for answer in (value or "7", "12345"):
        right = answer == value
        assert score_value(answer, (), form) == score_value(answer, (), f"It is {form}") == right
        task = GSM8K("gsm8k", [{"question": "q", "answer": f"#### {answer}"}])
        assert task.score(task[0], f"#### {form}") == right


# --- a name

NAMES = [
    (
        "Oakford",
        ("Redhill", "Seaview"),
        1,
        "Mira lives in Oakford.  oakford  OAKFORD  _Oakford_  **Oakford**  Oakford's mayor",
    ),
    ("Oakford", ("Redhill", "Seaview"), 1, "'Oakford'  “Oakford”  Oakford--a town  Oakford, not Redhill  - Oakford"),
    (
        "Oakford",
        ("Redhill",),
        0,
        "Oakfords  In Redhill.  In Oakford or Redhill.  Oakford-like  New-Oakford  not Oakford  ",
    ),
    (
        "Oakford",
        ("Redhill",),
        1,
        "Not from Redhill, but from Oakford  It isn't called Redhill but Oakford  \\boxed{Oakford}",
    ),
    (
        "Oakford",
        ("Redhill",),
        0,
        "not from Oakford  It cannot be Oakford  He doesn't live in Oakford  Neither Oakford nor here",
    ),
    ("Mill Brook", ("Oak",), 1, "She lives in Mill Brook.  Mill\nBrook  Mill\u00a0Brook  mill 	 brook"),
    ("York", ("New York",), 0, "New York  York or New York"),
    ("New York", ("York",), 1, "She lives in New York."),
    ("Ann", ("Anna",), 0, "Anna  Anne  Jo-Ann  Ann-Marie"),
    ("Brien", (), 0, "O'Brien  O’Brien"),
    ("O'Brien", (), 1, "O'Brien  O’Brien  o'brien's"),
    ("Jean-Luc", ("Jean",), 1, "Jean-Luc  Jean‑Luc"),
    ("Zoë", (), 1, "Zoe\u0308  ZOË"),
    ("C++", ("C", "C#"), 1, "C++  It is C++."),
    ("C", ("C++", "C#"), 0, "C++  C#"),
    ("C", ("C++", "C#"), 1, "C  It is C."),
    ("c-a-t", (), 1, "It is spelled c-a-t.  C-A-T  c‑a‑t  c–a–t  c−a−t"),
    ("c-a-t", (), 0, "c-a-t-s  s-c-a-t  c-a  cat"),
    ("cat", ("dog",), 0, "a cat-like pet  cat and dog  my_cat"),
    ("baker", ("cook",), 0, "She is not a baker.  She isn't a baker."),
    ("5:30", (), 1, "At 5:30."),
    ("小明", (), 1, "我叫小明。  小明  我是AI小明"),
    ("小明", (), 0, "我叫小红。"),
    ("Talin", (), 1, "我叫Talin。  私はTalinです  저는 Talin입니다  Меня зовут Talin."),
    ("Talin", (), 0, "我叫Talina。"),
    ("東京", ("東京都",), 0, "東京都です"),
    ("Grün", (), 1, "Meine Lieblingsfarbe ist GRÜN.  »Grün«"),
    ("Grün", (), 0, "Grüner Tee"),
    ("Талин", (), 0, "Талина"),
]


@pytest.mark.parametrize(
    ("answer", "others", "score", "text"), [(a, o, s, text) for a, o, s, texts in NAMES for text in texts.split("  ")]
)
def test_a_value_that_is_a_name(answer, others, score, text):
    assert score_value(answer, others, text) == score


def test_a_cut_name_does_not_count():
    assert score_value("Ann", (), "It is Ann", cut=True) == 0
    assert score_value("Ann", (), "It is Ann and", cut=True) == 1


# --- a letter

CHOICES = [
    (
        "B",
        1,
        "B  B.   B  (B)  **B**  _B_  `B`  B) green  B: green  B is right\n  Answer: B  The answer is B.  \\boxed{B}",
    ),
    ("B", 1, "\nB\n  B<|assistant_end|>  The correct answer is **B**  [B]  Ｂ  B, because it is green"),
    (
        "B",
        1,
        "Final answer: B  The final answer is B.  The answer is option B  My answer is B  The letter is B  Letter B",
    ),
    ("B", 1, "B, I think.  B. A green one  B and I am sure  **Answer: B**  Option (B)  The correct choice is B) green"),
    ("B", 0, "B C  B\nC  (B) (C)  (B) or (C)  Both B and C  Not B  The answer is B or C  The answer is not B"),
    (
        "B",
        0,
        "A  A green one  BB  Bad  B2  Β  B and C  B or C  B, C  B/C    It is B  B-flat  B's  b  The answer is C, not B",
    ),
    ("A", 0, "A green one  An  A or B"),
    ("A", 1, "A  A.  A is right  A) A green one"),
]


@pytest.mark.parametrize(
    ("letter", "score", "text"), [(a, s, text) for a, s, texts in CHOICES for text in texts.split("  ")]
)
def test_a_letter(letter, score, text):
    question = multiple_choice_question("Which?", ["red", "green", "blue", "black"], "ABCD".index(letter))
    assert score_choice(question, text) == score


def test_a_cut_letter_does_not_count():
    question = multiple_choice_question("Which?", ["red", "green"], 1)
    assert score_choice(question, "B", cut=True) == 0
    assert score_choice(question, "B because", cut=True) == 1


# --- GSM8K

FINALS = [
    (
        "72",
        1,
        "####72  #### 72  #### 72.  #### 72.0  #### 72.00  #### $72  #### $ 72  #### 72%  #### 72 dollars.  #### 72km",
    ),
    (
        "72",
        1,
        "#### €72  #### £72  #### USD 72  #### 72 USD  #### **72**  **#### 72**  #### \\boxed{72}  #### `72`  #### +72",
    ),
    (
        "72",
        1,
        "#### 7.2e1  #### \n72  #### The answer is 72  #### Answer: 72  #### x = 72  #### 34+38=72  #### 72/1",
    ),
    (
        "72",
        1,
        "####: 72  #### 72,  #### 72\n#### 72  #### 72\n\nLet me check: 70+2=72.  #### 72\nNext question: ...\n#### 9",
    ),
    ("72", 1, f"#### {CALL}{OUTPUT}72  70 + 2 = {CALL}{OUTPUT}72\n#### 72  #### 72{CALL}{OUTPUT}"),
    (
        "72",
        0,
        "The answer is 72  72    \\boxed{72}  ####   #### none  ### 72  #### 72\n#### 73  #### 72 or 73",
    ),
    (
        "72",
        0,
        f"#### -72  #### 7 2  #### 72,5  #### 144/2  #### 72²  #### {CALL}{OUTPUT}  #### <|python_start|>72",
    ),
    ("72", 1, "#### 7.2 × 10^1  #### 7.2 \\times 10^{1}  #### 24x3=72  #### 144/2 = 72  #### 7️⃣2️⃣  #### 72¢ per pound"),
    ("72", 0, "#### 72k  #### $72M  #### √72  #### ±72  #### 72x5  #### 72/5  #### \\sqrt{72}"),
    ("72000", 1, "#### 72k  #### $72K  #### 72 thousand  #### 7.2 × 10⁴"),
    ("1500000", 1, "#### $1.5M  #### 1.5 million"),
    ("2.5", 1, "#### 2\\frac{1}{2}  #### $2 \\frac12$  #### \\frac52  #### 5/2"),
    ("7", 0, "#### 7️⃣2️⃣  #### 7x2  #### 7 × 10^2"),
    ("-3", 1, "#### -3  #### −3  #### -$3  #### $-3  #### -3.00  #### - 3  #### minus 3"),
    ("-3", 0, "#### 3  #### 5-3  #### 5 - 3"),
    ("3", 0, "#### -3  #### −3  #### -$3  #### –3"),
    ("1250", 1, "#### 1,250  #### 1,250.00  #### $1,250  #### 1\u202f250"),
    ("1250", 0, "#### 12,50  #### 1.250  #### 1250,000"),
    ("1,250", 1, "#### 1250"),
    ("1000", 1, "#### 1e3  #### 1,000"),
    ("0.5", 1, "#### .5  #### 0.50  #### 1/2"),
    ("5", 0, "#### 5:30  #### 5,000  #### 5-7  #### 5.5  #### 5 million  #### 5½"),
    ("100000000000000000000", 1, "#### 100000000000000000000"),
    ("10", 0, "#### 10.0000001"),
]


@pytest.mark.parametrize(
    ("gold", "score", "text"), [(g, s, text) for g, s, texts in FINALS for text in texts.split("  ")]
)
def test_gsm8k(gold, score, text):
    task = GSM8K("gsm8k", [{"question": "q", "answer": f"work\n#### {gold}"}])
    assert task.score(task[0], text) == score


def test_a_cut_gsm8k_answer():
    task = GSM8K("gsm8k", [{"question": "q", "answer": "#### 7"}])
    for text, score in (
        ("#### 7", 0),
        ("#### 7\n", 1),
        ("#### 7 ", 1),
        ("#### 7\nNow", 1),
        ("####\n7", 0),
        ("#### 7 +", 0),
    ):
        assert task.score(task[0], text, cut=True) == score, text
