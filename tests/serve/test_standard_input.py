"""What a pipe or a file on standard input becomes."""

import io

import pytest

from jaxchat.errors import UserError
from jaxchat.serve.standard_input import LONGEST, piped_message


def message(data, encoding="utf-8"):
    return piped_message(io.TextIOWrapper(io.BytesIO(data), encoding=encoding))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"one\ntwo\n", "one\ntwo"),
        (b"one\r\n\r\ntwo\r\n", "one\n\ntwo"),
        (b"old\rMac\r", "old\nMac"),
        (b"/quit\n\n\n", "/quit"),
        (b"  \n kept  ", "  \n kept  "),
        ("\ufeffGrüße 🙂".encode(), "Grüße 🙂"),
    ],
)
def test_all_lines_are_one_message(data, text):
    assert message(data) == text


def test_another_encoding_is_that_of_the_locale():
    assert message("Grüße".encode("latin-1"), "latin-1") == "Grüße"
    assert message("Grüße".encode(), "latin-1") == "Grüße"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty; pipe in a question, give -p TEXT"),
        (b" \n\t\n", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (b"abc\xff", "is not UTF-8: byte 3 is 0xff; give it as text; iconv"),
        ("Grüße".encode("utf-16"), "is not text|is not UTF-8"),
        (b"\x7fELF\x02\x01\x00", "is not text: byte 6 is 0"),
        (b"x" * (LONGEST + 1), "has more than 16 MiB"),
    ],
)
def test_what_is_no_message(data, why):
    with pytest.raises(UserError, match=f"^standard input ({why})") as caught:
        message(data)
    assert "\n" not in str(caught.value)


def test_closed_and_unreadable(tmp_path):
    with pytest.raises(UserError, match="standard input is closed"):
        piped_message(None)
    with open(tmp_path / "file", "w") as only_written, pytest.raises(UserError, match="cannot be read"):
        piped_message(only_written)
