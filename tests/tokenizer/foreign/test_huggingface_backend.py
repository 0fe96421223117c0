"""The Hugging Face backend: the same interface, and the same ids where both backends read a file."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxchat.errors import UserError
from jaxchat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    BaseTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from jaxchat.tokenizer.patterns import MAX_TOKEN_BYTES
from tests.tokenizer.test_conversation import CHAT
from tests.tokenizer.texts import ANY, corpus

SPELLED = st.lists(st.sampled_from([*SPECIAL_TOKENS, "</s>", "[CLS]", "<unk>", " ", "a", "the", "ü"])).map("".join)


@pytest.fixture(scope="module")
def trained() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.train_from_iterator(iter(corpus(30, 20_000)), 700)


@pytest.fixture(scope="module")
def native(trained) -> Tokenizer:
    return Tokenizer.from_text(trained.to_json())


def unigram() -> tokenizers.Tokenizer:
    """As T5's: its special tokens are in the vocabulary, where the model finds them in the text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.5), ("cat", -3.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz</>"]
    peer = tokenizers.Tokenizer(models.Unigram(pieces, 2))
    peer.normalizer, peer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    peer.decoder = decoders.Metaspace()
    peer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return peer


def wordpiece() -> tokenizers.Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[", "]", "cls", "the", "cat", "s", "##s", "<", "|", ">", "bos", "##ting"]
    peer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    peer.normalizer, peer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    peer.decoder = decoders.WordPiece()
    peer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]"])
    return peer


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's: characters, and bytes for those that are missing."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "th",
        "the",
        "▁the",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocab = {name: i for i, name in enumerate(names)}
    peer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    peer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    peer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    peer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return peer


FOREIGN = {"unigram": unigram, "wordpiece": wordpiece, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=FOREIGN)
def foreign(request) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(FOREIGN[request.param]())


def test_training_has_the_sizes_and_errors_of_the_other_backend(trained):
    assert trained.vocab_size == 700 and trained.token_bytes().shape == (700,)
    assert [trained.encode_special(name) for name in SPECIAL_TOKENS] == list(range(691, 700))
    for backend in (Tokenizer, HuggingFaceTokenizer):
        assert backend.train_from_iterator(["aaaa"], 267).vocab_size == 267
        with pytest.raises(UserError, match="268 is too large: this text supports 2 merges, so at most 267 tokens"):
            backend.train_from_iterator(["aaaa"], 268)
        with pytest.raises(UserError, match="this text supports 0 merges, so at most 265 tokens"):
            backend.train_from_iterator([], 266)
        with pytest.raises(UserError, match="size is 264; it must be at least 265"):
            backend.train_from_iterator(["abc"], 264)
        for pattern in ("(a", "[z-a]"):
            with pytest.raises(UserError, match="^the split pattern does not compile: .*$"):
                backend.train_from_iterator(["abc"], 265, pattern=pattern)
        with pytest.raises(TypeError):
            backend.train_from_iterator(["a", None], 265)


def test_runs_of_one_character_make_no_long_tokens():
    """Both backends make the same tokens of a run, and pass over the same merges."""
    texts, size = ["-" * 20_000, *corpus(3, 300)], 400
    ours, theirs = (backend.train_from_iterator(texts, size) for backend in (Tokenizer, HuggingFaceTokenizer))
    runs = [sorted(len(token) for token in one.tokens() if set(token) == {ord("-")}) for one in (ours, theirs)]
    assert runs[0] == runs[1] and runs[0][-1] == MAX_TOKEN_BYTES
    assert theirs.encode("-" * 5000) == [theirs.tokens().index(b"-" * 128)] * 39 + [theirs.tokens().index(b"-" * 8)]


def test_training_on_pieces_of_a_pattern():
    """Text outside all pieces does not become tokens, and progress is reported."""
    calls = []
    texts = ["ab12 ab12", "ab12\ud800"]
    tokenizer = HuggingFaceTokenizer.train_from_iterator(
        texts, 266, pattern="[a-z]+", progress=lambda *call: calls.append(call)
    )
    assert tokenizer.tokens()[256] == b"ab" and calls == [("count", 9), ("count", 14)]
    assert tokenizer.decode(tokenizer.encode("ab12 ab")) == "abab"
    learned = Tokenizer.train_from_iterator(texts, 266, pattern="[a-z]+")
    assert learned.tokens()[256] == b"ab" and learned.decode(learned.encode("ab12 ab")) == "abab"


