"""Asks a run's model a task of lm-evaluation-harness in two ways, and compares the log-likelihood of each choice.

    python benchmarks/against_lm_eval.py --run runs/d6 --data data/eval/arc_easy.jsonl --python venv/bin/python

Once the harness loads what `jaxchat export` has written (`--model hf`), once it asks `jaxchat serve`
(`--model local-completions`). Both are on the CPU, in fp32, with <|bos|> before each prompt. `--python` needs lm_eval
with its extras `api` and `hf`, and torch. The questions are the file's first, with `query`, `choices` and `gold`, in a
form of ours: the scores compare with nothing but each other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timing import run, say, table

from jaxchat.errors import UserError, check

CLOSE = 1e-4  # nats
TASK = "jaxchat_multiple_choice"
YAML = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
# The tools of a hub: nothing is to be asked there.
ALONE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def main(argv: list[str] | None = None) -> int:
    """Prints the comparison; returns 1 if the two disagree, 2 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="DIR", help="the run whose model is asked")
    parser.add_argument("--stage", default="pretrain", help="its stage (default pretrain)")
    parser.add_argument("--data", required=True, metavar="FILE", help="questions, an object a line")
    parser.add_argument("--limit", type=int, default=30, help="how many of them (default 30)")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="a Python with lm_eval and torch")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args(argv)
    try:
        check(Path(options.data).is_file(), f"{options.data} does not exist; name a file of questions")
        with tempfile.TemporaryDirectory() as directory:
            found = compare(options, Path(directory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    table(
        ["log-likelihoods", "accuracy, hf", "local-completions", "largest difference", "largest",
         "greedy, equal"],
        [[f"{found['count']:,} choices of {found['questions']:,} questions", f"{found['accuracy']['hf']:.4f}",
          f"{found['accuracy']['local-completions']:.4f}", f"{found['difference']:.1e}", f"{found['largest']:.1f}",
          f"{found['greedy']:,}"]],
    )  # fmt: skip
    return 0 if found["agree"] else 1


def compare(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """How far the two ways are apart.

    Raises:
      UserError: the model cannot be exported or served, or the harness fails.
    """
    folder, file = directory / "exported", directory / "questions.jsonl"
    with open(options.data, encoding="utf-8") as lines:
        file.write_text("".join(line for line, _ in zip(lines, range(options.limit), strict=False)))
    (directory / "tasks").mkdir()
    (directory / "tasks" / f"{TASK}.yaml").write_text(YAML.format(task=TASK, file=file))
    model = ["--run", options.run, "--stage", options.stage]
    jaxchat, environment = [sys.executable, "-m", "jaxchat.cli.main"], {**os.environ, **ALONE}
    run("jaxchat export", [*jaxchat, "export", *model, "--to", "hf", str(folder)], environment, None)
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    # Of a long question the API's class keeps the last max_length - 1 tokens, that of transformers max_length + 1.
    hf = {"pretrained": folder, "dtype": "float32", "add_bos_token": True, "max_length": context - 2}
    found = {"hf": _ask(options, directory, "hf", hf)}
    with _served([*jaxchat, "serve", *model, "--port=0", "--name=served"], environment) as address:
        api = {"model": "served", "base_url": f"{address}/v1/completions", "tokenizer": folder, "max_length": context,
               "tokenizer_backend": "huggingface", "add_bos_token": True, "num_concurrent": 4}  # fmt: skip
        found["local-completions"] = _ask(options, directory, "local-completions", api)
    return differences(found)


def differences(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the samples that the harness has logged say, of both ways."""
    pairs = [
        (one, other)
        for a, b in zip(*found.values(), strict=True)
        for one, other in zip(a["answers"], b["answers"], strict=True)
    ]
    difference = max(abs(one[0] - other[0]) for one, other in pairs)
    greedy = sum(one[1] == other[1] for one, other in pairs)
    return {
        "questions": len(found["hf"]),
        "count": len(pairs),
        "accuracy": {name: sum(s["acc"] for s in samples) / len(samples) for name, samples in found.items()},
        "difference": difference,
        "largest": max(abs(one[0]) for one, _ in pairs),
        "greedy": greedy,
        "agree": difference < CLOSE and greedy == len(pairs),
    }


def _ask(options: argparse.Namespace, directory: Path, model: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """What the harness logs of each question: its score, and log-likelihood and greediness of each choice."""
    say(f"lm_eval --model {model}")
    out = directory / model
    command = [options.python, "-m", "lm_eval", "--model", model, "--tasks", TASK, "--include_path",
               str(directory / "tasks"), "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()),
               "--log_samples", "--output_path", str(out), "--batch_size=1", "--device=cpu"]  # fmt: skip
    run(f"lm_eval --model {model}", command, {**os.environ, **ALONE, "HF_HOME": str(directory / "hub")}, None)
    (file,) = out.rglob(f"samples_{TASK}_*.jsonl")
    with file.open(encoding="utf-8") as lines:
        samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return [{"acc": s["acc"], "answers": [_pair(response) for response in s["filtered_resps"]]} for s in samples]


def _pair(response: Any) -> tuple[float, bool]:
    likelihood, greedy = response
    return float(likelihood), str(greedy) == "True"


@contextmanager
def _served(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """The address of a server that runs meanwhile."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as one:
        try:
            assert one.stdout
            lines: list[str] = []
            for line in one.stdout:
                lines.append(line.strip())
                if found := re.search(r"http://[\w.:]+", line):
                    yield found[0]
                    return
            raise UserError(f"jaxchat serve failed: {' '.join(lines[-1:])}")
        finally:
            one.terminate()


if __name__ == "__main__":
    sys.exit(main())
