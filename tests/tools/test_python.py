"""Programs of a model: what they cannot do, what they cannot forge, and that nothing of them stays behind."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from jaxchat.tools import seccomp
from jaxchat.tools.python import containment, remove_folder, run_program
from tests.tools.hostile import ESCAPES, assert_nothing_stays, filled, needs_containment, working_folder


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path, monkeypatch):
    """No file and no process of a program is left after a test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert_nothing_stays(tmp_path)


def judge(program, tests, **options):
    tests = "def check(candidate):\n" + textwrap.indent(textwrap.dedent(tests), "    ")
    return run_program(textwrap.dedent(program), entry_point="answer", tests=tests, **options)


def test_programs_run_and_are_judged():
    program = "def answer(x):\n    return [x, 2 * x]\n"
    assert judge(program, "assert candidate(2) == [2, 4]\nassert candidate(x='a') == ['a', 'aa']")
    assert not judge(program, "assert candidate(2) == [2, 5]")
    assert not judge("", "assert candidate(2) == 2")
    assert not judge("answer = 3", "assert candidate(2) == 3")
    assert not run_program("assert False")
    assert not run_program("answer =")
    assert not run_program("\0") and not run_program("x = '\ud800'")


def test_helpers_of_the_tests_are_the_trusted_ones():
    context = "def twice(x):\n    return 2 * x\n"
    program = "def twice(x):\n    return 7\n\ndef answer(x):\n    return 7\n"
    assert not judge(program, "assert candidate(2) == twice(2)", context=context)
    assert judge("def answer(x):\n    return twice(x)\n", "assert answer(2) == candidate(2) == 4", context=context)


def test_exceptions_have_the_class_that_they_had():
    program = """
        def answer(kind):
            if kind == "own":
                class Own(ValueError): pass
                raise Own
            raise {"value": ValueError, "key": KeyError("x"), "exit": SystemExit}[kind]
    """
    test = "try:\n    candidate({!r})\nexcept {}:\n    pass\nelse:\n    assert False"
    assert judge(program, test.format("value", "ValueError")) and judge(program, test.format("key", "KeyError"))
    assert not judge(program, test.format("value", "KeyError"))
    assert judge(program, test.format("own", "ValueError")) and not judge(program, test.format("own", "KeyError"))
    assert not judge(program, test.format("exit", "Exception"))


RAISED = {
    "what a library raises": ("import json\ndef answer(): json.loads('{')", "ValueError", None),
    "its message": ("def answer(): raise ValueError('bad', 3)", "ValueError", "('bad', 3)"),
    "a key": ("def answer(): {}['k']", "KeyError", "'k'"),
    "one with arguments of its own": ("def answer(): b'\\xff'.decode()", "UnicodeDecodeError", None),
    "arguments that are no data": ("def answer(): raise ValueError(int)", "ValueError", None),
}


@pytest.mark.parametrize(("program", "kind", "message"), RAISED.values(), ids=RAISED)
def test_exceptions_of_all_kinds_are_seen(program, kind, message):
    test = (
        f"try:\n    candidate()\nexcept {kind} as error:\n    assert {message!r} in (None, str(error))\nelse:\n    1/0"
    )
    assert judge(program, test)
    assert not judge(program, test.replace(kind, "OSError"))


def test_an_exception_that_has_a_built_in_ones_name_is_another():
    program = "class ValueError(Exception): pass\ndef answer(): raise ValueError"
    assert not judge(program, "try:\n    candidate()\nexcept ValueError:\n    pass")


