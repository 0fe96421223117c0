"""The mistakes of a first hour: each must be answered by one line that says what to do, with exit code 2.

    python .ci/mistakes.py       # in a checkout, with the Python that jaxchat is installed for

No command may show a traceback, or leave a run directory behind.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAUNCH = [sys.executable, "launch.py"]
JAXCHAT = [sys.executable, "-m", "jaxchat"]
QUICKSTART = [*LAUNCH, "--experiment=quickstart"]


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Each mistake by its name: a command line, and words of the answer to it."""
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("my notes\n")
    (folder / "broken").mkdir()
    (folder / "broken" / "stories.jsonl").write_text(json.dumps({"text": "A story."}) + '\n{"text": "Another\n')
    text = folder / "text"
    (text / "chat").mkdir(parents=True)
    (text / "stories.txt").write_text("\n\n".join(f"Story {i}." for i in range(100)))
    (text / "chat" / "train.jsonl").write_text('{"question": "Why?"}\n' * 20)
    run = f"--run-dir={folder}/run"
    return {
        "no experiment": (LAUNCH, "no experiment given; write --experiment="),
        "a misspelt experiment": ([*LAUNCH, "--experiment=quickstrat"], "did you mean 'quickstart'?"),
        "a misspelt option": ([*QUICKSTART, "--pretrain.num-iteration=100"], "did you mean '--pretrain.num-it"),
        "an option without its section": ([*QUICKSTART, "--depth=4"], "its section is missing: --model.depth"),
        "an impossible value": ([*QUICKSTART, "--rl.top-k=0"], "rl.top-k is 0; it must be at least 1"),
        "a value of another type": ([*QUICKSTART, "--model.depth=four"], "the value must be a whole number"),
        "a misspelt stage": ([*QUICKSTART, "--stages=pretrian"], "did you mean 'pretrain'?"),
        "a stage before its time": ([*QUICKSTART, "--stages=sft", f"--run-dir={folder}/new"], "the stage 'tokenizer'"),
        "a batch that does not divide": ([*QUICKSTART, "--pretrain.batch-tokens=1000", run], "that work: batch-tokens"),
        "a data folder that is not there": ([*QUICKSTART, f"--data={folder}/texts"], "does not exist; give --data a"),
        "a file as data folder": ([*QUICKSTART, f"--data={folder}/notes.txt"], "is a file; give --data the folder"),
        "an empty data folder": ([*QUICKSTART, f"--data={folder}/empty", run], "no text in"),
        "text with a broken line": ([*QUICKSTART, f"--data={folder}/broken", run], "jsonl:2"),
        "chats of an unknown form": ([*QUICKSTART, f"--data={text}", run], "train.jsonl:1"),
        "a file as run directory": ([*QUICKSTART, f"--run-dir={folder}/notes.txt"], "notes.txt is a file"),
        "a misspelt command": ([*JAXCHAT, "caht"], "did you mean 'chat'?"),
        "a chat without a run": ([*JAXCHAT, "chat"], "--run"),
        "a chat before any training": ([*JAXCHAT, "chat", f"--run={folder}/run", "-p", "Hi"], "run"),
        "an unknown data set": ([*JAXCHAT, "data", "get", "smalltalk"], "did you mean 'smoltalk'?"),
    }  # fmt: skip


def main() -> int:
    runs, wrong, began = Path("runs"), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
        for mistake, (command, words) in mistakes(folder).items():
            started = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            line = done.stderr.rstrip("\n")
            problems = [
                *(f"exit code {done.returncode}" for _ in "x" if done.returncode != 2),
                *("not one line" for _ in "x" if "\n" in line or not line),
                *(f"not the words {words!r}" for _ in "x" if words not in line),
                *("a run directory was left" for _ in "x" if any((folder / left).exists() for left in ("run", "new"))),
            ]
            shown = line.replace(f"{folder}/", "")
            print(
                f"{mistake:<33}{time.monotonic() - started:5.1f} s  {shown if len(shown) < 150 else shown[:149] + '…'}"
            )
            if problems:
                wrong += 1
                print(f"{'':<33}WRONG: {', '.join(problems)}\n{done.stdout}{done.stderr}")
        left = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
        if left != there:
            wrong += 1
            print(f"WRONG: runs/ has {left}, and had {there}")
    print(f"{wrong} of them were answered wrongly; {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