def test_the_compression_equals_that_of_the_other_backend(trained):
    """Only ties between pairs are broken differently."""
    other = Tokenizer.train_from_iterator(corpus(30, 20_000), 700)
    text = corpus(31, 5000)
    sizes = [len(tokenizer.encode_to_numpy(text)[0]) for tokenizer in (trained, other)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01


@given(ANY | SPELLED | st.text(st.sampled_from("a \ud83d\ude00\udfff\ud800"), max_size=8))
@example("")
@settings(max_examples=300, deadline=None)
def test_both_backends_do_the_same(trained, native, text):
    ids = trained.encode(text)
    assert ids == native.encode(text)
    assert (
        trained.decode(ids) == native.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )
    assert trained.decode_bytes(ids) == native.decode_bytes(ids)


@given(st.lists(st.integers(0, 699), max_size=20))
@settings(max_examples=200, deadline=None)
def test_both_backends_decode_any_ids(trained, native, ids):
    assert trained.decode_bytes(ids) == native.decode_bytes(ids)
    assert trained.decode(np.array(ids, np.uint32)) == native.decode(ids) == trained.decode(tuple(ids))


def test_the_interface_is_that_of_the_other_backend(trained, native):
    texts = [*corpus(32, 2000), "", "<|bos|>"]
    assert trained.tokens() == native.tokens()
    assert trained.token_bytes().tolist() == native.token_bytes().tolist()
    assert trained.token_bytes().dtype == np.int32
    for threads in (1, 2, None):
        expected = native.encode(texts, "<|bos|>", 5)
        assert trained.encode(texts, "<|bos|>", 5, num_threads=threads) == expected
        ids, offsets = trained.encode_to_numpy(texts, "<|bos|>", num_threads=threads)
        other_ids, other_offsets = native.encode_to_numpy(texts, "<|bos|>")
        assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
        assert np.array_equal(ids, other_ids) and np.array_equal(offsets, other_offsets)
    ids, offsets = trained.encode_to_numpy(texts)
    assert trained.decode_batch(ids, offsets) == texts
    assert [len(part) for part in trained.encode_to_numpy([])] == [0, 1]
    assert trained.render_conversation(CHAT) == native.render_conversation(CHAT)
    assert trained.render_for_completion(CHAT) == native.render_for_completion(CHAT)
    assert trained.id_to_bytes(699) == b"<|output_end|>"


def test_bad_input(trained):
    for ids in ([700], [-1], np.array([700])):
        with pytest.raises(UserError, match="token id (700|-1) is out of range: this tokenizer has ids 0 to 699"):
            trained.decode(ids)
    with pytest.raises(UserError, match="token id 700 is out of range"):
        trained.encode("a", append=700)
    with pytest.raises(UserError, match="offsets must ascend and end at 1"):
        trained.decode_batch(np.array([1]), np.array([0, 2]))
    with pytest.raises(TypeError):
        trained.encode([1])


def test_save_and_load(trained, foreign, tmp_path):
    for i, tokenizer in enumerate((trained, foreign)):
        tokenizer.save(tmp_path / str(i))
        loaded: list[BaseTokenizer] = [
            HuggingFaceTokenizer.from_directory(tmp_path / str(i)),
            load_tokenizer(tmp_path / str(i)),
            load_tokenizer(tmp_path / str(i), "huggingface"),
            pickle.loads(pickle.dumps(tokenizer)),
        ]
        for other in loaded:
            assert other.special_tokens == tokenizer.special_tokens
            assert other.encode("the cat's <|bos|>") == tokenizer.encode("the cat's <|bos|>")
        assert type(loaded[1]) is (HuggingFaceTokenizer if tokenizer is foreign else Tokenizer)


def test_special_tokens_of_a_foreign_tokenizer(foreign):
    own = [id for name, id in foreign.special_tokens.items() if name not in SPECIAL_TOKENS]
    assert len(own) == 3
    ids = [foreign.encode_special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(foreign.vocab_size - 9, foreign.vocab_size))
    assert not foreign.token_bytes()[own + ids].any()
    assert foreign.decode([foreign.bos_token_id]) == "<|bos|>"
    ids, mask = foreign.render_conversation(CHAT)
    assert ids[0] == foreign.bos_token_id and ids.count(foreign.bos_token_id) == 1 and len(ids) == len(mask)


@given(SPELLED)
@example("</s>")
@example("the cat</s></s> \uff1c/s>")  # normalization turns the first character into `<`
@settings(max_examples=100, deadline=None)
def test_spelled_special_tokens_are_plain_text(foreign, text):
    forbidden = {id for name, id in foreign.special_tokens.items() if name not in ("<unk>", "[UNK]")}
    assert forbidden.isdisjoint(foreign.encode(text))
    assert foreign.encode([text, "a"])[0] == foreign.encode(text)


def test_tokens_of_other_kinds_of_vocabulary():
    pieces = HuggingFaceTokenizer(unigram())
    assert pieces.id_to_bytes(4) == b" the" and pieces.token_bytes()[[1, 2, 4, 5]].tolist() == [0, 0, 4, 3]
    assert pieces.decode(pieces.encode("the cat")) == "the cat" and pieces.decode_bytes([4, 5]) == b"thecat"
    words = HuggingFaceTokenizer(wordpiece())
    assert [words.id_to_bytes(id) for id in (6, 9)] == [b" the", b"s"]
    assert words.decode(words.encode("The cats")) == "the cats"
    letters = HuggingFaceTokenizer(sentencepiece())
    ids = letters.encode("the üü the")
    assert letters.decode(ids) == "the üü the"
    assert letters.id_to_bytes(3 + 0xC3) == b"\xc3" and letters.id_to_bytes(265) == b" the"
    assert letters.token_bytes()[ids].sum() == len(" the üü the".encode())


def test_a_file_that_would_cut_or_pad():
    peer = unigram()
    peer.enable_truncation(3)
    peer.enable_padding(length=9)
    tokenizer = HuggingFaceTokenizer(peer)
    assert len(tokenizer.encode("the cat a cat the")) > 3 and tokenizer.encode("") == []
    assert tokenizer.encode(["", "the"])[0] == []


def test_added_tokens_that_are_not_special(trained):
    """They are found in text, as Hugging Face finds them."""
    data = json.loads(trained.to_json())
    del data["model"]["jaxchat"]
    data["added_tokens"].append({**data["added_tokens"][0], "id": 700, "content": "<tool>", "special": False})
    tokenizer = HuggingFaceTokenizer.from_text(json.dumps(data))
    assert 700 in tokenizer.encode("a<tool>b") and tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool>b"
    assert "<tool>" not in tokenizer.special_tokens and tokenizer.token_bytes()[700] == 6


def test_a_chat_token_that_was_plain():
    """A vocabulary may have the name of one of our special tokens as a word."""
    data = json.loads(unigram().to_str())
    data["model"]["vocab"].append(["<|bos|>", -1.0])
    tokenizer = HuggingFaceTokenizer.from_text(json.dumps(data))
    assert tokenizer.bos_token_id == len(data["model"]["vocab"]) - 1
    assert tokenizer.bos_token_id not in tokenizer.encode("the <|bos|>")


@pytest.mark.parametrize("last, works", [(30, True), (9, False)])
def test_ids_with_gaps(last, works):
    """The library gives new tokens ids from the number of tokens on, which may be in use."""
    peer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": last}, unk_token="[UNK]"))
    if works:
        tokenizer = HuggingFaceTokenizer(peer)
        assert tokenizer.vocab_size == 31 and sorted(tokenizer.special_tokens.values()) == [*range(3, 12)]
    else:
        with pytest.raises(UserError, match="its ids have gaps, so special tokens cannot be added"):
            HuggingFaceTokenizer(peer)


def test_the_library_may_be_missing(monkeypatch, tmp_path, trained):
    trained.save(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    for call in (
        lambda: HuggingFaceTokenizer.from_directory(tmp_path),
        lambda: HuggingFaceTokenizer.train_from_iterator(["abc"], 265),
        lambda: load_tokenizer(tmp_path, "huggingface"),
    ):
        with pytest.raises(UserError, match="^this needs Hugging Face's tokenizers: pip install tokenizers$"):
            call()
    assert isinstance(load_tokenizer(tmp_path), Tokenizer) and load_tokenizer(tmp_path).pattern == SPLIT_PATTERN