FORGERIES = {
    "status": "import sys\ndef answer(x):\n    sys.exit(0)",
    "status 87": "import os\nos._exit(87)",
    "status in the function": "import os\ndef answer(x):\n    os._exit(0)",
    "equal to all": "class All(int):\n    def __eq__(self, other): return True\ndef answer(x): return All()",
    "equal to all, no subclass": "class All:\n    def __eq__(self, other): return True\ndef answer(x): return All()",
    "equal to all, inside": "class All(str):\n    def __eq__(self, other): return True\ndef answer(x): return [All()]",
    "equal key": (
        "class K(str):\n  __hash__ = lambda s: 0\n  __eq__ = lambda s, o: True\n"
        "def answer(x): return {K(): 1}"
    ),
    "lies about its class": (
        "class Liar:\n    __class__ = int\n    __index__ = lambda s: 0\ndef answer(x): return Liar()"
    ),
    "attribute for all": "from unittest.mock import MagicMock\ndef answer(x): return MagicMock()",
    "number like NumPy's": "class N:\n    ndim = 0\n    def item(self): return self\ndef answer(x): return N()",
    "builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.all = builtins.eval = None\n"
        "def answer(x): return 0"
    ),
    "json": "import json\njson.dumps = lambda *a: '{\"opaque\": 1}'\ndef answer(x): return 0",
    "says passed": (
        "import os\nfor i in range(64):\n    try: os.write(i, b'passed')\n    except OSError: pass\n"
        "def answer(x): return 0"
    ),
    "says passed and ends": (
        "import os\nfor i in range(64):\n    try: os.write(i, b'passed\\n')\n    except OSError: pass\n"
        "os._exit(0)"
    ),
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef answer(x): raise SystemExit",
    "stops iterating": "def answer(x): raise StopIteration",
    "name of an exit": "class SystemExit(Exception): pass\ndef answer(x): raise SystemExit",
    "name of an exit, by type": "E = type('KeyboardInterrupt', (Exception,), {})\ndef answer(x): raise E",
    "searches memory": (
        "import gc\nfound = [o for o in gc.get_objects() if '=='.join(['candidate(5) ', ' 25']) in str(o)[:9999]]\n"
        "def answer(x): return 25 if found else 0"
    ),
    "searches frames": (
        "import sys\ndef answer(x):\n    frame, seen = sys._getframe(), ''\n    while frame:\n"
        "        seen += repr(frame.f_locals) + repr(frame.f_globals)\n        frame = frame.f_back\n"
        "    return 25 if '=='.join(['candidate(5) ', ' 25']) in seen else 0"
    ),
    "reads the checker": (
        "import os\ndef answer(x):\n    text = open(f'/proc/{os.getppid()}/cmdline').read()\n"
        "    return 25 if open(f'/proc/{os.getppid()}/mem', 'rb') else 0"
    ),
    "ends the checker": "import os\ndef answer(x):\n    os.kill(os.getppid(), 9)\n    return 0",
    "not to be read": (
        "import os\nfor i in range(3, 64):\n    try: os.write(i, b'\\xff\\n')\n    except OSError: pass\n"
        "def answer(x): return 25"
    ),
    "too deep": "def answer(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "in itself": "def answer(x):\n    a = []\n    a.append(a)\n    return a",
    "writes its answers": (
        "import os\nfor i in range(3, 64):\n    for line in ('[\"value\", 25]', '{\"tuple\": [\"passed\", true]}'):\n"
        "        try: os.write(i, line.encode() + b'\\n')\n        except OSError: pass\ndef answer(x): return 0"
    ),
    "writes an exit": (
        "import os\nfor i in range(3, 64):\n"
        "    try: os.write(i, b'{\"tuple\": [\"error\", {\"tuple\": [\"SystemExit\", {\"tuple\": [0]}]}]}\\n' * 9)\n"
        "    except OSError: pass\ndef answer(x): return 0"
    ),
    "changes what sends its answers": (
        "import gc, types\nfor o in gc.get_objects():\n    if isinstance(o, types.FunctionType) and "
        "o.__name__ in ('dumps', '_encode', '_send', '_judge'):\n"
        "        o.__code__ = (lambda *a, **k: True).__code__\ndef answer(x): return 0"
    ),
    "not a number": "def answer(x): return float('nan')",
    "no fraction": (
        "from fractions import Fraction\nclass F(Fraction): numerator = denominator = 0\ndef answer(x): return F(25)"
    ),
    "a text of it": "def answer(x): return str(x * x)",
    "colliding keys": "def answer(x): return {i * (2**61 - 1): 0 for i in range(20000)}",
    "arguments": "import sys\ndef answer(x): return 25 if len(sys.argv) != 1 else 0",
    "closed": "import os\nos.closerange(3, 64)\ndef answer(x): return 25",
}  # fmt: skip


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_a_verdict_cannot_be_forged(program):
    assert not judge(program, "assert candidate(5) == 25")


