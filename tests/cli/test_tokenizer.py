"""`jaxchat tokenizer eval` on real files of every kind."""

import base64
import json
import shutil

import pytest
import tokenizers

from jaxchat.cli.main import main
from jaxchat.config import DataConfig, Experiment
from jaxchat.data.synthetic import write_synthetic
from jaxchat.runs.config_json import to_json
from jaxchat.tokenizer import SPLIT_PATTERN, Tokenizer
from jaxchat.tokenizer.compare import samples
from jaxchat.tokenizer.patterns import R50K_PATTERN


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory with its text, and tokenizers in the three kinds of file."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text"
    text.mkdir()
    for name in ("a", "b", "c"):
        (text / f"{name}.txt").write_text(f"{name}: " + "zyxo qophu zyxo vwug. " * 40)
    run = folder / "run"
    Tokenizer.train_from_iterator(["zyxo qophu zyxo vwug. "] * 3, 275).save(run / "tokenizer")
    (run / "config.json").write_text(to_json(Experiment(name="tiny", data=DataConfig(path=str(text)))))
    news = Tokenizer.train_from_iterator(samples()["news"], 400)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in news.mergeable_ranks.items()]
    for name in ("news", "r50k_base"):
        (folder / f"{name}.tiktoken").write_text("\n".join(lines) + "\n")
    news.save(folder / "news")
    lower = tokenizers.Tokenizer.from_file(str(folder / "news" / "tokenizer.json"))
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(folder / "lower.json"))
    return folder


def ask(capsys, *arguments):
    code = main(["tokenizer", "eval", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_table(made, capsys):
    code, out, err = ask(capsys, made / "run", "--against", made / "news", made / "lower.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["A", str(made / "run"), "275", "tokens"]
    rows = {line[:17].strip(): line[17:].split() for line in lines}
    assert {*samples(), "training text", "validation text"} <= set(rows)
    assert rows["news"][2].endswith("*"), "the one that was trained on it is the best"
    assert rows["training text"][1].endswith("*") and rows["training text"][-1].startswith("+")
    assert float(rows["korean"][1].strip("*")) == 1, "no token but bytes is of use there"
    assert lines[-1].startswith("! C does not give the text back") and "news" in lines[-1] and "korean" not in lines[-1]


def test_json(made, capsys):
    against = [made / "news.tiktoken", made / "r50k_base.tiktoken"]
    options = ["--pattern", SPLIT_PATTERN, "--text", made / "text", "--json"]
    code, out, err = ask(capsys, made / "news", "--against", *against, *options)
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert [one["path"] for one in data["tokenizers"]] == [str(path) for path in (made / "news", *against)]
    assert data["tokenizers"][0]["vocab_size"] == 400
    texts = {row["text"]: row for row in data["texts"]}
    assert list(texts) == [*samples(), "training text", "validation text"]
    sample, math = samples()["math"][0], texts["math"]
    news = Tokenizer.from_directory(made / "news")
    tokens = len(news.encode(sample))
    otherwise = len(Tokenizer.from_mergeable_ranks(news.mergeable_ranks, R50K_PATTERN).encode(sample))
    assert otherwise != tokens, "GPT-2's pattern cuts otherwise"
    assert math["tokens"] == [tokens, tokens, otherwise] and math["gives_text_back"] == [True] * 3
    assert math["bytes"] == len(sample.encode()) and math["bytes_per_token"][0] == math["bytes"] / tokens
    assert math["more_tokens_than_first"] == [0, 0, otherwise / tokens - 1]
    assert texts["training text"]["bytes"] == 2 * texts["validation text"]["bytes"]


def test_text_of_one_file(made, tmp_path, capsys):
    write_synthetic(tmp_path, seed=0, documents=100, conversations=100)
    for path in (made / "text" / "a.txt", next((tmp_path / "pretrain").glob("*.parquet"))):
        code, out, err = ask(capsys, made / "news", "--text", path)
        assert (code, err) == (0, "") and out.splitlines()[-1].startswith("text  ")


def test_text_of_a_run_that_has_gone(made, tmp_path, capsys):
    """The generated text of a run is in the run; without any, the samples must do."""
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(to_json(Experiment(name="tiny")))
    code, out, err = ask(capsys, tmp_path / "run")
    assert code == 0 and "training text" not in out
    assert len(err.splitlines()) == 1 and "run/data does not exist" in err and "--text" in err
    shutil.copytree(made / "text", tmp_path / "run" / "data" / "pretrain")
    code, out, err = ask(capsys, tmp_path / "run")
    assert (code, err) == (0, "") and "training text" in out and "validation text" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "nowhere"),
        (["news", "--against", "nowhere.json"], "nowhere.json"),
        (["cut.json"], "cut.json"),
        (["news", "--against", "cut.tiktoken", "--pattern", "."], "cut.tiktoken"),
        (["news", "--against", "news.tiktoken"], "news.tiktoken has no split pattern; give --pattern"),
        (["news.tiktoken", "--pattern", "("], "pattern does not compile"),
        (["news", "--against", "gone.tiktoken"], "gone.tiktoken"),
        (["news", "--text", "gone"], "gone"),
        (["news", "--text", "news.tiktoken"], "give a .parquet, .jsonl or .txt file"),
        (["news", "--text", "empty.txt"], "empty.txt contains no text"),
        ([], "the following arguments are required"),
    ],
)
def test_errors(made, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(made)
    (made / "cut.json").write_text((made / "lower.json").read_text()[:5000])
    (made / "cut.tiktoken").write_text((made / "news.tiktoken").read_text()[:-7])
    (made / "empty.txt").write_text("")
    code, out, err = ask(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and said in err and len(err.splitlines()) == 1
