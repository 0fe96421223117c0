"""What the documents name exists: links, files, options, experiments, rooms, functions, and what their code imports."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

from jaxchat.cli.experiments import experiment_names, load_experiment
from jaxchat.cli.field_help import add_fields
from jaxchat.cli.launch import launch_parser
from jaxchat.cli.main import jaxchat_parser
from jaxchat.cli.parser import option_strings

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "deploy" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
GUIDES = [path for path in DOCUMENTS if path.name not in ("CHANGELOG.md", "RESULTS.md")]
# Options of other programs, which the documents show.
FOREIGN = {
    "--add-host", "--all-targets", "--apply_chat_template", "--command", "--depth", "--hostfile", "--include_path",
    "--local-dir",
    "--map-by", "--mca", "--model", "--model_args", "--network", "--num_fewshot", "--release", "--tasks",
    "--model-impl", "--unbuffered", "--worker",
}  # fmt: skip
# What the recipes of CONTRIBUTING.md create.
NEW = {
    "experiments/mine.py", "jaxchat/cli/count.py", "jaxchat/ops/silu.py", "jaxchat/optim/sign.py",
    "jaxchat/stages/census.py", "jaxchat/tasks/reversal.py", "tests/ops/test_silu.py",
}  # fmt: skip


def name(path):
    return str(path.relative_to(ROOT))


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def prose(path):
    """The document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def headings(path):
    return {slug(line.lstrip("# ")) for line in prose(path).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in headings(target), f"{link}: no such heading"


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_files_that_are_named_exist(path):
    named = re.findall(r"`((?:jaxchat|tests|benchmarks|experiments|deploy|docs|notebooks)/[\w./-]*)`", path.read_text())
    missing = {file for file in named if not (ROOT / file).exists()} - NEW
    assert not missing


def known_options():
    parsers = [jaxchat_parser()]
    launch = launch_parser()
    add_fields(launch, load_experiment("d12"))
    options = set(option_strings(launch))
    while parsers:
        parser = parsers.pop()
        options |= set(option_strings(parser))
        for action in parser._actions:
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
    return options


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_options_that_are_named_exist(path):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", path.read_text()))
    assert named <= known_options() | FOREIGN


def test_the_commands_of_the_readme_come_first():
    text = (ROOT / "README.md").read_text()
    first, second, third, *_ = re.findall(r"^```bash\n(.*?)\n```", text, re.DOTALL | re.MULTILINE)
    assert first.endswith(".venv/bin/python launch.py --experiment=quickstart")
    assert second.endswith(".venv/bin/jaxchat serve --run runs/quickstart --open")
    assert third.endswith(".venv/bin/pytest")


def test_the_readme_lists_all_experiments_and_rooms():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(experiment_names())
    rooms = {path.parent.name for path in (ROOT / "jaxchat").glob("*/__init__.py")}
    assert set(re.findall(r"^      (\w+)/ ", text, re.MULTILINE)) == rooms


def test_contributing_lists_the_tests_of_all_rooms():
    listed = set(re.findall(r"pytest (?:tests/)?([\w/ ]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    listed = {word.removeprefix("tests/") for entry in listed for word in entry.split()}
    assert {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")} <= listed


@pytest.mark.parametrize("path", [ROOT / "docs" / "architecture.md", ROOT / "docs" / "kernels.md"], ids=name)
def test_functions_that_are_named_exist(path):
    code = "\n".join(file.read_text() for file in (ROOT / "jaxchat").rglob("*.py"))
    named = re.findall(r"`([A-Za-z_][\w.]*)`", prose(path))
    words = {part for found in named if not (ROOT / found).exists() for part in found.split(".")}
    assert words
    assert not {word for word in words if not re.search(rf"\b{re.escape(word)}\b", code)}


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_imports_of_python_examples_exist(path):
    for block in re.findall(r"^ *```python\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE):
        try:
            tree = ast.parse(textwrap.dedent(block))
        except SyntaxError:
            continue  # a line to add to a file
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxchat"):
                file = f"{node.module.replace('.', '/')}.py"
                if file not in NEW:
                    module = __import__(node.module, fromlist=["_"])
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_new_modules_of_the_changelog_exist():
    text = (ROOT / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)[1:]
    named = {module for row in rows for module in re.findall(r"`(jaxchat\.[\w.]+)`", row)}
    assert named
    for module in named:
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_name(f"{path.name}.py").exists(), module
