"""The tokenizer against tiktoken, against a plain training loop, and the tokens of conversations."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken._educational as educational
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.config import UserError
from jaxchat.tokenizer import FILE_NAME, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

NUM_SPECIAL = len(SPECIAL_TOKENS)
WORDS = (
    "the cat's hat wasn't there; I'll go (again) to 12345 Zürich, naïve café — über 3.14% für £99! "
    "def f(x):\n\treturn x ** 2  # square\n\n"
    "日本語のテキスト 한국어 Ελληνικά русский язык العربية हिन्दी 😀👍🏽 ſ K ½ Ⅷ ٣٤ \u00a0 \u2028"
).split(" ")
# Text that the pattern cuts in unusual places.
HARD = st.text(
    st.sampled_from(" \t\r\n\u00a0\u2028\u3000'sSdlLvere\u017f\u212aaé1٣½.,$_\u0301\u200d中😀<|>"), max_size=60
)
ANY = st.text(max_size=60) | HARD | st.lists(st.sampled_from(WORDS)).map(" ".join)


def corpus(seed: int, words: int) -> list[str]:
    """Documents of words with frequencies as in language: few are frequent, many are rare."""
    rng = random.Random(seed)
    syllables = ["ka", "lo", "mi", "the", "ing", "er", "ß", "qu", "ee", "st", "on", "й", *"abcdefgh12"]
    rare = ["".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(3000)]
    draw = [
        rare[min(int(rng.paretovariate(0.7)), 3000) - 1] if rng.random() < 0.8 else rng.choice(WORDS)
        for _ in range(words)
    ]
    return [" ".join(draw[start : start + 50]) + rng.choice(["", "\n", ".\n\n"]) for start in range(0, words, 50)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(iter(corpus(0, 30_000)), 900)


@pytest.fixture(scope="module")
def peer(tokenizer):
    return tokenizer.to_tiktoken()


def reference_training(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding as defined: count all pairs, merge the most frequent (ties: the lowest ids), repeat."""
    pieces = Counter(piece.encode() for text in texts for piece in regex.findall(SPLIT_PATTERN, text))
    words = [(list(piece), count) for piece, count in pieces.items()]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size - NUM_SPECIAL:
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += count
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in words:
            at = 0
            while at + 1 < len(ids):
                if ids[at] == left and ids[at + 1] == right:
                    ids[at : at + 2] = [len(tokens)]
                at += 1
        tokens.append(tokens[left] + tokens[right])
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_training_equals_the_definition(seed):
    texts = corpus(seed, 1500) + ["aaaaaaa " * 9, "ababababab abab"]
    assert Tokenizer.train_from_iterator(texts, 460).mergeable_ranks == reference_training(texts, 460)


def test_training_does_not_depend_on_how_the_text_arrives():
    texts = corpus(4, 20_000) * 10  # more than one batch of the stream
    parts = Tokenizer.train_from_iterator((text for text in texts), 700)
    shuffled = random.Random(0).sample(texts, len(texts))
    assert parts.mergeable_ranks == Tokenizer.train_from_iterator(shuffled, 700).mergeable_ranks


@given(ANY)
@example("")
@example("<|bos|>hi<|assistant_end|>")
@example("a" * 5000)
@example("'\u017f 'LL 'Ve'rE")
@settings(max_examples=400, deadline=None)
def test_ids_equal_tiktokens(tokenizer, peer, text):
    ids = tokenizer.encode(text)
    assert ids == peer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


@given(st.text(st.characters(), max_size=20) | st.text(st.sampled_from("a \ud83d\ude00\udfff\ud800"), max_size=8))
@settings(max_examples=200, deadline=None)
def test_lone_surrogates_are_replaced(tokenizer, peer, text):
    assert tokenizer.encode(text) == peer.encode_ordinary(text)
    assert tokenizer.encode([text]) == [tokenizer.encode(text)]


def test_ids_of_long_documents_and_of_many_threads_equal_tiktokens(tokenizer, peer):
    texts = corpus(5, 40_000)
    texts += ["".join(texts[:200]), "", "x" * 100_000, "abc" * 30_000, "\n" * 10_000]
    expected = peer.encode_ordinary_batch(texts)
    for threads in (1, 2, 3, None):
        assert tokenizer.encode(texts, num_threads=threads) == expected
        ids, offsets = tokenizer.encode_to_numpy(texts, prepend="<|bos|>", num_threads=threads)
        assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
        assert len(offsets) == len(texts) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
        found = [ids[start:end].tolist() for start, end in zip(offsets, offsets[1:], strict=False)]
        assert found == [[tokenizer.bos_token_id, *one] for one in expected]


