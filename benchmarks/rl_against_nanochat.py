"""Compares steps of reinforcement learning with those of nanochat's `chat_rl.py`: sampling, scoring and the update.

`python benchmarks/against_nanochat.py rl` runs this. Both have a model of the same depth, vocabulary and context with
random weights, the same questions and prompts, and as many answers, which hardly ever end before the last token that
they may have. Each runs its own command, in a process of its own, one after the other on one device:
`launch.py --stages=rl` and `scripts/chat_rl.py`, at their own settings otherwise (jaxchat samples from the whole
vocabulary, nanochat from the likeliest 50). nanochat takes the questions of a step one after the other, so that a few
of them are measured (`--peer-questions`), and its step is as many times as long, apart from the optimizer. It samples
`--peer-rows` answers at once: 8 by default, and as many as a question has is the most that it can.

Random weights earn nothing, which nanochat does not notice, but jaxchat would not train on: there answers are rewarded
by the parity of their bytes, through `--rl.reward`, so that all of them are trained on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from timing import run, table

from jaxchat.data.records import find_records, read_records
from jaxchat.errors import UserError, check
from jaxchat.runs.metrics import read_metrics
from jaxchat.tasks import load_task
from jaxchat.tokenizer import load_tokenizer

HERE = Path(__file__).parent
LAUNCH = HERE.parent / "launch.py"
QUESTIONS = 512  # that both draw from
WARM_UP = 2  # steps of jaxchat, in which it compiles
REWARD = '''def reward(question, answer, conversation):
    """A coin that the answer itself tosses."""
    return sum(answer.encode()) % 2
'''


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns 2 if one of them fails."""
    options = _parser().parse_args(argv)
    try:
        check(
            (Path(options.checkout) / "scripts" / "chat_rl.py").exists(),
            f"{options.checkout} is not a nanochat checkout (no scripts/chat_rl.py); clone one and name its folder",
        )
        with tempfile.TemporaryDirectory() as directory:
            found = compare(options, Path(directory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        settings = {**vars(options), "date": date.today().isoformat()}
        Path(options.json).write_text(json.dumps({**settings, **found}, indent=1))
    _print(options, found)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="against_nanochat.py rl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--checkout", required=True, metavar="DIR", help="a nanochat checkout, of 2026")
    add("--python", default=sys.executable, metavar="FILE", help="a Python with torch (default: this one)")
    add("--tokenizer", required=True, metavar="PATH", help="of both models: a run directory or a tokenizer.json")
    add("--data", metavar="DIR", help="a data folder with GSM8K; by default the questions are generated word problems")
    add("--depth", type=int, default=12, help="(default 12)")
    add("--sequence-len", type=int, default=2048, help="the models' context (default 2048)")
    add("--questions", type=int, default=16, help="of a step (default 16)")
    add("--samples", type=int, default=16, help="answers to each question (default 16)")
    add("--max-new-tokens", type=int, default=256, help="of an answer (default 256)")
    add("--steps", type=int, default=8, help=f"of jaxchat, of which the first {WARM_UP} are not counted (default 8)")
    add("--peer-questions", type=int, default=2, help="of a step of nanochat that is measured (default 2)")
    add("--peer-steps", type=int, default=1, help="of nanochat, after one that is not counted (default 1)")
    add("--peer-rows", type=int, nargs="+", default=[8, 16], help="that nanochat samples at once (default 8 16)")
    add("--json", metavar="FILE", help="write all figures to FILE")
    return parser


def compare(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The figures of both, by name.

    Raises:
      UserError: one of them fails; there are no questions.
    """
    check(options.steps > WARM_UP, f"--steps is {options.steps}; the first {WARM_UP} are not counted: give more")
    check(options.peer_steps >= 1, f"--peer-steps is {options.peer_steps}; it must be at least 1")
    for rows in options.peer_rows:
        check(options.samples % rows == 0, f"--peer-rows is {rows}; it must divide the {options.samples} --samples")
    items = _items(options.data)
    data, known = directory / "data", directory / "tokenizer.json"
    _write_questions(data, directory / "base", items)
    known.write_text(json.dumps(_known(options.tokenizer, data, items)))
    theirs = _theirs(options, directory, known)
    ours = _ours(options, directory, data)
    step = ours["step_seconds"]
    for variant in theirs["variants"]:
        variant |= whole_step(variant["steps"], options.questions / options.peer_questions)
        variant["rollouts_ratio"] = ours["tokens_per_second"] / variant["tokens_per_second"]
        variant["step_ratio"] = variant["step_seconds"] / step
    return {"jaxchat": ours, "nanochat": theirs}


def whole_step(steps: Sequence[dict[str, float]], times: float) -> dict[str, float]:
    """nanochat's step of `times` as many questions as were measured: all but the optimizer takes as many times longer.

    Medians over the measured `steps`.
    """
    sampling = times * statistics.median(step["sampling_seconds"] for step in steps)
    optimizer = statistics.median(step["optimizer_seconds"] for step in steps)
    rest = times * statistics.median(s["seconds"] - s["optimizer_seconds"] - s["sampling_seconds"] for s in steps)
    return {
        "tokens_per_second": sum(s["tokens"] for s in steps) / sum(s["sampling_seconds"] for s in steps),
        "step_seconds": sampling + rest + optimizer,
        "sampling_seconds": sampling,
    }


# --- what both are given ----------------------------------------------------------------------------------------------


def _items(data: str | None) -> list[dict[str, str]]:
    """Questions in the form of GSM8K: those of a data folder, or generated ones."""
    if data is not None:
        file = Path(data) / "eval" / "gsm8k" / "train.jsonl"
        found = find_records(file)
        if found is None:
            raise UserError(f"{file} does not exist; name a data folder with GSM8K, or leave --data out")
        return [item for _, item in itertools.islice(read_records(found), QUESTIONS)]
    task = load_task("word_problems_3", "train", "", QUESTIONS)
    items = []
    for conversation in task:
        question, answer = conversation["messages"][0]["content"], f"#### {conversation['answer']}"
        items.append({"question": question, "answer": answer})
    return items


def _write_questions(data: Path, base: Path, items: Sequence[dict[str, str]]) -> None:
    """Where jaxchat reads them, and where nanochat keeps those of the hub, as training and as test questions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data / "eval" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (data / "eval" / "gsm8k" / f"{split}.jsonl").write_text(lines)
        folder = base / "task_data" / "openai--gsm8k" / "main" / split
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(list(items)), folder / "00000.parquet")
        (folder / "manifest.json").write_text('["00000.parquet"]')


def _known(tokenizer: str, data: Path, items: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The tokenizer as a table: the ids of each question's prompt, the text of each token, and the special tokens."""
    loaded, asked = load_tokenizer(tokenizer), load_task("gsm8k", "test", str(data))
    prompts = {
        item["question"]: loaded.render_for_completion(conversation)
        for item, conversation in zip(items, asked, strict=True)
    }
    texts = [loaded.decode([id]) for id in range(loaded.vocab_size)]
    return {"prompts": prompts, "texts": texts, "special": loaded.special_tokens}


# --- what runs both ---------------------------------------------------------------------------------------------------


def _theirs(options: argparse.Namespace, directory: Path, known: Path) -> dict[str, Any]:
    checkout, result = Path(options.checkout).absolute(), directory / "nanochat.json"
    command = [options.python, str(HERE / "nanochat_rl.py"), str(checkout), f"--depth={options.depth}"]
    command += [f"--sequence-len={options.sequence_len}", f"--questions={options.peer_questions}"]
    command += [f"--samples={options.samples}", f"--max-new-tokens={options.max_new_tokens}"]
    command += [f"--steps={options.peer_steps}", "--rows", *map(str, options.peer_rows)]
    command += [f"--tokenizer={known}", f"--json={result}"]
    more = {"PYTHONPATH": str(checkout), "NANOCHAT_BASE_DIR": str(directory / "base")}
    more |= {name: "expandable_segments:True" for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    return run("nanochat", command, {**os.environ, **more}, result, show=True)


def _ours(options: argparse.Namespace, directory: Path, data: Path) -> dict[str, Any]:
    model, trained, reward = directory / "random", directory / "run", directory / "coin.py"
    reward.write_text(REWARD)
    sizes = [f"--depth={options.depth}", f"--sequence-len={options.sequence_len}", f"--tokenizer={options.tokenizer}"]
    made = [sys.executable, str(HERE / "random_run.py"), str(model), *sizes]
    run("the model with random weights", made, {**os.environ, "JAX_PLATFORMS": "cpu"}, None)
    command = [sys.executable, str(LAUNCH), "--experiment=d12", f"--init-from={model}", f"--run-dir={trained}"]
    command += [f"--data={data}", "--data.download=", "--stages=rl", "--rl.tasks=gsm8k", f"--rl.reward={reward}:reward"]
    command += [f"--rl.questions-per-step={options.questions}", f"--rl.samples-per-question={options.samples}"]
    command += [f"--rl.max-new-tokens={options.max_new_tokens}", f"--rl.num-iterations={options.steps}"]
    command += ["--rl.eval-every=0", "--rl.eval-questions=16", "--rl.save-every=0"]
    run("jaxchat", command, dict(os.environ), None, show=True)
    record = json.loads((trained / "rl" / "stage.json").read_text())
    steps = [line for line in read_metrics(trained) if line["stage"] == "rl" and "step_seconds" in line]
    machine = record["machine"]
    return {
        **summary(steps[WARM_UP:], options.questions * options.samples),
        "steps": steps,
        "device": machine["device_kind"],
        "jax": machine["jax"],
        "peak_memory_bytes": record.get("peak_memory_bytes"),
    }


def summary(steps: Sequence[dict[str, Any]], answers: int) -> dict[str, float]:
    """Medians over the steps of jaxchat, each of which samples `answers`.

    Of sampling counts all that comes before the update: scoring and the making of the batch too.
    """
    seconds = [(line["input_seconds"], line["completion_tokens"] * answers) for line in steps]
    return {
        "tokens_per_second": statistics.median(tokens / spent for spent, tokens in seconds),
        "step_seconds": statistics.median(line["step_seconds"] for line in steps),
        "sampling_seconds": statistics.median(spent for spent, _ in seconds),
    }


def _print(options: argparse.Namespace, found: dict[str, Any]) -> None:
    ours, theirs = found["jaxchat"], found["nanochat"]
    what = "questions of GSM8K" if options.data else "generated questions"
    print(f"\n{theirs['device']}, d{options.depth}; a step has {options.questions} {what}, and {options.samples} "
          f"answers to each, of up to {options.max_new_tokens} tokens; jax {ours['jax']}, torch {theirs['torch']} with "
          f"{theirs['attention']}")  # fmt: skip
    names = [f"nanochat, {variant['rows']} rows at once" for variant in theirs["variants"]]
    rows = [
        [
            name,
            f"{one['tokens_per_second']:,.0f}",
            f"{one['step_seconds']:.2f}",
            f"{one['sampling_seconds']:.2f}",
            f"{one['rollouts_ratio']:.1f}" if "rollouts_ratio" in one else "",
            f"{one['step_ratio']:.1f}" if "step_ratio" in one else "",
        ]
        for name, one in zip([*names, "jaxchat"], [*theirs["variants"], ours], strict=True)
    ]
    head = ["", "sampled tokens/s", "seconds a step", "of them sampling", "jaxchat / this, tokens/s", "whole step"]
    table(head, rows)
