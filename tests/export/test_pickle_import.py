"""Pickles read as data: nothing that they contain is run, whatever they contain."""

import builtins
import collections
import os
import pickle
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.export.pickles import Made, read_pickle
from tests.export import golden

KEYS = st.text() | st.binary() | st.integers()
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)
ENCODING = pickle.dumps(golden.tokenizer().to_tiktoken())


@given(DATA, st.sampled_from([3, 4, 5]))
def test_plain_data_is_read_as_it_was(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol), ()) == value


def test_an_object_becomes_what_it_would_be_made_of():
    ordered = collections.OrderedDict(a=1)
    made = read_pickle(pickle.dumps(ordered), {"collections.OrderedDict"})
    assert isinstance(made, Made) and (made.name, made.args, made.items) == ("collections.OrderedDict", (), {"a": 1})
    made = read_pickle(ENCODING, {"tiktoken.core.Encoding"})
    assert made.name == "tiktoken.core.Encoding" and made.state["mergeable_ranks"][b"a"] == 97


class Evil:
    """Runs something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


EVIL = [
    (builtins.open, "posix.txt", "w"),
    (os.system, "touch posix.txt"),
    (subprocess.check_output, ["touch", "posix.txt"]),
    (builtins.eval, "open('posix.txt', 'w')"),
    (builtins.exec, "open('posix.txt', 'w')"),
    (getattr, "", "upper"),
]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("call", EVIL, ids=lambda call: call[0].__name__)
def test_nothing_is_run(call, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"weights": [Evil(*call)]}, protocol)
    with pytest.raises(ValueError, match=rf"it names [\w.]*{call[0].__name__}, which jaxchat neither runs nor needs"):
        read_pickle(data, {"collections.OrderedDict", "tiktoken.core.Encoding"})
    assert not list(tmp_path.iterdir())
    if call[0] is builtins.open:  # which would have been run
        pickle.loads(data)["weights"][0].close()
        assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"(S'touch x'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'touch x'\no.", "os.system"),
        (b"\x82\x01.", "EXT1"),
        (b"Pid\n.", "PERSID"),
        (b"\x80\x04]\x8c\x06system\x93.", "no text"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.", "os.system"),
        (b"\x80\x04}}\x94]ss.", "neither text nor a number"),
        (b"\x80\x04K\x01}b.", "no whole pickle"),
        (b"\x80\x04h\x07.", "no whole pickle"),
        (b"", "exhausted"),
        (b"not a pickle", "unknown"),
    ],
)
def test_instructions_that_data_does_not_need(data, what):
    with pytest.raises(ValueError, match=what):
        read_pickle(data, {"collections.OrderedDict"})


def test_keys_that_take_forever_to_hash_are_refused():
    """Tuples in tuples, each holding the last one twice: 2^200 parts."""
    data = b"\x80\x02}" + b"K\x01" + b"q\x00h\x00\x86" * 200 + b"K\x01s."
    with pytest.raises(ValueError, match="neither text nor a number"):
        read_pickle(data, ())


@given(st.integers(0, len(ENCODING) - 1), st.integers(0, 255))
def test_a_damaged_pickle_is_an_error_or_data(place, byte):
    damaged = ENCODING[:place] + bytes([byte]) + ENCODING[place + 1 :]
    for data in (damaged, ENCODING[:place]):
        try:
            read_pickle(data, {"tiktoken.core.Encoding"})
        except ValueError:
            continue
        assert data is damaged