VALUES = [
    "None", "True", "0", "-(2**60)", "10**5000", "0.1", "float('inf')", r"'é\ud800\n'", r"b'\xff'", "bytearray(b'a')",
    "(1, (2,))", "[[], [1.0, 'a']]", "{1, 2}", "frozenset({(1,)})", "{'a': 1, 5: [2], (1, 2): None}", "{}", "1 + 2j",
    "{'int': 'ff'}", "{'opaque': None}",
]  # fmt: skip


def test_values_keep_their_types():
    same = "assert type(candidate({0})) is type({0}) and candidate({0}) == {0}"
    assert judge("def answer(x):\n    return x\n", "\n".join(same.format(value) for value in VALUES))
    nan = "assert str(candidate(float('nan'))) == 'nan' and str(candidate(-0.0)) == '-0.0' and candidate(True) is True"
    assert judge("def answer(x):\n    return x\n", nan)


PLAIN = {
    "a counter": ("from collections import Counter\ndef answer(): return Counter('aab')", "{'a': 2, 'b': 1}"),
    "a dict with a default": (
        "from collections import defaultdict\ndef answer(): return defaultdict(int, a=1)",
        "{'a': 1}",
    ),
    "a named tuple": (
        "from collections import namedtuple\ndef answer(): return namedtuple('P', 'x y')(1, 2)",
        "(1, 2)",
    ),
    "an enum": ("from enum import IntEnum\nclass E(IntEnum): A = 3\ndef answer(): return [E.A]", "[3]"),
    "a fraction": ("from fractions import Fraction\ndef answer(): return Fraction(1, 2)", "0.5"),
    "a decimal": ("from decimal import Decimal\ndef answer(): return Decimal('0.5')", "0.5"),
    "an ordered dict": (
        "from collections import OrderedDict\ndef answer(): return OrderedDict(b=2, a=1)", "{'a': 1, 'b': 2}"),
    "a chain of dicts": (
        "from collections import ChainMap\ndef answer(): return ChainMap({1: 2}, {3: 4})", "{1: 2, 3: 4}"),
    "a user's dict": ("from collections import UserDict\ndef answer(): return UserDict(a=1)", "{'a': 1}"),
    "a user's list": ("from collections import UserList\ndef answer(): return UserList([1])", "[1]"),
    "a user's string": ("from collections import UserString\ndef answer(): return UserString('a')", "'a'"),
    "a view of a dict": ("from types import MappingProxyType as P\ndef answer(): return P({'a': 1})", "{'a': 1}"),
    "a view of bytes": ("def answer(): return memoryview(b'ab')", "b'ab'"),
    "keys": ("def answer(): return {1: 2}.keys()", "{1}"),
    "items": ("def answer(): return {1: [2]}.items()", "{1: [2]}.items()"),
    "a range": ("def answer(): return range(3)", "range(3)"),
    "a deque": (
        "from collections import deque\ndef answer(): return deque([1])", "__import__('collections').deque([1])"),
    "a list of its own": (
        "class L(list):\n    def __iter__(self): return iter([9])\ndef answer(): return L([1])", "[1]"),
    "an IntFlag": ("from enum import IntFlag\nclass E(IntFlag): A = 1; B = 2\ndef answer(): return E.A | E.B", "3"),
    "NumPy's numbers": (
        "import numpy\ndef answer(): return [numpy.int64(3), numpy.float32(0.5), numpy.bool_(1)]",
        "[3, 0.5, True]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("program", "value"), PLAIN.values(), ids=PLAIN)
def test_relatives_of_plain_data_count_as_it(program, value):
    assert judge(program, f"assert candidate() == {value}")
    assert not judge(program, f"assert candidate() == [{value}]")


def test_other_objects_equal_nothing_but_can_be_gone_through():
    program = "def answer(): return (i for i in range(3))"
    assert judge(program, "assert tuple(candidate()) == (0, 1, 2)") and not judge(
        program, "assert candidate() == [0, 1, 2]"
    )
    assert not judge("async def answer(): return 1", "assert candidate() == 1")
    assert not judge("def answer(): return int", "assert candidate() == int")
    assert judge("import re\ndef answer(): return re.match('a', 'a')", "assert candidate()")


COLLECTIONS = [
    "range(1, 3)", "{1: 3, 2: 4}.keys()", "{3: 1, 4: 2}.values()", "__import__('collections').deque([1, 2])",
    "__import__('array').array('i', [1, 2])", "__import__('numpy').array([1, 2])",
]  # fmt: skip


@pytest.mark.parametrize("value", COLLECTIONS)
def test_collections_that_equal_no_list_have_their_items(value):
    program = f"def answer(): return {value}"
    assert judge(program, "c = candidate()\nassert len(c) == 2 and list(c) == list(c) == [1, 2] and 2 in c")
    assert not judge(program, "assert candidate() == [1, 2]")


def test_other_objects_are_as_true_as_they_were():
    program = "class A:\n    def __bool__(self): return {}\ndef answer(): return A()"
    assert judge(program.format(True), "assert candidate()") and judge(program.format(False), "assert not candidate()")


def test_asyncio_works():
    program = """
        import asyncio
        async def later(x):
            await asyncio.sleep(0.01)
            return x
        async def both():
            return await asyncio.gather(later(1), later(2))
        def answer():
            return asyncio.run(both())
    """
    assert judge(program, "assert candidate() == [1, 2]")


def test_deep_recursion_works():
    program = "import sys\nsys.setrecursionlimit(10**6)\ndef answer(n): return n and 1 + answer(n - 1)"
    assert judge(program, "assert candidate(5000) == 5000")


@needs_containment
@pytest.mark.parametrize(("program", "tests"), [("while True: pass", ""), ("", "while True: pass")])
def test_programs_end_with_a_killed_evaluator(program, tests, tmp_path):
    code = (
        "import tempfile\nfrom jaxchat.tools.python import run_program\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\nrun_program({program!r}, 60, tests={tests!r})"
    )
    evaluator = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])

    def running():
        return len([where for where in map(working_folder, Path("/proc").glob("[0-9]*")) if str(tmp_path) in where])

    def wait_for(count):
        end = time.monotonic() + 30
        while running() != count and time.monotonic() < end:
            time.sleep(0.05)
        assert running() == count

    try:
        wait_for(2)
    finally:
        evaluator.kill()
        evaluator.wait()
    wait_for(0)
    for folder in tmp_path.glob("jaxchat-*"):  # it is empty
        folder.rmdir()


