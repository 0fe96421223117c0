"""A user's own reward: in real processes, with functions that do all that they should not."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxchat import stopping
from jaxchat.config import RLConfig
from jaxchat.errors import UserError
from jaxchat.rl.advantages import centred
from jaxchat.rl.reward import OwnReward, check_reward, own_reward
from jaxchat.rl.signal import Signal

# What is put between {} is Python that is executed for an answer.
MODULE = """
import os, sys, time
print("importing")

def reward(question, answer, conversation):
    print("noise", flush=True)
    os.write(1, b'{"reward": 7}\\n')
    sys.stderr.write("noise")
    return eval(answer)

def told(question, answer, conversation):
    return len(question) * 100 + len(answer) * 10 + len(conversation["messages"])

def two(question, answer):
    return 1.0

async def later(question, answer, conversation):
    return 1.0

table = [1.0]
"""
CONVERSATION = {"messages": [{"role": "user", "content": "ä?"}, {"role": "assistant", "content": "1"}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with `own.py`."""
    (tmp_path / "own.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(*answers):
    return [("ä?", answer, CONVERSATION) for answer in answers]


def ended(process):
    """Whether there is no process of this id, or only its remains, within a few seconds."""
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def test_rewards_are_numbers_in_order_and_the_rest_is_none(folder, capfd):
    good = {
        "1": 1.0, "-2.5": -2.5, "True": 1.0, "False": 0.0, "__import__('numpy').float32(0.5)": 0.5,
        "__import__('numpy').array(3)": 3.0, "__import__('fractions').Fraction(1, 4)": 0.25, "0": 0.0,
    }  # fmt: skip
    bad = ["None", "'1.0'", "float('nan')", "-float('inf')", "1 / 0", "[1.0]", "1j", "10**400", "sys.exit(0)",
           "os._exit(3)", "os.kill(os.getpid(), 11)", "(_ for _ in ()).throw(KeyboardInterrupt)"]  # fmt: skip
    answers = [answer for pair in zip([*good, *list(good)[:4]], bad, strict=True) for answer in pair]
    notes = []
    with own_reward("own:reward", notes.append) as own:
        assert own is not None
        rewards = own.score(calls(*answers))
        assert own.score([]) == []
    for answer, reward in zip(answers, rewards, strict=True):
        assert reward == good[answer] if answer in good else math.isnan(reward), answer
    assert len(notes) == 3 and notes[-1].endswith("further causes are not shown")
    assert capfd.readouterr() == ("", "")


def test_the_function_is_given_question_answer_and_conversation(folder):
    with own_reward("own.py:told", print) as own:
        assert own is not None and own.score(calls("", "é", "two\nlines")) == [202, 212, 292]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("{}['x']", "KeyError: 'x' (own.py, line 9)"),
        ("'text'", "it returned 'text', which is not a number"),
        ("None", "it returned None, which is not a number"),
        ("float('nan')", "it returned nan"),
        ("os._exit(3)", "it ended its process (exit code 3)"),
        ("os.kill(os.getpid(), 9)", "it ended its process (by SIGKILL)"),
        ("time.sleep(60)", "it took longer than 0.3 s"),
    ],
)
def test_the_cause_is_told_once(folder, answer, problem):
    notes = []
    own = OwnReward("own:reward", notes.append, seconds=0.3 if "sleep" in answer else 10, processes=1)
    try:
        rewards = own.score(calls(answer, "2", answer))
    finally:
        own.end()
    assert math.isnan(rewards[0]) and math.isnan(rewards[2])
    assert rewards[1] == 2 or "sleep" in answer  # which a busy machine may keep waiting for as long
    assert notes[0] == f"own:reward gives an answer no reward, which is left out: {problem}"


def test_nothing_is_left_of_a_call_that_hangs(folder):
    """Neither its process nor what it has started; and the others go on meanwhile."""
    hangs = "(open('child', 'w').write(str(__import__('subprocess').Popen(['sleep', '60']).pid)), time.sleep(60))"
    own = OwnReward("own:reward", lambda line: None, seconds=2.0, processes=2)
    try:
        began = time.monotonic()
        rewards = own.score(calls(hangs, *"123456"))
        assert time.monotonic() - began < 30
        assert math.isnan(rewards[0]) and rewards[1:] == [1, 2, 3, 4, 5, 6]
        assert ended(int((folder / "child").read_text()))
        still = [process._process.pid for process in own._processes]
        assert own.score(calls("7")) == [7]
    finally:
        own.end()
    assert all(map(ended, still))


def test_calls_run_at_the_same_time(folder):
    """Two that wait for each other."""
    wait = "(open('{}', 'w').close(), [time.sleep(0.01) for _ in iter(lambda: os.path.exists('{}'), True)], 1)[-1]"
    own = OwnReward("own:reward", print, processes=2)
    try:
        assert own.score(calls(wait.format("a", "b"), wait.format("b", "a"))) == [1, 1]
    finally:
        own.end()


