"""`jaxchat chat` as a user has it: a process, with pipes or with a terminal."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.cli.main import main
from jaxchat.config import CheckpointConfig
from jaxchat.infer.trained import load_model
from tests.serve.pseudo_terminal import Terminal

ROOT = Path(__file__).parents[2]
CHAT = ["-m", "jaxchat.cli.main", "chat"]
GREEDY = ["--temperature", "0", "--max-tokens", "40"]


def environment(run_dir):
    cache, state = (str(Path(run_dir) / name) for name in ("compiled", "state"))
    changes = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "XDG_STATE_HOME": state}
    return {**os.environ, **changes, "PYTHONPATH": str(ROOT), "TERM": "xterm"}


def chat(run_dir, *arguments, said=""):
    return subprocess.run(
        [sys.executable, *CHAT, "--run", run_dir, *arguments],
        input=said,
        capture_output=True,
        text=True,
        env=environment(run_dir),
        timeout=200,
    )


def in_terminal(run_dir, *arguments, output=None, **variables):
    """The chat in a pseudo-terminal."""
    return Terminal([*CHAT, "--run", run_dir, *arguments], environment(run_dir) | variables, output=output)


def test_one_answer(run_dir):
    done = chat(run_dir, *GREEDY, "-p", "What is 34 + 58?")
    assert (done.returncode, done.stdout, done.stderr) == (0, "⟨34 + 58 → 92⟩ It is 92.\n", "")


def test_a_pipe_is_one_message_of_all_its_lines(run_dir):
    """The model knows this question with a line break in it; as two questions it would give two answers."""
    for arguments in ((), ("-p", "-")):
        done = chat(run_dir, *GREEDY, *arguments, said="Say\n/both!\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, "Both.\n", "")


def test_a_cut_answer_says_so_and_closes_nothing(run_dir):
    done = chat(run_dir, "--temperature", "0", "--max-tokens", "3", "-p", "What is 34 + 58?")
    assert (done.returncode, done.stdout, done.stderr) == (0, "⟨34\n", "(cut: --max-tokens 3)\n")


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        ("< /dev/null", "standard input is empty; pipe in a question"),
        ("<&-", "standard input is closed; pipe in a question"),
        ("0> /dev/null", "standard input cannot be read"),
        ("-p - <&-", "standard input is closed"),
    ],
)
def test_standard_streams_that_cannot_be_used(run_dir, redirection, message):
    command = f"{sys.executable} {' '.join(CHAT)} --run {run_dir} {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment(run_dir), timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_an_answer_is_the_same_bytes_in_every_locale(run_dir):
    command = [sys.executable, *CHAT, "--run", run_dir, *GREEDY, "-p", "Hello?"]
    for variables, encoding in (({"LC_ALL": "C"}, "utf-8"), ({"PYTHONIOENCODING": "latin-1"}, "latin-1")):
        done = subprocess.run(command, capture_output=True, env=environment(run_dir) | variables, timeout=100)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == "Grüße, 日本 🙂!\n".encode(encoding, "replace")


def test_a_base_model_continues_the_text(run_dir):
    done = chat(run_dir, "--stage", "pretrain", *GREEDY, "-p", "Es war einmal")
    assert done.returncode == 0
    assert done.stdout.startswith(" ein Bär 🐻. Er ging in den Wald.")


def test_a_terminal(run_dir):
    with in_terminal(run_dir, *GREEDY) as terminal:
        terminal.expect("sft · /help lists the commands")
        terminal.expect("> ")
        time.sleep(0.5)  # the prompt is written a moment before its line can be interrupted
        terminal.type("\x03")
        terminal.expect("(press Ctrl-D or type /quit to leave)")
        terminal.type("/nonsense\n")
        terminal.expect("unknown command /nonsense")
        terminal.type("What is 34 + 58?\n")
        terminal.expect("⟨34 + 58 → 92⟩ It is 92.")
        terminal.expect("> ")
        terminal.type("\x04")
        code, rest = terminal.expect_end()
        assert code == 0 and "Traceback" not in rest


def test_commands_in_a_terminal(run_dir, tmp_path):
    file = tmp_path / "chat.json"
    with in_terminal(run_dir, *GREEDY, "--tools", "python", "--uncontained") as terminal:
        terminal.expect("the model's programs run in processes of their own: ")

        def say(typed, expected):
            terminal.expect("> ")
            terminal.type(f"{typed}\n")
            return terminal.expect(expected)

        say("/retry", "error: there is no question yet that could be asked again")
        say("What is 34 + 58?", "⟨34 + 58 → 92⟩ It is 92.")
        say("/retry", "⟨34 + 58 → 92⟩ It is 92.")
        say(f"/save {file}", "2 messages saved to ")
        say("/undo", "taken back: 'What is 34 + 58?'")
        say(f"/load {file}", "2 messages loaded from ")
        say(f"/load {tmp_path}", "is not a file")
        say("/set top-k 0", "error: top-k is 0; it must be at least 1")
        say("/settings", "tools python")
        say("/help", "Ctrl-C stops an answer; pressed twice, it leaves.")
        say("/clear", "forgotten")
        say('"""', "... ")
        terminal.type("Say\n")
        terminal.expect("... ")
        terminal.type('/both!"""\n')
        terminal.expect("Both.")
        terminal.expect("> ")
        terminal.type("/quit\n")
        code, rest = terminal.expect_end()
        assert code == 0 and "Traceback" not in rest
    (_, answer) = json.loads(file.read_text())["messages"]
    assert answer["tool_runs"] == [{"call": "34 + 58", "output": "92", "at": 0}]
    assert "/save" in (Path(run_dir) / "state" / "jaxchat" / "chat_history.jsonl").read_text()


