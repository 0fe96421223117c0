"""The tokenizer stage: the same vocabulary from every input format, progress, and tokenizers given by the user."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxchat.stages.tokenizer as stage
from jaxchat.config import TokenizerConfig
from jaxchat.data.text.folder import find_text
from jaxchat.data.text.shards import iterate_texts, text_bytes
from jaxchat.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from tests.tiny import record, refusal, start
from tests.tokenizer.texts import corpus

TEXTS = corpus(40, 20_000)


@pytest.fixture(scope="module", params=["parquet", "one parquet", "jsonl", "txt"])
def side(request, tmp_path_factory):
    """The training split of a folder of each format: two files, or one with documents held out."""
    folder, third = tmp_path_factory.mktemp("text"), len(TEXTS) // 3
    for i in range(1 if request.param.startswith("one") else 3):
        texts = TEXTS[i * third : (i + 1) * third]
        if request.param.endswith("parquet"):
            pq.write_table(pa.table({"text": [*texts, None, ""]}), folder / f"{i}.parquet", row_group_size=20)
        elif request.param == "jsonl":
            (folder / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            (folder / f"{i}.txt").write_text("\n\n".join(texts))
    return find_text(folder).train


@pytest.mark.parametrize("max_chars", [2_000_000_000, 20_000])
def test_training_is_that_on_the_texts(side, max_chars):
    texts, characters = [], 0
    for text in iterate_texts(side):
        if characters >= max_chars:
            break
        texts.append(text)
        characters += len(text)
    tokenizer, seen = stage.train(TokenizerConfig(vocab_size=400, max_chars=max_chars), side, print)
    assert seen == characters > 0
    assert tokenizer.mergeable_ranks == Tokenizer.train_from_iterator(texts, 400).mergeable_ranks
    config = TokenizerConfig(vocab_size=400, max_chars=max_chars, backend="huggingface")
    other, seen = stage.train(config, side, print)
    assert isinstance(other, HuggingFaceTokenizer) and other.vocab_size == 400 and seen == characters
    size = sum(len(text.encode()) for text in iterate_texts(side))
    assert 0.8 * size < text_bytes(side) < 1.6 * size


def test_how_far_it_is(monkeypatch):
    now = 100.0
    monkeypatch.setattr(stage.time, "monotonic", lambda: now)
    lines = []
    progress = stage.Progress(lines.append, characters=4_000_000, tokens=1000)
    for phase, done, seconds in (
        ("count", 0, 0), ("count", 500_000, 3), ("count", 1_000_000, 3), ("count", 1_200_000, 1),
        ("count", 3_000_000, 11), ("merge", 256, 1), ("merge", 356, 6), ("merge", 1000, 6), ("read", 4_100_000, 9),
    ):  # fmt: skip
        now += seconds
        progress(phase, done)
    assert lines == [
        "tokenizer 1.00M of about 4.00M characters read, 18s left",
        "tokenizer 3.00M of about 4.00M characters read, 6s left",
        "tokenizer 356 of 1,000 tokens learned, 39s left",
        "tokenizer 1,000 of 1,000 tokens learned, 0s left",
    ]
    assert progress.characters == 4_100_000


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(2):
        pq.write_table(pa.table({"text": TEXTS[i::2]}), folder / f"{i}.parquet")
    return folder


def test_the_backend_of_a_run(text_folder, tmp_path):
    arguments = [f"--data={text_folder}", "--stages=tokenizer", "--tokenizer.vocab-size=400"]
    for backend in ("rust", "huggingface"):
        code, _, err = start(tmp_path / backend, *arguments, f"--tokenizer.backend={backend}")
        assert code == 0, err
        facts = record(tmp_path / backend, "tokenizer")["metrics"]
        assert facts["vocab_size"] == 400 and facts["characters"] == sum(map(len, TEXTS[::2]))
        assert load_tokenizer(tmp_path / backend / "tokenizer").vocab_size == 400
    assert "backend" in refusal(start(tmp_path / "x", *arguments, "--tokenizer.backend=fast"))


def test_a_brought_one_of_another_size(text_folder, tmp_path):
    tokenizer = Tokenizer.train_from_iterator(TEXTS, 320)
    tokenizer.save(tmp_path / "own")
    wrong = [f"--tokenizer.path={tmp_path / 'own' / 'tokenizer.json'}", f"--data={text_folder}"]
    for start_of in (["--stages=tokenizer"], ["--dry-run"]):
        message = refusal(start(tmp_path / "run", *wrong, *start_of))
        assert "has 320 tokens, not 300; add --tokenizer.vocab-size=320" in message
    message = refusal(start(tmp_path / "other", f"--tokenizer.path={tmp_path}/x.tiktoken", "--stages=tokenizer"))
    assert "no tokenizer at" in message
