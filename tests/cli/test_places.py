"""Paths on the command line: where a run can live, the home folder, and the command that is printed at the end."""

import os
import shlex

import pytest

from jaxchat.cli.launch import _talk, main
from jaxchat.cli.main import main as jaxchat
from jaxchat.cli.options import configure, named_fields
from tests.tiny import ROOT, refusal

DRY = ("--experiment=quickstart", "--dry-run")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the home folder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "a file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(
    "directory, words",
    {
        "": "--run-dir is empty; name a file or folder",
        "a file": "a file is a file; choose another --run-dir",
        "a file/run": "a file/run is inside {here}/a file, which is a file; choose another --run-dir",
        "photos": "photos is not empty and not a run of jaxchat; choose another --run-dir",
        "link": "link is a link to what does not exist; choose another --run-dir",
        "link/run": "link is a link to what does not exist",
        "loop": "choose another --run-dir",
        "/": "/ is the root folder; give --run-dir a folder of its own, such as runs/mine",
        "photos/../../../../../..//": "is the root folder",
        "~": "{here}/home is the home folder",
        "home/": "home/ is the home folder",
        str(ROOT): f"{ROOT} is the checkout",
        "/dev/null/x": "/dev/null/x is inside /dev/null, which is a file",
        "a\0b": "--run-dir is 'a\\x00b'; it must be text in UTF-8, without null characters",
        "\udcff": "is not UTF-8; rename what it names, or set a UTF-8 locale",
        "x" * 300: "it must be of names of at most 255 bytes",
        "ü" * 200: "it must be of names of at most 255 bytes",
        "a/" * 3000: "it must be at most 4,000 characters long",
        "s4://x/y": "s4://x/y: a run must be on this machine or in gs:// and s3://",
    }.items(),
)
def test_what_cannot_be_a_run_directory(here, capsys, directory, words):
    before = sorted(here.rglob("*"))
    for line in ([*DRY, f"--run-dir={directory}"], ["--experiment=quickstart", f"--run-dir={directory}"]):
        code = main(line)
        assert words.format(here=here) in refusal((code, *capsys.readouterr()))
    if directory == "a file":
        code = jaxchat(["lr-range", "--experiment=quickstart", f"--run-dir={directory}"])
        refusal((code, *capsys.readouterr()))
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write anywhere")
def test_a_place_that_cannot_be_written(here, capsys):
    (here / "photos").chmod(0o500)
    code = main([*DRY, "--run-dir=photos/run"])
    assert "photos cannot be written; choose another --run-dir" in refusal((code, *capsys.readouterr()))


def test_a_tilde_is_the_home_folder_everywhere(here, capsys):
    data = here / "home" / "texts"
    data.mkdir()
    (data / "a.txt").write_text("one\n\ntwo")
    for option in ("--data=~/texts", "--data.path=~/texts"):
        words = [option] if "." in option else []
        folder = None if words else str(data)
        assert configure("quickstart", words, folder, []).data.path == str(data)
    for line, words in {
        ("--data=~/text",): f"data folder '{here}/home/text' does not exist",
        ("--tokenizer.path=~/t.json", "--run-dir=~/r"): f"{here}/home/t.json",
        ("--sft.mixture=chat,~/chats.jsonl", "--run-dir=~/r"): f"{here}/home/chats.jsonl",
    }.items():
        code = main([*DRY, *line])
        assert words in refusal((code, *capsys.readouterr()))
    code = jaxchat(["chat", "--run=~/r", "-p", "Hi"])
    assert f"{here}/home/r" in refusal((code, *capsys.readouterr()))
    code = jaxchat(["tokenizer", "eval", "~/t"])
    assert f"{here}/home/t" in refusal((code, *capsys.readouterr()))
    assert not (here / "~").exists()


@pytest.mark.parametrize("directory", ["runs/x", "my runs/x", "it's", "-x", '"', "$HOME", "a;b", "~x", "ünï"])
def test_the_command_at_the_end_can_be_pasted(capsys, directory):
    _talk(directory)
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("talk to it: ")
    _, command, *run = shlex.split(line)
    assert command == "chat" and run in (["--run", directory], [f"--run={directory}"])


def test_the_fields_that_the_user_names():
    words = ["--sft.mixture", "a", "-1", "--data.no-shuffle", "--pretrain.num_iterations=3", "--seed=1", "--zzz=1"]
    named = named_fields(words)
    assert {"sft.mixture", "data.shuffle", "pretrain.num_iterations", "seed"} <= named
    assert named_fields([]) == frozenset() and named_fields([], "texts") == {"data.path"}
