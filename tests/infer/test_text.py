"""An answer's text: the same for every way of cutting it into tokens, and up to the stop string that comes first."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.infer.text import Characters, TextStream
from jaxchat.tokenizer import HuggingFaceTokenizer, Tokenizer

TOKENIZER = Tokenizer.train_from_iterator(["the end. abab aab Grüße 日本 🙂🙂 <|python_start|> " * 3], 300)
SPECIAL = list(TOKENIZER.special_tokens.values())

# Few characters, so that stop strings do occur, overlap, and begin again within themselves.
letters = st.text("ab🙂é\ufffd", max_size=30)
stops = st.lists(st.text("ab🙂é\ufffd", min_size=1, max_size=5), max_size=4).map(tuple)
any_ids = st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | st.sampled_from(SPECIAL) | st.integers(0x80, 0xFF))


def streamed(ids, stop=()):
    """The pieces, and what stopped them."""
    stream, pieces = TextStream(TOKENIZER, stop), []
    for token in ids:
        text, stopped_by = stream.add(token)
        pieces.append(text)
        if stopped_by is not None:
            assert stopped_by == stream.stopped_by
            break
    return [*pieces, stream.flush()], stream.stopped_by


def cut(text, stop):
    """Reference: the text up to the stop string that is complete first, of several the longest."""
    for end in range(len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(any_ids)
@example([0xE2, 0x82, 0xAC, 0xE2, 0x82])  # a whole character and a part of one
@example([0xF0, 0x9F, SPECIAL[0], 0x99, 0x82])  # a special token within a character
@example([0xED, 0xA0, 0x80, 0xC0, 0x80, 0xFF])  # a surrogate, an overlong form, a byte that UTF-8 has not
def test_the_pieces_make_up_what_decode_gives(ids):
    assert "".join(streamed(ids)[0]) == TOKENIZER.decode(ids)
    characters = Characters(TOKENIZER)
    assert "".join(map(characters.add, ids)) + characters.flush() == TOKENIZER.decode(ids)


@given(st.text())
def test_a_character_is_given_with_its_last_byte(text):
    characters = Characters(TOKENIZER)
    for character in text:
        *first, last = character.encode()
        assert [characters.add(byte) for byte in first] == [""] * len(first)
        assert characters.add(last) == character
    assert characters.flush() == ""


@given(letters | any_ids.map(TOKENIZER.decode), stops, st.booleans())
@example("aab", ("ab", "aab"), False)  # complete at one character: the longest
@example("abab", ("abab", "ab"), False)  # a prefix of another is complete first
@example("aaab", ("aab",), True)  # the match begins again within itself
@example("a", ("ab",), True)  # held back to the end
def test_the_text_ends_before_the_first_stop_string(text, stop, as_bytes):
    ids = list(text.encode()) if as_bytes else TOKENIZER.encode(text)
    pieces, stopped_by = streamed(ids, stop)
    assert ("".join(pieces), stopped_by) == cut(text, stop)


@given(st.binary(max_size=20), stops, st.data())
def test_any_split_of_any_bytes_is_cut_alike(data, stop, draw):
    words = {token: id for id, token in enumerate(TOKENIZER.tokens())}
    ids, at = [], 0
    while at < len(data):
        sizes = [size for size in range(1, len(data) - at + 1) if data[at : at + size] in words]
        size = draw.draw(st.sampled_from(sizes))
        ids.append(words[data[at : at + size]])
        at += size
    pieces, stopped_by = streamed(ids, stop)
    assert ("".join(pieces), stopped_by) == cut(data.decode(errors="replace"), stop)


@given(letters, stops)
def test_only_what_may_become_a_stop_string_is_held_back(text, stop):
    ids, given_out = TOKENIZER.encode(text), ""
    stream = TextStream(TOKENIZER, stop)
    seen = Characters(TOKENIZER)
    so_far = ""
    for token in ids:
        piece, stopped_by = stream.add(token)
        given_out += piece
        so_far += seen.add(token)
        if stopped_by is not None:
            break
        beginnings = (string[:size] for string in stop for size in range(len(string)))
        longest = max((len(start) for start in beginnings if so_far.endswith(start)), default=0)
        assert given_out == so_far[: len(so_far) - longest]


def test_nothing_comes_after_a_stop_string():
    stream = TextStream(TOKENIZER, ("b",))
    assert [stream.add(byte) for byte in b"abc"] == [("a", None), ("", "b"), ("", "b")]
    assert stream.flush() == ""


def test_a_stop_string_of_replacement_characters_is_found_at_the_end():
    stream = TextStream(TOKENIZER, ("a\ufffd",))
    assert [stream.add(byte) for byte in (*b"xa", 0xC3)] == [("x", None), ("", None), ("", None)]
    assert (stream.flush(), stream.stopped_by) == ("", "a\ufffd")


def test_special_tokens_are_spelled_out_and_can_stop():
    ids = [*TOKENIZER.encode("so "), TOKENIZER.encode_special("<|python_start|>"), *TOKENIZER.encode("1")]
    assert "".join(streamed(ids)[0]) == "so <|python_start|>1"
    pieces, stopped_by = streamed(ids, ("<|python_start|>",))
    assert ("".join(pieces), stopped_by) == ("so ", "<|python_start|>")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop string is empty"):
        TextStream(TOKENIZER, ("a", ""))


def test_characters_of_hugging_face_tokenizers_are_the_same():
    same = HuggingFaceTokenizer.from_text(TOKENIZER.to_json())
    ids = TOKENIZER.encode("Grüße 日本 🙂", prepend="<|bos|>")
    characters = Characters(same)
    assert "".join(map(characters.add, ids)) == TOKENIZER.decode(ids)


def test_a_long_answer_takes_a_time_linear_in_its_length():
    # A stop string that nearly comes, again and again, within a text that is held back for long.
    steps = 0

    class Counted(str):
        def __getitem__(self, at):
            nonlocal steps
            steps += 1
            return super().__getitem__(at)

    stream = TextStream(TOKENIZER, ("a" * 500 + "b",))
    stream._stops[0].string = Counted(stream._stops[0].string)
    a, c = TOKENIZER.encode("a")[0], TOKENIZER.encode("c")[0]
    text = ([a] * 499 + [c]) * 40
    assert "".join(stream.add(token)[0] for token in text) == TOKENIZER.decode(text)
    assert steps < 4 * len(text)