@pytest.mark.parametrize("text", [" " * 200_000, "\n" * 200_000, "\r\n " * 60_000, "'" * 200_000])
def test_text_without_a_break(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, 899), max_size=40))
@settings(max_examples=300, deadline=None)
def test_decoding_any_ids_equals_tiktokens(tokenizer, peer, ids):
    assert tokenizer.decode_bytes(ids) == peer.decode_bytes(ids)
    assert tokenizer.decode(ids) == peer.decode(ids)
    assert tokenizer.decode(np.array(ids, np.int64)[::-1]) == peer.decode(ids[::-1])
    assert tokenizer.decode(np.array(ids, np.int32)) == tokenizer.decode(tuple(ids)) == peer.decode(ids)


def test_encoding_is_byte_pair_encoding_as_taught(tokenizer):
    """tiktoken's educational module is a second, independent definition."""
    taught = educational.SimpleBytePairEncoding(pat_str=SPLIT_PATTERN, mergeable_ranks=tokenizer.mergeable_ranks)
    text = " ".join(corpus(6, 300))
    assert tokenizer.encode(text) == taught.encode(text, visualise=None)


def test_special_tokens(tokenizer):
    assert tokenizer.vocab_size == 900
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(891, 900))
    assert tokenizer.bos_token_id == 891
    assert tokenizer.id_to_bytes(899) == b"<|output_end|>"
    hi = tokenizer.encode("hi")
    assert tokenizer.encode("hi", prepend="<|bos|>", append=5) == [891, *hi, 5]
    assert tokenizer.encode(["hi", ""], append="<|user_end|>") == [[*hi, 893], [893]]
    assert tokenizer.encode("<|bos|>")[0] != 891


def test_token_bytes(tokenizer):
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (900,)
    assert all(sizes[rank] == len(token) for token, rank in tokenizer.mergeable_ranks.items())
    assert not sizes[-NUM_SPECIAL:].any()
    text = "".join(corpus(7, 500))
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer")
    loaded = Tokenizer.from_directory(tmp_path / "new" / "tokenizer")
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert other.mergeable_ranks == tokenizer.mergeable_ranks
        assert (other.pattern, other.vocab_size) == (tokenizer.pattern, tokenizer.vocab_size)


def test_a_trained_one_can_be_brought_along(tokenizer):
    ranks = tokenizer.mergeable_ranks
    swapped = {**ranks, b"a": ranks[b"b"], b"b": ranks[b"a"]}  # ids of bytes need not be the bytes
    brought = Tokenizer.from_mergeable_ranks(swapped, pattern=r"\w+|\W+")
    text = "a bad cab; naïve\n\nabba  "
    assert brought.encode(text) == brought.to_tiktoken().encode_ordinary(text)
    assert brought.mergeable_ranks == swapped and brought.decode(brought.encode(text)) == text


def test_bad_vocabularies(tokenizer):
    with pytest.raises(UserError, match="size is 264; it must be at least 265"):
        Tokenizer.train_from_iterator(["abc"], 264)
    assert Tokenizer.train_from_iterator(["aaaa"], 267).vocab_size == 267
    with pytest.raises(UserError, match="268 is too large: this text supports 2 merges, so at most 267 tokens"):
        Tokenizer.train_from_iterator(["aaaa"], 268)
    with pytest.raises(UserError, match="this text supports 0 merges"):
        Tokenizer.train_from_iterator([], 266)
    for pattern in ("(a", "[z-a]", "(?<n>"):
        with pytest.raises(UserError, match="^the split pattern does not compile: .*$"):
            Tokenizer.train_from_iterator(["abc"], 265, pattern=pattern)
    ranks = tokenizer.mergeable_ranks
    with pytest.raises(UserError, match="found 1000 at 890"):
        Tokenizer.from_mergeable_ranks({**ranks, max(ranks, key=ranks.get): 1000})
    with pytest.raises(UserError, match="no token for the single byte 0x00"):
        Tokenizer.from_mergeable_ranks({b"a": 0, b"b": 1})


def test_bad_ids(tokenizer):
    for ids in ([900], [-1], [2**40], np.array([900])):
        with pytest.raises(
            UserError, match=r"token id (900|-1|\d{13}) is out of range: this tokenizer has ids 0 to 899"
        ):
            tokenizer.decode(ids)
    with pytest.raises(UserError, match="token id 900 is out of range"):
        tokenizer.encode("a", prepend=900)
    with pytest.raises(UserError, match=r"no special token '<\|bas\|>', did you mean '<\|bos\|>'"):
        tokenizer.encode_special("<|bas|>")


def test_what_is_no_text(tokenizer):
    with pytest.raises(TypeError):
        tokenizer.encode([1])
    with pytest.raises(TypeError):
        Tokenizer.train_from_iterator(["a", None], 265)

    def broken():
        yield "abc"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Tokenizer.train_from_iterator(broken(), 265)


