"""The Rust tokenizer: training, and its ids against tiktoken's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken._educational as educational
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from tests.tokenizer.texts import ANY, corpus

NUM_SPECIAL = len(SPECIAL_TOKENS)


def test_training_does_not_depend_on_how_the_text_arrives():
    texts = corpus(4, 20_000) * 10  # more than one batch of the stream
    parts = Tokenizer.train_from_iterator((text for text in texts), 700)
    shuffled = random.Random(0).sample(texts, len(texts))
    assert parts.mergeable_ranks == Tokenizer.train_from_iterator(shuffled, 700).mergeable_ranks


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Typical parquet files, and the texts in them."""
    folder, texts = tmp_path_factory.mktemp("shards"), corpus(8, 20_000)
    kinds = [("zstd", pa.string()), ("snappy", pa.large_string()), ("gzip", pa.string()), ("none", pa.string())]
    quarter = len(texts) // 4
    for i, (codec, kind) in enumerate(kinds):
        rows = [None, "", *texts[i * quarter : (i + 1) * quarter], "ſ中😀"]
        table = pa.table({"url": ["x"] * len(rows), "text": pa.array(rows, kind)})
        pq.write_table(table, folder / f"{i}.parquet", compression=codec, row_group_size=37, use_dictionary=i % 2 == 0)
    files = sorted(folder.iterdir())
    return files, [text for file in files for text in pq.read_table(file)["text"].to_pylist() if text]


@pytest.mark.parametrize("max_chars", [None, 1, 30_000])
@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, r"\w+|\s"])
def test_training_from_files_equals_training_on_their_texts(shards, max_chars, pattern):
    files, texts = shards
    if max_chars is not None:
        ends = np.cumsum([len(text) for text in texts])
        texts = texts[: int(np.argmax(ends >= max_chars)) + 1]  # including the text that reaches the limit
    size = 265 if max_chars == 1 else 500
    calls = []
    tokenizer = Tokenizer.train_from_files(
        files, size, pattern=pattern, max_chars=max_chars, progress=lambda *call: calls.append(call)
    )
    assert tokenizer.mergeable_ranks == Tokenizer.train_from_iterator(texts, size, pattern=pattern).mergeable_ranks
    assert calls[-1] == ("read", sum(map(len, texts)))


def test_files_that_cannot_be_read(shards, tmp_path):
    (tmp_path / "a.parquet").write_bytes(shards[0][0].read_bytes()[:2000])
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    for name in ("a", "b", "missing"):
        with pytest.raises(UserError, match=rf"{name}\.parquet") as caught:
            Tokenizer.train_from_files([tmp_path / f"{name}.parquet"], 265)
        assert "\n" not in str(caught.value)


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}')
    with pytest.raises(UserError, match=r"a.jsonl is neither .parquet nor .txt"):
        Tokenizer.train_from_files([tmp_path / "a.jsonl"], 265)


def test_training_reports_its_progress():
    calls: list[tuple[str, int]] = []
    texts = corpus(9, 30_000) * 10

    def slowly():
        for i, text in enumerate(texts):
            if i % 1000 == 0:
                time.sleep(0.12)  # longer than the minimum time between two calls
            yield text

    Tokenizer.train_from_iterator(slowly(), 400, progress=lambda *call: calls.append(call))
    counts = [done for phase, done in calls if phase == "count"]
    assert counts and counts == sorted(counts) and 0 < counts[0] <= counts[-1] <= sum(map(len, texts))

    def stop(phase, done):
        raise InterruptedError(f"{phase} {done}")

    with pytest.raises(InterruptedError, match=r"count \d+"):
        Tokenizer.train_from_iterator(slowly(), 400, progress=stop)


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
    assert tokenizer.decode(()) == tokenizer.decode(np.array([])) == ""
    for kind in (np.int32, np.uint32, np.uint16):
        assert tokenizer.decode(np.array(ids, kind)) == peer.decode(ids)
    assert tokenizer.decode(tuple(ids)) == peer.decode(ids)


@given(st.lists(st.lists(st.integers(0, 899), max_size=9), max_size=9))
@settings(max_examples=100, deadline=None)
def test_decoding_many_at_once(tokenizer, lists):
    offsets = np.cumsum([0, *map(len, lists)])
    ids = np.array([id for ids in lists for id in ids], np.uint32)
    assert tokenizer.decode_batch(ids, offsets) == [tokenizer.decode(ids) for ids in lists]


def test_decoding_many_is_the_inverse_of_encoding_many(tokenizer):
    texts = [*corpus(10, 20_000), "", "中😀"]
    assert tokenizer.decode_batch(*tokenizer.encode_to_numpy(texts)) == texts
    ids, offsets = tokenizer.encode_to_numpy(texts)
    assert tokenizer.decode_batch(ids, offsets[3:5]) == texts[3:4]
    for wrong in ([0, 5, 3], [0, len(ids) + 1]):
        with pytest.raises(UserError, match="offsets must ascend and end at"):
            tokenizer.decode_batch(ids, np.array(wrong))
    with pytest.raises(UserError, match="token id 900 is out of range"):
        tokenizer.decode_batch(np.array([900]), np.array([0, 1]))


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


def test_a_tokenizer_from_mergeable_ranks(tokenizer):
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
    for ids in ([900], [-1], [2**40], np.array([900]), np.array([900], np.int16), np.array([900], np.uint32)):
        with pytest.raises(
            UserError, match=r"token id (900|-1|\d{13}) is out of range: this tokenizer has ids 0 to 899"
        ):
            tokenizer.decode(ids)
    with pytest.raises(UserError, match="a token id is out of range: this tokenizer has ids 0 to 899"):
        tokenizer.decode([2**70])
    with pytest.raises(UserError, match="token id 900 is out of range"):
        tokenizer.encode("a", prepend=900)
    with pytest.raises(UserError, match=r"no special token '<\|bas\|>', did you mean '<\|bos\|>'"):
        tokenizer.encode_special("<|bas|>")


def test_input_that_is_not_text(tokenizer):
    with pytest.raises(TypeError):
        tokenizer.encode([1])
    with pytest.raises(TypeError):
        Tokenizer.train_from_iterator(["a", None], 265)

    def broken():
        yield "abc"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Tokenizer.train_from_iterator(broken(), 265)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize(
    "train", ["train_from_iterator(itertools.repeat('some text without an end '), 300)",
              "train_from_files(itertools.islice(itertools.repeat(sys.argv[1]), 1_000_000), 300)"]
)  # fmt: skip
def test_ctrl_c_stops_training(train, shards):
    code = (
        f"import itertools, sys\nfrom jaxchat.tokenizer import Tokenizer\nprint('ready', flush=True)\nTokenizer.{train}"
    )
    command = [sys.executable, "-c", code, shards[0][0]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # by now it is in Rust
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
