"""Imports between modules: the layers hold, there are no cycles, and no file changes the search path."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parent.parent
OURS = [
    "launch.py",
    *(str(path.relative_to(ROOT)) for top in ("jaxchat", "experiments") for path in (ROOT / top).rglob("*.py")),
]


def test_imports_run_downward_only():
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def modules() -> frozenset[str]:
    return frozenset(map(module_of, OURS))


def imported(file: str) -> set[str]:
    """Our own modules that a file imports, anywhere in it, for type checkers too. A module is also taken to import the
    packages it lies in only where it names them."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(submodules & modules() if submodules <= modules() else {node.module} | submodules & modules())
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((ROOT / file).read_text()))
    return found & modules() - {module_of(file)}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """A cycle of imports, if there is one."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


def test_no_imports_form_a_circle():
    imports = {module_of(file): imported(file) for file in OURS}
    assert len(imports) > 50 and imports["launch"], "the files or the imports are not found"
    assert circle(imports) == []


def changes_the_path(source: str) -> bool:
    """Whether a program calls a method of `sys.path`, assigns to it, or adds to it."""

    def is_path(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_path(node.value):
            return True
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(is_path(part) for target in targets if target for part in ast.walk(target)):
            return True
    return False


@pytest.mark.parametrize("line", ["sys.path.insert(0, x)", "sys.path += [x]", "sys.path = []", "sys.path[:0] = [x]"])
def test_a_change_of_the_path_is_found(line):
    assert changes_the_path(f"import sys\n{line}")
    assert not changes_the_path("import sys\nfirst = sys.path[0]\nos.path.join(x)")


def test_no_file_changes_the_path():
    tops = ("jaxchat", "experiments", "tests", "benchmarks", "deploy", "notebooks")
    files = [ROOT / "launch.py", *(path for top in tops for path in (ROOT / top).rglob("*.py"))]
    assert len(files) > 100
    assert [str(path) for path in files if changes_the_path(path.read_text())] == []
