"""What names of files say: whole words are believed, parts of words are not."""

from pathlib import Path, PurePath

import pytest

from jaxchat.data.text.forms import bare_name, form_of
from jaxchat.data.text.names import is_about, role_of

ROLES = {
    "train": "train Train TRAIN train-00000-of-00004 train_v2 en.train train1 data/train-00001-of-00002-4a6b8c9d0e1f "
             "train/part0 books/train/a train_part2 wiki.train data-train-0 training val/train",
    "val": "val dev valid validation VALID validation-00000-of-00001 TinyStoriesV2-GPT4-valid val2 dev-v2.0 dev-clean "
           "heldout held-out held_out_1 val/a a/validation/b wiki.val val_set test/dev",
    "test": "test test-00000-of-00001 wiki.test test_set test/x Testing eval evaluation eval/part1",
    None: "trainspotting evaluate contest validate pretrain devil valley letters a the_test_of_time data latest 2024 "
          "part-00000-of-00001 protest a/b/c _ restrained",
}  # fmt: skip


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLES.items() for name in names.split()])
def test_a_role_is_stated_by_a_whole_word_at_either_end(role, name):
    assert role_of(PurePath(name)) == role


@pytest.mark.parametrize(
    "name", ["README", "readme", "Readme-en", "LICENSE", "license-mit", "COPYING", "notes", "CHANGELOG", "NOTICE"]
)
def test_files_about_the_text(name):
    assert is_about(name)


@pytest.mark.parametrize("name", ["notes from underground", "letters", "the license", "unread", "about_a_boy", ""])
def test_files_that_are_text(name):
    assert not is_about(name)


@pytest.mark.parametrize(
    ("name", "form", "bare"),
    [
        ("a.parquet", ("parquet", ""), "a"), ("A.PARQUET", ("parquet", ""), "A"), ("a.jsonl", ("jsonl", ""), "a"),
        ("a.JSONL.GZ", ("jsonl", ".gz"), "a"), ("a.b.ndjson.zst", ("jsonl", ".zst"), "a.b"),
        ("a.json", ("json", ""), "a"), ("a.parquet.gz", None, "a.parquet.gz"),
        ("a.Txt", ("txt", ""), "a"), ("a.txt.bz2", ("txt", ".bz2"), "a"), ("a.txt.xz", ("txt", ".xz"), "a"),
        ("a.jsonl.lz4", ("jsonl", ".lz4"), "a"), ("a.jsonl.br", ("jsonl", ".br"), "a"),
        ("a.csv", None, "a.csv"), ("txt", None, "txt"), ("a.txt~", None, "a.txt~"), ("a.md", None, "a.md"),
    ],
)  # fmt: skip
def test_the_form_is_in_the_ending(name, form, bare):
    assert form_of(Path("x") / name) == form and bare_name(Path("x") / name) == bare
