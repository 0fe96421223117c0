"""The programs and commands in docs/clients run as they stand, against a server of another model."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest

from benchmarks.serving.server import ROOT

PAGES = ROOT / "docs" / "clients"


def blocks(name, language):
    """The blocks of a page, and the text that each is followed by, up to the next heading."""
    return re.findall(rf"^```{language}\n(.*?)^```\n", (PAGES / name).read_text(), re.DOTALL | re.MULTILINE)


def run(command, program, url):
    program = program.replace("http://localhost:8000", url)
    return subprocess.run(command, input=program, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("page, package", [("openai.md", "openai"), ("langchain.md", "langchain_openai")])
def test_programs(server, page, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    programs = blocks(page, "python")
    assert len(programs) >= 4
    for program in programs:
        done = run([sys.executable, "-"], program, server.url)
        assert done.returncode == 0, f"{program}\n{done.stderr}"


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("jq"), reason="needs curl and jq")
def test_commands(server):
    commands = blocks("curl.md", "bash")
    assert len(commands) >= 10
    for command in commands:
        done = run(["bash", "-e", "-o", "pipefail"], command, server.url)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        wrong = "http_code" in command  # those that show errors
        assert ('"error":{"message":' in done.stdout) == wrong, f"{command}\n{done.stdout}"


def test_what_is_shown_is_what_a_server_prints():
    """The JSON in the pages is whole, so that readers can rely on its fields."""
    shown = blocks("curl.md", "text")
    answers = [line for text in shown for line in text.splitlines() if line.startswith('{"id":"chatcmpl-')]
    assert answers
    for answer in answers:
        assert {"id", "object", "created", "model", "choices", "usage"} == set(json.loads(answer))
