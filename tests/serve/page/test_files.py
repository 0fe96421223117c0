"""The page's files: all there, unchanged where they are not ours, and loading nothing from elsewhere."""

import hashlib
import re
from importlib.resources import files

import pytest

PAGE = files("jaxchat.serve.http") / "page"
OWN = sorted((each for each in PAGE.iterdir() if each.is_file()), key=lambda each: each.name)
SUMS = dict(reversed(line.split(maxsplit=1)) for line in (PAGE / "vendor" / "SHA256SUMS").read_text().splitlines())


def test_libraries_are_unchanged():
    there = {each.name for each in (PAGE / "vendor").iterdir()} - {"README.md", "SHA256SUMS"}
    assert there == set(SUMS)
    for name, expected in SUMS.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == expected, name


def test_each_library_has_its_licence_and_is_named():
    readme = (PAGE / "vendor" / "README.md").read_text()
    for name in SUMS:
        assert f"`{name}`" in readme
        if not name.endswith(".LICENSE"):
            assert f"{name.split('.')[0]}.LICENSE" in SUMS


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.name)
def test_files_load_nothing_from_elsewhere(file):
    text = file.read_text()
    addresses = set(re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+[^\s\"')]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    named = re.findall(r"(?:from|import\(|import) ?\(?\"(\./[^\"]+)\"", text) if file.name.endswith(".js") else []
    if file.name.endswith(".html"):
        named = re.findall(r"(?:href|src)=\"([^#\"]+)\"", text)
    for name in named:
        assert PAGE.joinpath(*name.removeprefix("./").split("/")).is_file(), name


def test_the_page_needs_no_exception_from_its_policy():
    text = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", text)
    for file in OWN:
        if file.name.endswith(".js"):
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", file.read_text()
            ), file.name
