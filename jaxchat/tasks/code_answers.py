"""Finds the Python in what a model has answered: the code that defines a function, or that completes it."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_FENCE = re.compile(r"(?P<indent>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<mark>`{3,}|~{3,})(?P<info>[^`]*)")
_INLINE = re.compile(r"(`+)(?:(?:python|py)[ \t]+)?([^`\n]+)\1")
_PYTHON = re.compile(r"[\s{.]*py(?:thon)?[\d.]*\b", re.IGNORECASE)
_STATEMENT = re.compile(r"(?:from|import|def|class|async)\b|@|[A-Za-z_]\w*\s*(?::|=)")
_LONGEST = 100_000  # characters that are read as Python; parsing takes memory
_ATTEMPTS = 16  # ends that are tried for a block, and beginnings for code without a fence
_MOST_FENCES = 100  # that are read; no sensible answer has more


@dataclass(frozen=True)
class _Block:
    """A fenced block: `info` stands behind the fence; `closed` says whether another fence ends it."""

    info: str
    code: str
    closed: bool


def extract_code(text: str, entry_point: str, *, cut: bool = False) -> str:
    """The code in `text` that defines `entry_point`, or else what may be the body of the function.

    The first of these that there is:

    1. The first fenced block that is Python and defines the function, whatever its language is said to be, with the
       imports, functions and classes of the other blocks. One where the function has no body, since the question is
       repeated, comes last. Fences are those of CommonMark: three or more backticks or
       tildes, in lists and quotations too. One that is not closed goes to the end. One inside a string of the code,
       such as a docstring, does not end it.
    2. The first stretch of unfenced lines that is Python and defines the function; prose around it is left out.
    3. Code between backticks within a line that defines the function.
    4. For the body: the first fenced block that is said to be Python, or the first block, or without any all text.

    Args:
      cut: the text had no room to end; unless a fence closes it, its last line may be incomplete and does not count.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if cut and not _FENCE.fullmatch(lines[-1]):
        lines = lines[:-1]
    blocks, unfenced = _split(lines)
    codes = [block.code if block.closed else _valid_beginning(block.code.split("\n")) for block in blocks]
    whole = [index for index, code in enumerate(codes) if entry_point in _names(_parse(code))]
    if whole:
        index = next((index for index in whole if not _is_stub(_parse(codes[index]), entry_point)), whole[0])
        return _with_definitions(codes[index], blocks[:index] + blocks[index + 1 :])
    for code in _stretches(unfenced):
        if entry_point in _names(_parse(code)):
            return code
    for found in _INLINE.finditer("\n".join(unfenced)):
        if entry_point in _names(_parse(found[2])):
            return found[2]
    named = [block for block in blocks if _PYTHON.match(block.info)]
    return next((block.code for block in (*named, *blocks)), "\n".join(lines))


def complete_function(prompt: str, body: str, entry_point: str) -> str:
    """The prompt with `body` behind it, indented so that it continues the function `entry_point`, if it can be."""
    shifted = textwrap.indent(textwrap.dedent(body), "    ")
    first_shifted = f"    {body.lstrip()}"  # the first line has lost its indentation, the others have not
    for candidate in (body, shifted, first_shifted):
        program = f"{prompt.rstrip()}\n{candidate}"
        for code in (program, _valid_beginning(program.split("\n"))):
            if _has_body(_parse(code), entry_point):
                return code
    return prompt + body


def defines(code: str, name: str) -> bool:
    """Whether `code` is Python that gives `name` a value at its top level."""
    return name in _names(_parse(code))


def _split(lines: Sequence[str]) -> tuple[list[_Block], list[str]]:
    """The fenced blocks among `lines`, and the lines outside of them."""
    fences = [(number, found) for number, line in enumerate(lines) if (found := _FENCE.fullmatch(line))]
    del fences[_MOST_FENCES:]
    blocks, unfenced, start, position = [], [], 0, 0
    while position < len(fences):
        first, opening = fences[position]
        end, closed = _end_of_block(lines, fences[position:])
        unfenced += lines[start:first]
        last = fences[position + end][0] if end is not None else len(lines)
        blocks.append(_Block(opening["info"], _content(lines[first + 1 : last], opening["indent"]), end is not None))
        start = last + closed
        position = position + end + closed if end is not None else len(fences)
    return blocks, unfenced + list(lines[start:])


