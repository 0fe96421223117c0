"""The type stub of the Rust module has the names and signatures that the module has."""

import ast
import inspect
from pathlib import Path

import jaxchat_tokenizer as rust

STUB = ast.parse((Path(__file__).parents[2] / "jaxchat_tokenizer.pyi").read_text())


def public(module):
    return {name for name in vars(module) if not name.startswith("_") and not inspect.ismodule(vars(module)[name])}


def written(function: ast.FunctionDef) -> list[tuple[str, object]]:
    """Names and defaults (`inspect.Parameter.empty` where there is none) of the parameters, without `cls` or `self`."""
    names = [argument.arg for argument in function.args.args if argument.arg not in ("cls", "self")]
    defaults = [ast.literal_eval(default) for default in function.args.defaults]
    return list(zip(names, [inspect.Parameter.empty] * (len(names) - len(defaults)) + defaults, strict=True))


def real(function) -> list[tuple[str, object]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.default) for parameter in parameters if parameter.name != "self"]


def functions(body) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def test_names():
    classes = {node.name for node in STUB.body if isinstance(node, ast.ClassDef)}
    constants = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
    assert classes | constants | set(functions(STUB.body)) == public(rust)
    assert issubclass(rust.TokenizerError, ValueError) and isinstance(rust.DEFAULT_PATTERN, str)


def test_functions():
    for name, function in functions(STUB.body).items():
        assert written(function) == real(getattr(rust, name)), name


def test_methods():
    (encoder,) = (node for node in STUB.body if isinstance(node, ast.ClassDef) and node.name == "Encoder")
    methods = functions(encoder.body)
    assert written(methods.pop("__new__")) == real(rust.Encoder)
    assert set(methods) == {name for name in vars(rust.Encoder) if not name.startswith("_")}
    for name, method in methods.items():
        assert written(method) == real(getattr(rust.Encoder, name)), name