def damage(text: str, how: str) -> str:
    data = json.loads(text)
    if how == "cut":
        return text[: len(text) // 2]
    if how == "empty":
        return ""
    if how == "list":
        return "[]"
    if how == "no model":
        del data["model"]
    if how == "token missing":
        del data["model"]["vocab"]["a"]
    if how == "merge missing":
        del data["model"]["merges"][3]
    if how == "not our alphabet":
        data["model"]["vocab"] = {"日" + name: rank for name, rank in data["model"]["vocab"].items()}
    if how == "other specials":
        data["added_tokens"].pop()
    if how == "pattern":
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "("
    return json.dumps(data)


HOWS = ["cut", "empty", "list", "no model", "token missing", "merge missing", "not our alphabet", "other specials"]


@pytest.mark.parametrize("how", [*HOWS, "pattern"])
def test_damaged_file(tokenizer, tmp_path, how):
    tokenizer.save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(damage(path.read_text(encoding="utf-8"), how), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_binary_file(tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"no tokenizer at .*{FILE_NAME}"):
        Tokenizer.from_directory(tmp_path / "nowhere")
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_stops_training():
    code = (
        "import itertools\n"
        "from jaxchat.tokenizer import Tokenizer\n"
        "print('ready', flush=True)\n"
        "Tokenizer.train_from_iterator(itertools.repeat('some text without an end '), 300)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors


# Conversations


def spelled(tokenizer: Tokenizer, conversation: dict, **settings) -> str:
    """The rendered text, what is trained on in brackets."""
    ids, mask = tokenizer.render_conversation(conversation, **settings)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    out, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            run = tokenizer.decode(ids[start:end])
            out += f"[{run}]" if mask[start] else run
            start = end
    return out


CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello <|bos|>"},
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see: "},
                {"type": "python", "text": "2+2"},
                {"type": "python_output", "text": "4"},
                {"type": "text", "text": "It is 4."},
            ],
        },
    ]
}


def test_render_conversation(tokenizer):
    assert spelled(tokenizer, CHAT) == (
        "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>[Hello <|bos|><|assistant_end|>]"
        "<|user_start|>2+2?<|user_end|><|assistant_start|>[Let me see: <|python_start|>2+2<|python_end|>]"
        "<|output_start|>4<|output_end|>[It is 4.<|assistant_end|>]"
    )
    ids, _ = tokenizer.render_conversation(CHAT)
    specials = [SPECIAL_TOKENS[token - 891] for token in ids if token >= 891]
    assert specials.count("<|bos|>") == 1, "text that spells a special token is plain text"
    assert specials.count("<|assistant_end|>") == 2


def test_render_system_message(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *CHAT["messages"][:2]]
    assert spelled(tokenizer, {"messages": messages}) == (
        "<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|>[Hello <|bos|><|assistant_end|>]"
    )
    assert messages[0] is system and messages[1] == {"role": "user", "content": "Hi"}, "the input stays as it was"


def test_render_is_cut(tokenizer):
    ids, mask = tokenizer.render_conversation(CHAT)
    for size in (0, 1, 7, len(ids), 2048):
        assert tokenizer.render_conversation(CHAT, max_tokens=size) == (ids[:size], mask[:size])


def test_render_for_completion(tokenizer):
    text = "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>"
    for messages in (CHAT["messages"][:1], CHAT["messages"][:2]):
        assert tokenizer.decode(tokenizer.render_for_completion({"messages": messages})) == text
    ids, _ = tokenizer.render_conversation(CHAT)
    prompt = tokenizer.render_for_completion(CHAT)
    assert ids[: len(prompt)] == prompt, "a completion continues what was trained on"


BAD = [
    ([], "at least one message"),
    ("hi", "at least one message"),
    ([{"role": "user"}], "message 0 .* no 'role' or no 'content'"),
    ([{"role": "assistant", "content": "a"}], "message 0 .* from 'assistant', expected 'user'"),
    ([{"role": "user", "content": "a"}] * 2, "message 1 .* from 'user', expected 'assistant'"),
    ([{"role": "system", "content": "a"}], "must be followed by a message of the user"),
    ([{"role": "system", "content": 1}, {"role": "user", "content": "a"}], "message 0, from 'system', is not a string"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "message 0, from 'user', is not a string"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "message 1 is neither"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "'image'"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text"}]}], "message 1 .* part"),
]


@pytest.mark.parametrize("messages, message", BAD)
def test_bad_conversations(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.render_conversation({"messages": messages})
    with pytest.raises(ValueError, match=message):
        tokenizer.render_for_completion({"messages": messages})