def test_the_prompt_stays_out_of_a_file(run_dir, tmp_path):
    with in_terminal(run_dir, *GREEDY, output=tmp_path / "answers") as terminal:
        terminal.expect("> ")
        terminal.type("Hello?\n")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.expect_end()[0] == 0
    assert (tmp_path / "answers").read_text() == "Grüße, 日本 🙂!\n"


def test_ctrl_c_stops_an_answer_and_not_the_chat(run_dir):
    with in_terminal(run_dir, *GREEDY, JAX_ENABLE_COMPILATION_CACHE="0") as terminal:
        terminal.expect("> ")
        terminal.type("Hello?\n")
        terminal.expect("Hello?\r\n")
        time.sleep(0.3)  # the line is read, and the engine compiles for longer than that
        terminal.type("\x03")
        answer = terminal.expect("(stopped)")
        assert "Grüße, 日本 🙂!" not in answer
        terminal.expect("> ")
        terminal.type("/clear\n")
        terminal.expect("forgotten")
        terminal.type("Hello?\n")
        terminal.expect("Grüße, 日本 🙂!")
        terminal.expect("> ")
        terminal.type("/quit\n")
        code, rest = terminal.expect_end()
        assert code == 0 and "Traceback" not in rest


def test_ctrl_c_while_it_loads_ends_quietly(run_dir):
    with in_terminal(run_dir, "-p", "Hello?") as terminal:
        terminal.expect("loading")
        terminal.type("\x03")
        code, rest = terminal.expect_end()
        assert code == 130 and "stopped" in rest and "Traceback" not in rest


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGHUP", 75)])
def test_other_signals_end_the_chat_at_its_prompt(run_dir, name, code):
    with in_terminal(run_dir, *GREEDY) as terminal:
        terminal.expect("> ")
        terminal.process.send_signal(getattr(signal, name))
        ended, rest = terminal.expect_end()
        assert ended == code and f"stopped by {name}" in rest and "Traceback" not in rest


