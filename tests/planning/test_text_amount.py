"""How much text there is: counted exactly in every form, estimated from a sample of much text."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.data.text.folder import find_text
from jaxchat.data.text.shards import iterate_texts
from jaxchat.planning import text_amount
from jaxchat.planning.text_amount import measure_text
from jaxchat.tokenizer import Tokenizer

WORDS = "the of and to in a is that für naïve it was he — as with his on be at by had not 日本 from or have".split()
DRAW = random.Random(3)
DOCUMENTS = [" ".join(DRAW.choices(WORDS, k=DRAW.randrange(5, 300))) for _ in range(300)]
BYTES = sum(len(document.encode()) for document in DOCUMENTS)
HELD_OUT = {"text": "Held out."}


def write_parquet(folder):
    pq.write_table(pa.table({"text": DOCUMENTS}), folder / "train.parquet", row_group_size=64)
    pq.write_table(pa.table({"text": ["Held out."]}), folder / "val.parquet")


def write_jsonl(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (folder / "val.jsonl").write_text(json.dumps(HELD_OUT))


def write_packed(folder):
    (folder / "train.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode())
    )
    (folder / "val.jsonl").write_text(json.dumps(HELD_OUT))


def write_json(folder):
    (folder / "train.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    (folder / "val.json").write_text(json.dumps([HELD_OUT]))


def write_txt(folder):
    for number, text in enumerate(DOCUMENTS):
        (folder / f"train-{number:03d}.txt").write_text(text)
    (folder / "val.txt").write_text("Held out.")


@pytest.mark.parametrize("write", [write_parquet, write_jsonl, write_packed, write_json, write_txt])
def test_counted_exactly_in_every_form(tmp_path, write):
    write(tmp_path)
    amount = measure_text(find_text(tmp_path).train, vocab_size=300)
    assert (amount.bytes, amount.documents, amount.exact) == (BYTES, len(DOCUMENTS), True)


def test_tokens_are_those_of_the_tokenizer_that_the_run_will_train(tmp_path):
    write_jsonl(tmp_path)
    amount = measure_text(find_text(tmp_path).train, vocab_size=300)
    ids, _ = Tokenizer.train_from_iterator(DOCUMENTS, 300).encode_to_numpy(DOCUMENTS, prepend="<|bos|>")
    assert amount.tokens(300) == len(ids)


def test_the_users_tokenizer_counts(tmp_path):
    write_jsonl(tmp_path)
    bytewise = Tokenizer([bytes([byte]) for byte in range(256)])
    amount = measure_text(find_text(tmp_path).train, tokenizer=bytewise)
    assert amount.tokens(bytewise.vocab_size) == BYTES + len(DOCUMENTS)


def test_a_file_that_both_sides_share_counts_for_training_only(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(DOCUMENTS))
    text = find_text(tmp_path)
    train, val = list(iterate_texts(text.train)), list(iterate_texts(text.val))
    amount = measure_text(text.train, vocab_size=300)
    assert val and (amount.documents, amount.bytes) == (len(train), sum(len(each.encode()) for each in train))


def test_only_vocabularies_that_the_text_supports(tmp_path):
    write_jsonl(tmp_path)
    side = find_text(tmp_path).train
    amount = measure_text(side)
    assert set(amount.bytes_per_token) < {512, 1024} or set(amount.bytes_per_token) == {265}
    assert measure_text(side, vocab_size=300).tokens(300) < measure_text(side, vocab_size=270).tokens(270)


def test_half_of_the_text_is_in_documents_so_long(tmp_path):
    write_jsonl(tmp_path)
    longer = measure_text(find_text(tmp_path).train, vocab_size=300).longer
    above = sum(size for size in (len(text.encode()) for text in DOCUMENTS) if size >= longer)
    assert BYTES / 2 <= above <= 0.52 * BYTES


def test_much_text_is_estimated_from_a_sample(tmp_path, monkeypatch):
    write_parquet(tmp_path)
    whole = measure_text(find_text(tmp_path).train, vocab_size=300)
    monkeypatch.setattr(text_amount, "READ_BYTES", BYTES // 2)
    amount = measure_text(find_text(tmp_path).train, vocab_size=300)
    assert not amount.exact
    assert amount.bytes == pytest.approx(whole.bytes, rel=0.2)
    assert amount.documents == pytest.approx(whole.documents, rel=0.2)
    assert amount.tokens(300) == pytest.approx(whole.tokens(300), rel=0.25)
