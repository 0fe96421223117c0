"""A script without spaces, whose characters are several tokens each: from a folder of text to an answer."""

import json
import math
import re

import pytest

from jaxchat.cli.launch import main as launch
from jaxchat.infer.text import TextStream
from jaxchat.infer.trained import load_model
from jaxchat.runs.metrics import read_metrics
from jaxchat.tokenizer import load_tokenizer

EATS = {"猫": "魚", "犬": "肉", "鳥": "種", "馬": "草"}


def page(start):
    """A document in which each animal comes several times."""
    animals = list(EATS) * 5
    return "".join(f"{animal}は{EATS[animal]}が好きです。" for animal in animals[start : start + 12])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("japanese")
    for name, pages in {"train": range(80), "val": range(4)}.items():
        rows = [json.dumps({"text": page(i % 4)}, ensure_ascii=False) for i in pages]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    code = launch([
        "--experiment=quickstart", f"--data={folder}", f"--run-dir={folder / 'run'}", "--stages=tokenizer,pretrain",
        "--tokenizer.vocab-size=272", "--model.depth=1", "--model.sequence-len=64", "--pretrain.num-iterations=60",
        "--pretrain.batch-tokens=512", "--pretrain.device-rows=2", "--pretrain.eval-every=60",
        "--pretrain.eval-tokens=512", "--pretrain.sample-every=0", "--pretrain.save-every=0",
    ])  # fmt: skip
    assert code == 0
    return folder / "run"


def test_bits_per_byte_are_of_bytes(run):
    """Before the first step all tokens are equally likely."""
    tokenizer = load_tokenizer(run / "tokenizer")
    text = "".join(page(i) for i in range(4))
    expected = math.log2(tokenizer.vocab_size) * len(tokenizer.encode(text)) / len(text.encode())
    bpb = [line["bpb"] for line in read_metrics(run) if line["stage"] == "pretrain" and "bpb" in line]
    assert bpb[0] == pytest.approx(expected, rel=0.03)
    assert bpb[-1] < 0.5


def test_characters_come_whole_where_tokens_are_bytes(run):
    model = load_model(run, "pretrain")
    tokenizer = model.tokenizer
    prompt = tokenizer.encode("犬は")
    (answer,) = model.engine().generate([[tokenizer.bos_token_id, *prompt]], max_new_tokens=40, temperature=0.0)
    assert len(answer.tokens) > 1.5 * len(tokenizer.decode(answer.tokens))
    stream = TextStream(tokenizer)
    pieces = [stream.add(token)[0] for token in answer.tokens]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) + stream.flush() == tokenizer.decode(answer.tokens)
    assert re.match("肉が好きです。", "".join(pieces))
