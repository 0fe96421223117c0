"""Help pages: every option has help, says its default, and can be used as it is listed; none of it needs JAX."""

import argparse
import dataclasses
import re
import subprocess
import sys

import pytest

from jaxchat.cli.experiments import experiment_names, load_experiment
from jaxchat.cli.field_help import UNLISTED, add_fields, field_help
from jaxchat.cli.launch import launch_parser, main
from jaxchat.cli.main import jaxchat_parser
from jaxchat.cli.main import main as jaxchat
from jaxchat.cli.options import field_types, override
from jaxchat.cli.parser import Parser
from jaxchat.config import Experiment
from tests.tiny import ROOT, refusal


def parsers(parser):
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def sections(config):
    """The classes of a configuration."""
    yield type(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(getattr(config, field.name)):
            yield from sections(getattr(config, field.name))


def is_sentence(text):
    return bool(re.match(r"[A-Z0-9]", text)) and text.endswith((".", ")")) and "\n" not in text


ALL_PARSERS = {parser.prog: parser for parser in (launch_parser(), *parsers(jaxchat_parser()))}


@pytest.mark.parametrize("parser", ALL_PARSERS.values(), ids=ALL_PARSERS)
def test_every_option_has_help_with_its_default(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                assert is_sentence(choice.help or ""), (parser.prog, choice.dest)
            continue
        assert is_sentence(action.help or ""), (parser.prog, action.option_strings or action.dest)
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert action.help.endswith(f"(default {action.default})"), action.help


@pytest.mark.parametrize("section", sorted(set(sections(Experiment())), key=lambda cls: cls.__name__))
def test_every_field_has_help(section):
    helps = field_help(section)
    for field in dataclasses.fields(section):
        if isinstance(field.default_factory, type):  # a section: its class documents it
            assert is_sentence(field.default_factory.__doc__)
        else:
            assert is_sentence(helps.get(field.name, "")), f"{section.__name__}.{field.name} has no help"


def test_a_field_without_help_is_found():
    """Whether the tests above could fail: the string must be right under the field."""
    helps = field_help(Undocumented)
    assert helps == {"said": "Inherited.", "own": "Over two lines."}


@dataclasses.dataclass(frozen=True)
class Documented:
    said: int = 0
    """Inherited."""


@dataclasses.dataclass(frozen=True)
class Undocumented(Documented):
    bare: int = 0
    own: int = 0
    """Over
    two lines."""
    said: int = 1

    def method(self):
        """Not a field's."""


def value_of(experiment, name):
    for part in name.split("."):
        experiment = getattr(experiment, part.replace("-", "_"))
    return experiment


def listed_options(experiment):
    """Each listed option with its default, as words of the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    add_fields(parser, experiment)
    for action in parser._actions:
        option = action.option_strings[0]
        value = value_of(experiment, option.removeprefix("--"))
        if isinstance(value, bool):
            yield [action.option_strings[not value]]
        else:
            yield [option, *map(str, value if isinstance(value, tuple) else [value])]


LISTED = [*listed_options(load_experiment("quickstart"))]


@pytest.mark.parametrize("words", LISTED, ids=lambda words: words[0])
def test_every_listed_option_can_be_used(words):
    experiment = load_experiment("quickstart")
    assert override(experiment, words) == experiment


@pytest.mark.parametrize("name", experiment_names())
def test_all_listed_options_can_be_used_together(name):
    experiment = load_experiment(name)
    words = [*listed_options(experiment)]
    assert {option.removeprefix("--").replace(".no-", ".") for option, *_ in words} == set(field_types(Experiment)) - {
        *UNLISTED
    }
    assert override(experiment, sum(words, [])) == experiment


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_page_of_an_experiment(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["--help", "--experiment=d12"]) == 0
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert all(len(line) <= int(columns) for line in lines), max(lines, key=len)
    for noise in ("STR", "INT", "FLOAT", "NoneType", "Literal", "tuple", "dataclass", "Config"):
        assert noise not in page
    for title in ("options:", "experiment:", "data:", "pretrain:", "pretrain.schedule:", "rl:", "cost:"):
        assert title in lines
    assert "--name" not in page and sum(line.lstrip().startswith("--stages ") for line in lines) == 1
    found = " ".join(page.split())
    assert "--model.depth N Number of layers." in found and "(default 12)" in found
    assert "--pretrain.schedule.decay {linear,cosine} Shape of the decay. (default linear)" in found
    assert "--data.shuffle, --data.no-shuffle" in found
    assert "--optimizer.newton-schulz-coefficients X X X" in found
    assert "(default fineweb-edu:60, smoltalk, mmlu, arc, gsm8k, humaneval)" in found


PROGRAM = """
import sys
from jaxchat.cli.{module} import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
assert "jax" not in sys.modules, "waits for JAX"
sys.exit(code)
"""


@pytest.mark.parametrize(
    "module, arguments, code",
    [
        ("launch", "--help --experiment=quickstart", 0),
        ("launch", "--list", 0),
        ("launch", "--experiment=quickstart --pretrain.num-iterations=x", 2),
        ("launch", "--experiment=quickstart --data=nowhere", 2),
        ("launch", "--experiment=quickstart --rl.top-k=0", 2),
        ("launch", "--experiment=quickstart --rl.tasks=leters", 2),
        ("launch", "--experiment=quickstart --run-dir=launch.py", 2),
        ("launch", "--experiment=quickstart --num-processes=2", 2),
        ("main", "--help", 0),
        ("main", "chat --help", 0),
        ("main", "serve --help", 0),
        ("main", "eval --help", 0),
        ("main", "eval --run=x --tasks sumz", 2),
        ("main", "lr-range --experiment=quickstart --seed=x", 2),
        ("main", "data list", 0),
    ],
)
def test_help_and_bad_input_do_not_wait_for_jax(module, arguments, code):
    command = [sys.executable, "-c", PROGRAM.format(module=module), *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "waits" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    {
        "": "the following arguments are required: COMMAND; see jaxchat --help",
        "chatt": "unknown command 'chatt', did you mean 'chat'? Choose from chat, serve, ",
        "tokenizer evl": "unknown command 'evl', did you mean 'eval'?",
        "--hlep": "unknown option --hlep, did you mean '--help'? See jaxchat --help",
        # before argparse complains that --run is missing
        "chat --runn x": "unknown option --runn, did you mean '--run'? See jaxchat chat --help",
        "chat --run=x --temprature=1": "unknown option --temprature, did you mean '--temperature'?",
        "chat --run": "--run needs a value; see jaxchat chat --help",
        "chat --run=x --top-k=few": "--top-k takes a whole number",
        "chat --run=x --temperature=hot": "--temperature takes a number",
        "chat --run=x y": "unrecognized arguments: y; see jaxchat",
        "data get --chek smoltalk": "unknown option --chek, did you mean '--check'? See jaxchat data get --help",
        "data get x --check=1": "--check takes no value",
        "lr-range --experiment=quickstart --stepz=3": "unknown option --stepz, did you mean '--steps'?",
        "lr-range --group=matrx": "--group: unknown value 'matrx', did you mean 'matrix'? Choose from matrix, ",
        "lr-range --experiment=quickstart --steps=3": "--steps is 3; it must be at least 20",
        "lr-range --experiment=quickstart --min=inf": "--min is inf; it must be finite, above 0",
        "lr-range --experiment quickstrat": "unknown experiment 'quickstrat', did you mean 'quickstart'?",
        "profile --experiment=quickstart --steps=1e9": "--steps takes a whole number",
        "profile --experiment=quickstart --trace=": "--trace is empty; name a file or folder",
        "chat --run=x --temperature=nan": "--temperature is nan; it must be finite, at least 0",
        "chat --run=x --top-k=0": "--top-k is 0; it must be at least 1",
        "chat --run=x --max-tokens=99999999999999999999": "--max-tokens is 99999999999999999999; it must be at most",
        "chat --run=": "--run is empty; name a file or folder",
        "chat -run x": "unknown option -run, did you mean '--run'?",
        "chat --run=x -prompt hi": "unknown option -prompt, did you mean '--prompt'?",
        "--run=x chat": "unknown option --run. See jaxchat --help",
        "data get smoltalk --shards=0": "--shards is 0; it must be at least 1",
        "data gte": "unknown command 'gte', did you mean 'get'?",
        "tokenizer eval ''": "no tokenizer at",
        "profile --experiment=quickstart --model.dept=3": "unknown option --model.dept, did you mean '--model.depth'?",
    }.items(),
)
def test_bad_options_of_jaxchat(capsys, arguments, expected):
    code = jaxchat(arguments.split())
    out, err = capsys.readouterr()
    assert out == "" and expected in refusal((code, out, err))


def test_options_may_be_shortened_and_values_look_like_options():
    parser = Parser(prog="x")
    parser.add_argument("--prompt")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--prom", "hi"]) == argparse.Namespace(prompt="hi", words=[])
    assert parser.parse_args(["--prompt=--hi", "--", "--zzz"]) == argparse.Namespace(prompt="--hi", words=["--zzz"])