def test_a_request_to_end_is_heard_while_a_call_runs(folder):
    began = time.monotonic()
    with pytest.raises(stopping.Interrupted), stopping.deferred():
        with own_reward("own:reward", print) as own:
            assert own is not None
            signal.raise_signal(signal.SIGTERM)
            own.score(calls("time.sleep(60)"))
    assert time.monotonic() - began < 9


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a call ends before its process does")
def test_processes_do_not_outlive_the_training(folder):
    program = """
import os, sys, threading, time
from jaxchat.rl.reward import own_reward
with own_reward("own:reward", print) as own:
    threading.Timer(60, os._exit, (1,)).start()
    own.score([("", "open('pid', 'w').write(str(os.getpid())) and time.sleep(60)", {})])
"""
    training = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    try:
        for _ in range(400):
            if (folder / "pid").exists() and (folder / "pid").read_text():
                break
            time.sleep(0.05)
    finally:
        training.kill()
        training.wait()
    assert ended(int((folder / "pid").read_text()))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("own", "'own' is not a module and a function; write module:function or file.py:function"),
        ("owm:reward", "there is no module 'owm' in {folder}, nor is one installed, did you mean 'own'?"),
        ("owm.py:reward", "there is no file owm.py, did you mean 'own.py'?"),
        ("no.such:reward", "there is no module 'no.such' in"),
        ("own:rewards", "own.py has no function 'rewards', did you mean 'reward'?"),
        ("own:table", "table in own.py is of class list, not a function; write `def table(question, answer, "),
        ("own:two", "two(question, answer) in own.py does not take three arguments"),
        ("own.py:later", "later in own.py is async"),
        ("zero:reward", "zero.py fails to import: ZeroDivisionError: division by zero (zero.py, line 3)"),
        ("syntax.py:reward", "syntax.py fails to import: SyntaxError: expected ':' (syntax.py, line 2)"),
        ("needs:reward", "needs.py fails to import: ModuleNotFoundError: No module named 'not_there' (needs.py, "),
        ("leaves:reward", "leaves ends the process that imports it (exit code 3)"),
        ("exits:reward", "exits.py fails to import: SystemExit: bye (exits.py, line 2)"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_in_one_line(folder, where, message):
    for name, text in {
        "zero": "\n\nx = 1 / 0",
        "syntax": "\ndef reward(a, b, c)\n    return 1",
        "needs": "import not_there",
        "leaves": "import os; os._exit(3)",
        "exits": "import sys\nsys.exit('bye')",
    }.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.raises(UserError) as error:
        check_reward(where)
    assert str(error.value).startswith("rl.reward: " + message.format(folder=folder)), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["deep", "2026-11-30 09:15"])
def test_a_file_may_import_from_beside_it(folder, name):
    (folder / name).mkdir()
    (folder / name / "helper.py").write_text("def value():\n    raise ValueError('no')")
    (folder / name / "mine.py").write_text("from helper import value\ndef f(q, a, c):\n    return value()")
    check_reward(f"{name}/mine.py:f")
    notes = []
    with own_reward(f"{name}/mine.py:f", notes.append) as own:
        assert own is not None and math.isnan(own.score(calls("x"))[0])
    assert notes[0].endswith(f"ValueError: no ({name}/helper.py, line 2)")


def test_a_file_that_breaks_during_the_training_ends_it(folder):
    own = OwnReward("own:reward", lambda line: None, processes=1)
    try:
        assert own.score(calls("1")) == [1]
        (folder / "own.py").write_text("def reward(")
        with pytest.raises(UserError, match="rl.reward: own.py fails to import: SyntaxError"):
            own.score(calls("os._exit(1)", "2"))
    finally:
        own.end()


def test_a_groups_mean_is_that_of_its_rewards(folder):
    with own_reward("own:reward", lambda line: None) as own:
        assert own is not None
        rewards = np.array(own.score(calls("1", "0", "1 / 0", "'1'", "1", "1", "None", "1"))).reshape(2, 4)
    np.testing.assert_array_equal(centred(rewards), [[0.5, -0.5, np.nan, np.nan], [0, 0, np.nan, 0]])


def test_a_training_in_which_nothing_was_scored_says_so():
    signal = Signal()
    signal.add(np.full((2, 3), np.nan), np.zeros((2, 3), bool))
    assert signal.absent and signal.facts() == {"groups_without_signal": 1, "cut": 0, "steps_without_signal": 1}
    assert signal.lack == "no answer had a reward"
    assert signal.advice(RLConfig(reward="own:reward"), 9) == "(6 answers); mend own:reward"