def test_earlier_steps(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    params = load_model(tmp_path, "sft").params
    with contextlib.closing(
        Checkpoints(tmp_path / "sft" / "checkpoints", CheckpointConfig(keep=3, keep_best=True))
    ) as checkpoints:
        for step, score in ((301, -1.0), (302, -2.0)):
            changed = jax.tree.map(lambda x, step=step: x + step, params)
            checkpoints.save(step, {"params": changed, "step": jnp.asarray(step)}, data={}, meta={})
            checkpoints.record_score(step, score)
    (tmp_path / "sft" / "stage.json").write_text(json.dumps({"stage": "sft", "steps": 302}))
    for step, added in ((None, 302), ("300", 0), ("301", 301), ("best", 301)):
        loaded = load_model(tmp_path, "sft", step).params
        jax.tree.map(lambda x, y, added=added: np.testing.assert_array_equal(x, y + added), loaded, params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat"], "the following arguments are required: --run"),
        (["talk"], "unknown command 'talk', did you mean"),
        ([], "required"),
        (["chat", "--run", "no/such/run"], "there is no run directory no/such/run"),
        (["chat", "--run", "RUN", "--stage", "stf"], "'stf' is not a stage with a model, did you mean 'sft'?"),
        (["chat", "--run", "RUN", "--stage", "midtrain"], "'midtrain' of RUN is not finished; finished: pretrain, sft"),
        (["chat", "--run", "RUN", "--stage", "rl"], "'rl' of RUN is not finished; finished: pretrain, sft"),
        (["chat", "--run", "RUN", "--step", "7"], "no checkpoint of step 7 in RUN/sft/checkpoints, only of 300"),
        (["chat", "--run", "RUN", "--step", "last"], "--step is 'last'; it must be a number, or best"),
        (["chat", "--run", "RUN", "--step", "best"], "train with --checkpoints.keep-best, or name one of [300]"),
        (["chat", "--run", "EMPTY"], "EMPTY is not a run: it has no config.json"),
        (["chat", "--run", "RUN", "--temperature", "hot"], "--temperature takes a number"),
        (["chat", "--run", "RUN", "--temperature", "-1"], "--temperature is -1.0"),
        (["chat", "--run", "RUN", "--temperature", "inf"], "--temperature is inf"),
        (["chat", "--run", "RUN", "--top-k", "0"], "--top-k is 0"),
        (["chat", "--run", "RUN", "--max-tokens", "0"], "--max-tokens is 0"),
        (["chat", "--run", "RUN", "-p", " "], "the prompt is empty"),
        (["chat", "--run", "RUN", "--top-p", "0"], "--top-p is 0.0; it must be above 0 and at most 1"),
        (["chat", "--run", "RUN", "--tools", "pyton"], "--tools: unknown value 'pyton', did you mean 'python'?"),
        (["chat", "--run", "RUN", "--stage", "pretrain", "--system", "x"], "a base model has no system prompt"),
        (["chat", "--run", "RUN", "--system", "so " * 200], "this system prompt has"),
        (["chat", "--run", "RUN", "-p", "so " * 200], "this message has"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_dir, tmp_path, capfd, arguments, message):
    places = {"RUN": str(run_dir), "EMPTY": str(tmp_path)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    said = capfd.readouterr()
    line = said.err.replace(str(run_dir), "RUN").replace(str(tmp_path), "EMPTY")
    assert said.out == "" and line.startswith("error: ") and line.count("\n") == 1
    assert message in line


def test_a_damaged_record_or_checkpoint_is_named(run_dir, tmp_path, capfd):
    shutil.copytree(run_dir, tmp_path / "run")
    record = tmp_path / "run" / "sft" / "stage.json"
    manifest = next((tmp_path / "run" / "sft").rglob("manifest.json"))
    manifest.write_text("{")
    assert main(["chat", "--run", str(tmp_path / "run"), "-p", "Hello?"]) == 2
    assert f"checkpoint {manifest.parent} is damaged" in capfd.readouterr().err
    record.write_text("{")
    assert main(["chat", "--run", str(tmp_path / "run"), "-p", "Hello?"]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {record} is damaged") and said.count("\n") == 1


def test_help_needs_no_jax():
    code = """if True:
        import sys
        from jaxchat.cli.main import main
        try:
            main(["chat", "--help"])
        finally:
            assert "jax" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Ctrl-C stops an answer" in done.stdout