@needs_containment
@pytest.mark.parametrize("program", ESCAPES.values(), ids=ESCAPES)
def test_a_program_cannot_leave(program, monkeypatch):
    monkeypatch.setenv("JAXCHAT_SECRET", "secret")
    assert not run_program(filled(program), timeout=1)


ENDINGS = {
    "loops": "while True:\n    pass",
    "sleeps": "import time\ntime.sleep(999)",
    "recursion": "def f(): f()\nf()",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "ends itself": "import os\nos.kill(os.getpid(), 9)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "aborts": "import os\nos.abort()",
    "takes all memory": "x = []\nwhile True:\n    x.append(bytes(1 << 20))",
    "ignores signals": (
        "import signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True:\n    pass"
    ),
    "endless answer": "import itertools\ndef answer():\n    return itertools.count()",
    "huge answer": "def answer():\n    return 'x' * (64 << 20)",
    "floods": (
        "import os\nwhile True:\n    for i in range(64):\n        try: os.write(i, b'x' * 9999)\n"
        "        except OSError: pass"
    ),
    "catches all": (
        "def answer():\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass"
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", ENDINGS.values(), ids=ENDINGS)
def test_bad_ends_score_nothing(program):
    assert not judge(program, "assert candidate() == 1", timeout=1)


def test_output_is_dropped():
    assert judge("def answer():\n    print('x' * 10**7)\n    return 1\n", "print(1)\nassert candidate() == 1")


def test_the_interpreters_own_needs_are_met():
    modules = (
        "math, re, collections, itertools, functools, heapq, bisect, string, random, decimal, fractions, statistics, "
        "datetime, hashlib, typing, dataclasses, enum, copy, operator, json, unittest, logging, tempfile, pathlib, "
        "zoneinfo, asyncio, threading, sqlite3, ctypes, numpy"
    )
    code = "random.random(); hashlib.md5(b'').hexdigest(); datetime.datetime.now(); pathlib.Path().resolve()"
    assert run_program(f"import {modules}\n{code}\nopen('/dev/null').read()\n", timeout=20)


# Forbids a system call to this process and its children, as some machines do, and says what containment is left.
WITHOUT = """
import ctypes, struct
libc = ctypes.CDLL(None)
code = b"".join(struct.pack("<HBBI", *line) for line in [
    (0x20, 0, 0, 0), (0x15, 0, {length}, {number}), {condition} (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)])
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0) == 0
from jaxchat.tools.python import containment
print(containment())
"""


def said_without(number, condition=""):
    program = WITHOUT.format(number=number, condition=condition, length=3 if condition else 1)
    root = str(Path(__file__).parents[2])
    return subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True).stdout


@needs_containment
def test_what_does_not_hold_is_said():
    everything = containment()
    assert everything.startswith("they cannot read your files, write files, use the network, start processes, ")
    no_landlock = said_without(444)
    assert "they cannot write files, use the network" in no_landlock and "they CAN read your files" in no_landlock
    prctl = {"x86_64": 157, "aarch64": 167}[os.uname().machine]
    no_seccomp = said_without(prctl, "(0x20, 0, 0, 16), (0x15, 0, 1, 22),")
    assert "on this machine they CAN " in no_seccomp and "use the network" in no_seccomp.split("CAN")[1]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_all_jumps_of_the_filter_stay_inside(machine):
    code = seccomp.build_filter(machine)
    assert len(code) % 8 == 0
    instructions = [code[i : i + 8] for i in range(0, len(code), 8)]
    for place, instruction in enumerate(instructions):
        assert max(instruction[2:4]) + place + 1 < len(instructions) or instruction[0] == 6
    assert instructions[-1][0] == 6


def nest(folder, depth=1500):
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_any_folder_is_removed(tmp_path, capsys):
    for name, depth in (("deep", 1500), ("deeper", 4000), ("closed", 2)):
        (tmp_path / name).mkdir()
        nest(tmp_path / name, depth)
    (tmp_path / "closed/d").chmod(0)
    (tmp_path / "closed").chmod(0o500)
    for name in ("deep", "deeper", "closed", "never there"):
        assert remove_folder(str(tmp_path / name))
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().err


def test_a_folder_that_is_written_to_is_removed_or_named(tmp_path, capsys):
    folder = tmp_path / "busy"
    folder.mkdir()
    writer = "import os\nwhile True:\n    os.makedirs('{0}', exist_ok=True)\n    open('{0}/a', 'w').close()\n"
    process = subprocess.Popen([sys.executable, "-c", writer.format(folder)], stderr=subprocess.DEVNULL)
    try:
        removed = remove_folder(str(folder))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    said = capsys.readouterr().err
    assert removed or (str(folder) in said and said.count("\n") == 1)