def _end_of_block(lines: Sequence[str], fences: Sequence[tuple[int, re.Match[str]]]) -> tuple[int | None, bool]:
    """Which of `fences` ends the block that the first of them opens, and whether it belongs to the block.

    The first that leaves valid Python before it, since a fence may stand in a string; or else the next, which opens
    another block if it has a language behind it.
    """
    first, opening = fences[0]
    closing = [
        index
        for index, (_, found) in enumerate(fences[1:], start=1)
        if found["mark"].startswith(opening["mark"]) and not found["info"].strip()
    ]
    for index in closing[:_ATTEMPTS]:
        if _parse(_content(lines[first + 1 : fences[index][0]], opening["indent"])):
            return index, True
    another = [index for index, (_, found) in enumerate(fences[1:], start=1) if found["info"].strip()]
    ends = sorted(closing[:1] + another[:1])
    return (ends[0], ends[0] in closing) if ends else (None, False)


def _content(lines: Sequence[str], indent: str) -> str:
    """The lines of a block whose fence is indented by `indent`, without that much indentation and without `>`."""
    if ">" in indent:
        lines = [re.sub(r"^[ \t]*>+ ?", "", line) for line in lines]
        indent = ""
    code = "\n".join(_shifted(lines, len(indent)))
    return code if _parse(code) else textwrap.dedent("\n".join(lines)) if indent else code


def _shifted(lines: Sequence[str], width: int) -> list[str]:
    """The lines without up to `width` characters of their indentation."""
    return [line[min(width, len(line) - len(line.lstrip())) :] for line in lines]


def _stretches(lines: Sequence[str]) -> Iterator[str]:
    """Stretches of the lines that may be Python: from a line that looks like a statement, without its indentation."""
    starts = [number for number, line in enumerate(lines) if _STATEMENT.match(line.lstrip())]
    for start in starts[:_ATTEMPTS]:
        width = len(lines[start]) - len(lines[start].lstrip())
        yield _valid_beginning(_shifted(lines[start:], width))


def _valid_beginning(lines: Sequence[str]) -> str:
    """The lines up to the first that is neither Python nor indented; empty if that is the first, or none is Python."""
    lines = list(lines)
    for _ in range(_ATTEMPTS):
        tree, wrong = _parse_or_line("\n".join(lines))
        if tree is not None:
            return "\n".join(lines)
        kept = max((i for i, line in enumerate(lines[:wrong]) if line[:1].strip()), default=0)
        lines = lines[:kept]
    return ""


def _with_definitions(code: str, others: Sequence[_Block]) -> str:
    """`code` with what the other blocks import and define, where it does not do so itself."""
    known, added = set(_names(_parse(code))), []
    for block in others:
        tree = _parse(block.code)
        lines = block.code.split("\n")
        for node in tree.body if tree else ():
            names = set(_names(ast.Module([node], [])))
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            definition = isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
            if definition and not future and not names & known:
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
                added += lines[first - 1 : node.end_lineno]
                known |= names
    pieces = ["\n".join(added), code]
    # An import from __future__ has to come first.
    return "\n".join(pieces[::-1] if "__future__" in code else pieces) if added else code


def _parse(code: str) -> ast.Module | None:
    return _parse_or_line(code)[0]


def _parse_or_line(code: str) -> tuple[ast.Module | None, int]:
    """The tree, or None and the number of lines up to the one that is wrong."""
    if len(code) > _LONGEST:
        return None, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes such as "\d"
        try:
            tree = ast.parse(code)
            if any(isinstance(node, ast.Return) for node in _top_level(tree)):
                return None, 0  # the body of a function
            return tree, 0
        except SyntaxError as error:
            return None, error.lineno or 0
        except (ValueError, RecursionError, MemoryError):  # a null byte, or nested too deeply
            return None, 0


def _names(tree: ast.Module | None) -> Iterator[str]:
    """The names that the top level of a module defines."""
    for node in _top_level(tree) if tree else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a module that are not inside a function or a class."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _is_stub(tree: ast.Module | None, name: str) -> bool:
    """Whether the function `name` has nothing but a docstring, `pass` or `...`."""
    functions = [
        node for node in (tree.body if tree else ()) if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    return bool(functions) and all(
        isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in functions[-1].body
    )


def _has_body(tree: ast.Module | None, name: str) -> bool:
    """Whether the function `name` does more than to have a docstring."""
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return len(node.body) > (ast.get_docstring(node) is not None)
    return False
