"""The range of every number in the settings: that it has one, and that it is kept, however a section is built."""

import dataclasses
import json
import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import config
from jaxchat.cli.experiments import load_experiment
from jaxchat.cli.options import override
from jaxchat.config import Experiment, Impossible, Section, declared, declared_range
from jaxchat.config.ranges import LARGEST_FLOAT, LARGEST_INT, SMALLEST_FLOAT
from jaxchat.runs.config_json import from_json, to_json

QUICKSTART = load_experiment("quickstart")
SECTIONS = sorted(
    (cls for cls in vars(config).values() if isinstance(cls, type) and issubclass(cls, Section) and cls is not Section),
    key=lambda cls: cls.__name__,
)


def kind_of_number(kind):
    """int or float, for a field that is such a number, or may be, or several; None for another."""
    if kind in (int, float):
        return kind
    return next((part for part in get_args(kind) if part in (int, float)), None)


NUMBERS = [
    (cls, name, kind_of_number(kind)) for cls in SECTIONS for name, kind, _ in declared(cls) if kind_of_number(kind)
]
NAMES = [f"{cls.__name__}.{name}" for cls, name, _ in NUMBERS]
each_number = pytest.mark.parametrize("cls, name, kind", NUMBERS, ids=NAMES)


def limits(cls, name, kind):
    """The least and the greatest number that a field may be."""
    found = declared_range(cls, name)
    least = found.at_least if found.above is None else max(math.nextafter(found.above, math.inf), SMALLEST_FLOAT)
    most = found.at_most if found.below is None else math.nextafter(found.below, -math.inf)
    return least, (LARGEST_INT if kind is int else LARGEST_FLOAT) if most is None else most


def build(cls, name, value):
    """A section with one field set to `value`, or to as many of them as it takes."""
    current = getattr(cls(), name)
    return cls(**{name: (value,) * max(1, len(current)) if isinstance(current, tuple) else value})


def refusal_of(cls, name, value):
    with pytest.raises(Impossible) as refused:
        build(cls, name, value)
    message = str(refused.value)
    assert message.startswith(f"{cls.section}.{name.replace('_', '-')} is ".lstrip(".")), message
    assert "; it must be " in message and "\n" not in message and len(message) < 250
    return message


@each_number
def test_every_number_has_a_range(cls, name, kind):
    found = declared_range(cls, name)
    assert found is not None, "declare it: Annotated[int, Range(at_least=1)]"
    assert found.at_least is not None or found.above is not None, "it has no lower limit"
    value = getattr(cls(), name)
    for number in value if isinstance(value, tuple) else [value]:
        assert number in (None, "auto") or type(number) is kind
        assert number in (None, "auto") or found.problem(number, kind is int) is None, "the default is out of range"


@each_number
def test_values_at_the_limits_and_just_outside(cls, name, kind):
    least, most = limits(cls, name, kind)
    for value in (least, most):
        try:
            built = build(cls, name, kind(value))
        except Impossible as error:  # what depends on other fields
            assert not str(error).endswith(f"it must be {declared_range(cls, name)}"), error
        else:
            found = getattr(built, name)
            assert found == ((value,) * len(found) if isinstance(found, tuple) else value)
    below, above = (
        (least - 1, most + 1) if kind is int else (math.nextafter(least, -math.inf), math.nextafter(most, math.inf))
    )
    for value in (below, above):
        refusal_of(cls, name, value)


@each_number
def test_what_is_no_number_in_range(cls, name, kind):
    for value in (math.inf, -math.inf, math.nan, 1e308, -1e308, 10**30 + 10**15, -(10**30), 10**400, 10**5000):
        refusal_of(cls, name, value)
    for value in (True, False, "3", "", b"3", [], {}, object, 3j):
        refusal_of(cls, name, value)
    if kind is int:
        refusal_of(cls, name, 3.0)
    assert "finite" in refusal_of(cls, name, math.inf) or kind is int


def test_zero_has_no_sign():
    assert math.copysign(1, config.ScheduleConfig(warmup_ratio=-0.0).warmup_ratio) == 1
    with pytest.raises(Impossible, match="^optimizer.clip-norm is -0.0; it must be above 0$"):
        config.OptimizerConfig(clip_norm=-0.0)


