"""Python as a tool of the model: what comes back, what is cut, what a hostile program cannot do, and who may run it."""

import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.tools import choice
from jaxchat.tools.choice import choose_tool
from jaxchat.tools.python import LONGEST_OUTPUT, run_code, shortened
from tests.tools.hostile import ESCAPES, assert_nothing_stays, filled, needs_containment


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path, monkeypatch):
    """No file and no process of a program is left after a test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert_nothing_stays(tmp_path)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("", ""),
        ("1 + 1", "2"),
        ("None", ""),
        ("print('Gr\u00fc\u00dfe \U0001f642')", "Gr\u00fc\u00dfe \U0001f642"),
        ("x = 3\nfor i in range(x):\n    print(i)\nx ** 2", "0\n1\n2\n9"),
        ("print('a')\n1 / 0\nprint('b')", "a\nZeroDivisionError: division by zero"),
        ("class Own(Exception): pass\nraise Own", "Own"),
        ("raise SystemExit", ""),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("x =", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("print('\\ud800')", "?"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import sys\nsys.argv[1:], __name__", "([], '__main__')"),
        ("import os\nprint('a', flush=True)\nos._exit(3)", "a"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(3)", "P(x=3)"),
        ("import sys\nprint('not seen', file=sys.stderr)\n5", "5"),
    ],
)
def test_what_a_program_returns(code, output):
    assert run_code(code) == output


def test_a_null_byte_is_refused():
    # A ValueError before Python 3.11.4, a SyntaxError since.
    assert run_code("'\0'").endswith("Error: source code string cannot contain null bytes")


def test_calls_know_nothing_of_each_other():
    run_code("x = 3")
    assert run_code("x") == "NameError: name 'x' is not defined"


@needs_containment
@pytest.mark.parametrize("program", ESCAPES.values(), ids=ESCAPES)
def test_code_cannot_leave(program, monkeypatch):
    monkeypatch.setenv("JAXCHAT_SECRET", "secret")
    assert "esc" + "aped" not in run_code(filled(program) + "\nprint('esc' + 'aped')", timeout=1)


LOOP = "while True:\n    pass"
OVER = "TimeoutError: more than 1 s of processor time"
ENDINGS = {
    "endless loop": (LOOP, OVER),
    "ignoring SIGTERM": ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LOOP, OVER),
    "ignoring all signals": (
        "import signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n" + LOOP,
        OVER,
    ),
    "sleeping": ("import time\ntime.sleep(999)", "TimeoutError: more than 3 s"),
    "sleeping without output": (
        "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(999)", "TimeoutError: more than 3 s"
    ),
    "deep recursion": ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    "memory bomb": ("x = []\nwhile True: x.append(bytes(1 << 20))", "MemoryError"),
    "memory at once": ("x = bytearray(2 << 30)", "MemoryError"),
    "crash": ("import ctypes\nctypes.string_at(0)", "OSError: ended by SIGSEGV"),
    "error without a message": (
        "class Own(Exception):\n    def __str__(self): 1 / 0\nraise Own", "Own"
    ),
}  # fmt: skip


@needs_containment
@pytest.mark.parametrize(("code", "output"), ENDINGS.values(), ids=ENDINGS)
def test_bad_ends_say_what_happened(code, output):
    assert run_code(code, timeout=1) == output


@pytest.mark.parametrize(
    "flood", ["while True: print('x' * 99)", "import os\nwhile True: os.write(1, b'\\xff' * 9999)"]
)
def test_endless_output_is_stopped_and_cut(flood):
    output = run_code(flood, timeout=20)
    assert len(output) == LONGEST_OUTPUT and " characters left out]\n" in output
    assert output.endswith("OSError: more than 1 MiB of output")


def test_long_output_keeps_its_beginning_and_its_result():
    output = run_code("for i in range(10_000): print(i)\n'result'")
    assert output.startswith("0\n1\n2\n") and output.endswith("9999\n'result'")


@given(st.text(max_size=400), st.integers(60, 300))
def test_shortened_text_is_never_longer(text, longest):
    short = shortened(text, longest)
    assert len(short) <= longest and (short == text) == (len(text) <= longest)


def test_open_files_run_out_in_the_program_alone():
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert run_code("import os\nx = []\nwhile True: x.append(os.dup(0))") == "OSError: [Errno 24] Too many open files"
    assert before in (0, len(os.listdir("/proc/self/fd")))


def test_nobody_waits_for_a_program_that_is_cancelled():
    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()
    start = time.monotonic()
    run_code("import time\ntime.sleep(999)", timeout=60, cancelled=cancelled.is_set)
    assert time.monotonic() - start < 60


def test_calls_of_many_threads_are_answered():
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(run_code, [f"{i} * 2" for i in range(12)])) == [str(2 * i) for i in range(12)]


def test_the_python_tool_leaves_sums_to_the_calculator():
    answer = choose_tool("python", uncontained=True).answer
    assert answer is not None
    assert [answer(call) for call in ("1,250 * 2", "0.1 + 0.2", "[1, 250 * 2]")] == ["2500", "0.3", "[1, 500]"]


def test_tools_by_name():
    assert choose_tool("none") == (None, "")
    calculator = choose_tool("calculator").answer
    assert calculator is not None and calculator("2 + 2") == "4" and calculator("print(4)") is None
    with pytest.raises(UserError, match="there is no tool 'pyton', did you mean 'python'. Choose one of calculator,"):
        choose_tool("pyton")


def test_programs_are_refused_where_the_machine_cannot_contain_them(monkeypatch):
    monkeypatch.setattr(choice, "possible", lambda: ("read your files", "use the network"))
    with pytest.raises(UserError, match="they could read your files and use the network; add --uncontained") as caught:
        choose_tool("python")
    assert "\n" not in str(caught.value)
    assert choose_tool("python", uncontained=True).answer is not None
    with pytest.raises(UserError, match="--uncontained goes with --tools python, not with --tools calculator"):
        choose_tool("calculator", uncontained=True)


@needs_containment
def test_what_holds_is_said():
    says = choose_tool("python").says
    assert says.startswith("the model's programs run in processes of their own: they cannot read your files, write")
