"""The script that makes a data folder of translated manual pages, on a made-up package."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from jaxchat.tasks import load_task

ROOT = Path(__file__).parent.parent
PAGE = r""".\" a comment
.TH LS 1 "Juli 2022"
.SH BEZEICHNUNG
ls \- Verzeichnis\-Inhalte auflisten
.SH ÜBERSICHT
\fBls\fP [\fIOPTION\fP]… [\fIDATEI\fP]…
.SH BESCHREIBUNG
Zeigt die \fBDateien\fP \(en auch »große\&« \- des
Verzeichnisses, nach dem Namen sortiert.
.PP
.nf
int code = 3;
.fi
.TP
\fB\-a\fP, \fB\-\-all\fP
.B Versteckte
Dateien auch anzeigen, deren Name mit einem Punkt anfängt.
.SH AUTOR
Fehler an <bug@example.org>, bitte.
.PP
Diese Seite ist frei und steht unter der Lizenz, die alle Seiten haben.
"""


def package(path, pages, compression="xz"):
    """A .deb with pages as `de/man1/ls.1`, and a link to each."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, text in pages.items():
            member = tarfile.TarInfo(f"./usr/share/man/{name}.gz")
            packed = gzip.compress(text.encode())
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))
            link = tarfile.TarInfo(f"./usr/share/man/{name.replace('.', '-link.')}.gz")
            link.type, link.linkname = tarfile.SYMTYPE, "x"
            archive.addfile(link)
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"abc", f"data.tar.{compression}": data.getvalue()}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))


def run(*arguments):
    script = [sys.executable, str(ROOT / "examples" / "manpages.py"), *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True, encoding="utf-8")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_package_becomes_a_data_folder(tmp_path):
    names = [f"befehl{first}{second}" for first in "abcde" for second in "stuvwxyz"]
    pages = {
        f"de/man1/{name}.1": PAGE.replace("ls \\-", f"{name} \\-").replace("auflisten", f"auflisten, Art {i}")
        + f".PP\nAbsatz {i} der Seite sagt etwas, das nur hier steht. " * 12
        for i, name in enumerate(names)
    }
    package(tmp_path / "pages.deb", pages)
    result = run(tmp_path / "pages.deb", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    texts = [row["text"] for name in ("train", "val") for row in lines(tmp_path / "data/pretrain" / f"{name}.jsonl")]
    assert len(texts) == 40 and len(lines(tmp_path / "data/pretrain/val.jsonl")) == 2
    for text in texts:  # what all pages say, addresses, code and synopses are left out
        assert text.startswith("befehl") and "Verzeichnis-Inhalte auflisten, Art" in text
        assert not any(left in text for left in ("\\", "@", "int code", "OPTION", "Lizenz", "Zeigt die"))
    for task in ("facts", "sums"):
        asked = load_task(task, "test", tmp_path / "data")
        assert len(asked) >= 80 and all(asked.score(item, said(item)) == 1 for item in asked)
    chats = load_task("chat", "train", tmp_path / "data")
    held_out = {
        item["messages"][0]["content"]
        for task in ("facts", "sums")
        for item in load_task(task, "test", tmp_path / "data")
    }
    assert held_out.isdisjoint(chat["messages"][0]["content"] for chat in chats)
    assert any(chat["messages"][1]["content"] == "befehlaz: Verzeichnis-Inhalte auflisten, Art 7." for chat in chats)


def said(item):
    content = item["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_the_text_of_a_page(tmp_path):
    package(tmp_path / "pages.deb", {"de/man1/ls.1": PAGE + ".PP\nEin letzter Satz steht hier. " * 20}, "gz")
    assert run(tmp_path / "pages.deb", tmp_path / "data").returncode == 0
    (row,) = lines(tmp_path / "data/pretrain/train.jsonl")
    assert row["text"].splitlines()[:3] == [
        "ls - Verzeichnis-Inhalte auflisten",
        "Zeigt die Dateien – auch »große« - des Verzeichnisses, nach dem Namen sortiert.",
        "-a, --all: Versteckte Dateien auch anzeigen, deren Name mit einem Punkt anfängt.",
    ]


@pytest.mark.parametrize("language", ["ja", "zh_CN"])
def test_a_language_without_spaces_or_wordings_gives_its_text(tmp_path, language):
    text = ".SH 名前\nls \\- 一覧を表示する\n.SH 説明\n" + "ファイルの一覧を名前の順に表示する。" * 40
    package(tmp_path / "pages.deb", {f"{language}/man1/ls.1": text})
    result = run(tmp_path / "pages.deb", tmp_path / "data")
    assert result.returncode == 1 and f"no conversations in '{language}' (de, fr, es, ru)" in result.stderr
    (row,) = lines(tmp_path / "data/pretrain/train.jsonl")
    assert row["text"].count("ファイルの一覧を名前の順に表示する。") == 40


def test_what_is_no_package_of_pages_is_one_line(tmp_path):
    (tmp_path / "a.deb").write_bytes(b"no archive at all")
    (tmp_path / "b.deb").write_bytes(b"!<arch>\ncut")
    package(tmp_path / "c.deb", {"man1/ls.1": PAGE})
    for name, message in {
        "a": "is no ar archive",
        "b": "not a Debian package",
        "c": "has no translated",
        "d": "d.deb",
    }.items():
        result = run(tmp_path / f"{name}.deb", tmp_path / "data")
        assert result.returncode == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is not empty" in run(tmp_path / "c.deb", tmp_path / "full").stderr