def test_the_kind_of_number_is_the_fields():
    """An int where a number is asked for becomes one, as do numpy's: they survive as JSON."""
    epochs = config.FinetuneConfig(epochs=2).epochs
    depth, lanes = config.ModelConfig(depth=np.int64(4)).depth, config.DataConfig(lanes=np.uint8(4)).lanes
    assert [type(epochs), type(depth), type(lanes)] == [float, int, int]
    assert type(config.RLConfig(temperature=np.float32(0.5)).temperature) is float


def places(cls, name):
    """The names on the command line of a field, in each section that has it."""
    for section in dataclasses.fields(Experiment):
        value = getattr(QUICKSTART, section.name)
        if type(value) is cls:
            yield (section.name, name)
        for nested in ("schedule", "phases"):
            if cls is type(getattr(value, nested, None)):
                yield (section.name, nested, name)
    if cls is Experiment:
        yield (name,)


# Fields that are tried on the command line too: of each section one at least.
NAMED = {
    "depth",
    "tensor",
    "adam_eps",
    "max_chars",
    "lanes",
    "epochs",
    "warmup_ratio",
    "top_k",
    "limit",
    "keep",
    "seed",
}
NAMED |= {"expected_mfu", "tokens_per_param", "newton_schulz_coefficients"}
FIELDS = [path for cls, name, _ in NUMBERS for path in places(cls, name)]


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
@pytest.mark.parametrize("value", ["-1e9", "inf", "1" + "0" * 40])
def test_a_number_out_of_range_is_named_with_its_section(path, value):
    """On the command line and in config.json, with one wording."""
    option = ".".join(path).replace("_", "-")
    for_the_command_line = value == "-1e9" and path[-1] in NAMED
    cls, kind = next((cls, kind) for cls, name, kind in NUMBERS if path in places(cls, name))
    current = getattr(cls(), path[-1])
    several = max(1, len(current)) if isinstance(current, tuple) else 0
    if kind is int:
        value = {"-1e9": "-1000000000"}.get(value, value)
    if for_the_command_line:  # slow
        with pytest.raises(Impossible) as refused:
            override(QUICKSTART, [f"--{option}", *([value] * (several or 1))])
        assert str(refused.value).startswith(f"{option} is "), refused.value
        assert "; it must be " in str(refused.value)
    values = json.loads(to_json(QUICKSTART))
    *sections, last = path
    inside = values
    for section in sections:
        inside = inside[section]
    inside[last] = (
        [float(value)] * several
        if several
        else float(value)
        if kind is float
        else int(float(value))
        if value != "inf"
        else math.inf
    )
    with pytest.raises(Impossible) as refused:
        from_json(json.dumps(values))
    assert str(refused.value).startswith(f"{option} is "), refused.value


def test_a_replaced_section_is_checked():
    with pytest.raises(Impossible, match=r"^rl\.top-k is 0; it must be at least 1$"):
        dataclasses.replace(QUICKSTART, rl=dataclasses.replace(QUICKSTART.rl, top_k=0))
    with pytest.raises(Impossible, match=r"^seed is -1; it must be at least 0$"):
        dataclasses.replace(QUICKSTART, seed=-1)


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none(), st.lists(st.text())))
def test_any_value_is_taken_or_refused_in_one_line(value):
    """Whatever the field: nothing but `Impossible`, and what is taken has the field's type."""
    for cls, name, kind in NUMBERS:
        try:
            taken = getattr(build(cls, name, value), name)
        except Impossible as error:
            assert "\n" not in str(error)
        else:
            assert {type(number) for number in (taken if isinstance(taken, tuple) else [taken])} <= {kind, type(None)}


@pytest.mark.parametrize("value", ["", "a\0b", "\udc80", "x" * 5000, 3, ["a"], True])
def test_text_that_is_no_path(value):
    for cls in (config.DataConfig, config.TokenizerConfig):
        refusal_of(cls, "path", value)


def test_lists_of_words():
    assert config.FinetuneConfig(mixture=["chat", "sums:5"]).mixture == ("chat", "sums:5")  # pyright: ignore[reportArgumentType]
    for value in ("chat", ("chat", ""), ("chat", 3), {"chat"}, None):
        with pytest.raises(Impossible, match="^mixture is "):
            config.FinetuneConfig(mixture=value)  # pyright: ignore[reportArgumentType]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert config.DataConfig(path="~/x").path == "/home/ada/x"
    assert config.TokenizerConfig(path="~").path == "/home/ada"
    assert config.FinetuneConfig(mixture=("chat", "~/my chats.jsonl")).mixture == ("chat", "/home/ada/my chats.jsonl")
    assert config.DataConfig(path="a/~b").path == "a/~b"
