"""Runs a nanochat checkout's evaluators on a model that jaxchat has exported.

`against_nanochat.py` and `evaluation.py` start this with the checkout on PYTHONPATH, in a Python that has torch,
safetensors and tiktoken. What decides is the checkout's own: prompts, few-shot choice, spans, scores, generation with
tools, extraction and comparison of answers, rows of text, bits per byte. What is given to it: the weights, in
`torch_model.py`; the tokenizer, in the checkout's class; and the questions, in the files where it keeps what it has
downloaded. What an evaluator keeps to itself, such as the scores of an item's choices, is noted as it passes by.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TASKS = {  # name in jaxchat: name in nanochat
    "nanochat_arc_easy": "ARC-Easy",
    "nanochat_arc_challenge": "ARC-Challenge",
    "nanochat_mmlu": "MMLU",
    "nanochat_gsm8k": "GSM8K",
    "nanochat_humaneval": "HumanEval",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("core", "chat", "bpb"))
    parser.add_argument("--folder", type=Path, required=True, help="what jaxchat export has written")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the bundle, the data folder, or the folder of text")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--own-depth", type=int, help="the checkout's own model of this depth, with random weights")
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--speed", action="store_true", help="note nothing on the way, and warm up first")
    for name in ("rows", "sequence-len", "batches", "max-new-tokens"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    result = {"core": core, "chat": chat, "bpb": bpb}[options.work](options)
    options.json.write_text(json.dumps({**result, **machine()}))


def machine() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "device": device}


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and the tokenizer, as nanochat's evaluators take them."""
    import torch
    from nanochat import common

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = nanochat_tokenizer(options.folder / "tokenizer.json")
    if options.own_depth is None:
        from torch_model import TorchGPT

        return TorchGPT(options.folder, device, common.COMPUTE_DTYPE), tokenizer
    from nanochat_generation import fill
    from nanochat_steps import build_model

    work = {"depth": options.own_depth, "sequence_len": options.sequence_len, "window_pattern": "L"}
    size = tokenizer.get_vocab_size()
    model = build_model(argparse.Namespace(**work, vocab_size=size, checkout=options.checkout), device).eval()
    fill(model)
    return model, tokenizer


def nanochat_tokenizer(file: Path) -> Any:
    """The checkout's tokenizer with the vocabulary of a `tokenizer.json`."""
    import tiktoken

    sys.modules.setdefault("rustbpe", types.ModuleType("rustbpe"))  # only its training needs it
    from nanochat.tokenizer import RustBPETokenizer

    saved = json.loads(file.read_text())
    special = {token["content"]: token["id"] for token in saved["added_tokens"]}
    # GPT-2's alphabet of bytes: the printable ones stand for themselves, the others follow from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = {bytes(map(alphabet.__getitem__, text)): id for text, id in saved["model"]["vocab"].items()
             if text not in special}  # fmt: skip
    (split,) = [step for step in saved["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split"]
    pattern = split["pattern"]["Regex"]
    encoding = tiktoken.Encoding("jaxchat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return RustBPETokenizer(encoding, "<|bos|>")


def read_lines(file: Path) -> list[Any]:
    with file.open(encoding="utf-8") as lines:  # not splitlines: texts have other line separators than \n
        return list(map(json.loads, lines))


# --- CORE -------------------------------------------------------------------------------------------------------------


def core(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, seconds and decisions of each task; of several processes, each takes its share of the items."""
    import yaml
    from nanochat import core_eval

    model, tokenizer = load(options)
    watch = None if options.speed else Watch(core_eval)
    found, began = {}, time.time()
    tasks = yaml.safe_load((options.data / "core.yaml").read_text())["icl_tasks"]
    for task in tasks:
        label, file = task["label"], options.data / "eval_data" / task["dataset_uri"]
        if (options.tasks and label not in options.tasks) or not file.exists():
            continue
        items = read_lines(file)
        random.Random(1337).shuffle(items)
        items = items[: options.limit]
        meta = {
            "task_type": task["icl_task_type"],
            "num_fewshot": task["num_fewshot"][0],
            "continuation_delimiter": task.get("continuation_delimiter", " "),
        }
        if options.speed:
            core_eval.evaluate_example(0, model, tokenizer, items, model.get_device(), meta)
        decisions, start = [], time.perf_counter()
        for index in range(options.rank, len(items), options.processes):
            try:
                right = core_eval.evaluate_example(index, model, tokenizer, items, model.get_device(), meta)
            except AssertionError as error:  # nanochat itself would end here
                decisions.append({"index": index, "error": str(error)})
                continue
            decisions.append({"index": index, "right": bool(right), **(watch.taken() if watch else {})})
            if time.time() - began > 5:
                began = time.time()
                print(f"nanochat {label}: item {index} of {len(items)}", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start
        found[label] = {"seconds": seconds, "asked": len(decisions), "decisions": decisions}
    return {"tasks": found}


class Watch:
    """Notes what `core_eval.evaluate_example` compares: the mean loss of each choice, and how narrow the decision was.

    `margin` is the difference between the two lowest losses, in language modeling the smallest difference between the
    two highest logits at a position of the continuation: what has to change for another decision.
    """

    def __init__(self, core_eval: Any):
        self.spans, self.losses, self.logits = ([], []), None, None
        for kind in ("mc", "schema", "lm"):
            name = f"batch_sequences_{kind}"
            setattr(core_eval, name, self._noting_spans(getattr(core_eval, name), kind))
        self.forward, core_eval.forward_model = core_eval.forward_model, self._noting_losses

    def _noting_spans(self, function, kind: str):
        def noting(*arguments):
            result = function(*arguments)
            self.kind, self.spans = kind, result[1:]
            return result

        return noting

    def _noting_losses(self, model, input_ids):
        def keep(ids):
            self.logits = model(ids)
            return self.logits

        self.losses, predictions = self.forward(keep, input_ids)
        return self.losses, predictions

    def taken(self) -> dict[str, Any]:
        spans = list(enumerate(zip(*self.spans, strict=True)))
        if self.kind == "lm":
            _, (start, end) = spans[0]
            top = self.logits[0, start - 1 : end - 1].topk(2, dim=-1).values
            mean = self.losses[0, start - 1 : end - 1].mean().item()
            return {"scores": [mean], "margin": (top[:, 0] - top[:, 1]).min().item()}
        scores = [self.losses[row, start - 1 : end - 1].mean().item() for row, (start, end) in spans]
        lowest = sorted(score for score in scores if score == score)[:2]  # without NaN, of an empty span
        margin = lowest[1] - lowest[0] if len(lowest) == 2 else 0.0
        return {"choice": scores.index(min(scores)), "scores": scores, "margin": margin}


# --- chat tasks -------------------------------------------------------------------------------------------------------


def chat(options: argparse.Namespace) -> dict[str, Any]:
    """The outcome of each question of each task, in the order in which nanochat asks them."""
    from nanochat.common import get_base_dir
    from nanochat.engine import Engine

    write_questions(options.data / "eval", Path(get_base_dir()))
    from scripts import chat_eval

    model, tokenizer = load(options)
    builders = {
        "ARC-Easy": lambda: chat_eval.ARC(subset="ARC-Easy", split="test"),
        "ARC-Challenge": lambda: chat_eval.ARC(subset="ARC-Challenge", split="test"),
        "MMLU": lambda: chat_eval.MMLU(subset="all", split="test"),
        "GSM8K": lambda: chat_eval.GSM8K(subset="main", split="test"),
        "HumanEval": lambda: chat_eval.HumanEval(),
    }
    found = {}
    for name in options.tasks:
        task, answers = builders[TASKS[name]](), []
        task.evaluate = noting_answers(task.evaluate, answers)
        start = time.perf_counter()
        if task.eval_type == "generative":
            engine, how = Engine(model, tokenizer), (1, options.max_new_tokens, 0.0, 50)
            score = chat_eval.run_generative_eval(task, tokenizer, model, engine, *how, max_problems=options.limit)
        else:
            score = chat_eval.run_categorical_eval(task, tokenizer, model, 8, max_problems=options.limit)
        found[name] = {"score": score, "seconds": time.perf_counter() - start, "answers": answers}
    return {"tasks": found}


def noting_answers(evaluate, answers: list[dict[str, Any]]):
    def noting(conversation, answer):
        outcome = evaluate(conversation, answer)
        asked = conversation["messages"][0]["content"]
        answers.append({"question": asked, "answer": answer, "right": bool(outcome)})
        return outcome

    return noting


def write_questions(data: Path, base: Path) -> None:
    """jaxchat's files of questions, where nanochat keeps those of the hub and in their form."""
    arc = {name: (f"allenai--ai2_arc/{hub}", data / f"{name}.jsonl", arc_row) for name, hub in
           (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge"))}  # fmt: skip
    sets = [
        *arc.values(),
        ("cais--mmlu/all", data / "mmlu" / "test.jsonl", dict),
        ("openai--gsm8k/main", data / "gsm8k" / "test.jsonl", dict),
        ("openai--openai_humaneval/openai_humaneval", data / "humaneval.jsonl", dict),
    ]
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, file, row in sets:
        if file.exists():
            folder = base / "task_data" / name / "test"
            folder.mkdir(parents=True, exist_ok=True)
            rows = list(map(row, read_lines(file)))
            pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
            (folder / "manifest.json").write_text('["00000.parquet"]')


def arc_row(item: dict[str, Any]) -> dict[str, Any]:
    labels = list("ABCDEFGHIJ"[: len(item["choices"])])
    return {
        "question": item["query"].removeprefix("Question: "),
        "choices": {"text": item["choices"], "label": labels},
        "answerKey": labels[item["gold"]],
    }


# --- bits per byte ----------------------------------------------------------------------------------------------------


def bpb(options: argparse.Namespace) -> dict[str, Any]:
    """nanochat's bits per byte of its first rows of validation text; the rows are left in a file beside the result."""
    import torch
    from nanochat import dataloader, dataset, loss_eval

    dataset.DATA_DIR = str(options.data)
    model, tokenizer = load(options)
    device, special = model.get_device(), tokenizer.get_special_tokens()
    sizes = [len(tokenizer.decode_single_token_bytes(id)) for id in range(tokenizer.get_vocab_size())]
    for name in special:
        sizes[tokenizer.encode_special(name)] = 0
    batches = dataloader.tokenizing_distributed_data_loader_bos_bestfit(
        tokenizer, options.rows, options.sequence_len, "val", device=device.type
    )
    rows: list[np.ndarray] = []

    def kept() -> Iterator[tuple[Any, Any]]:
        for inputs, targets in batches:
            rows.append(np.stack([inputs.cpu().numpy(), targets.cpu().numpy()]).astype(np.int32))
            yield inputs, targets

    start = time.perf_counter()
    value = loss_eval.evaluate_bpb(model, kept(), options.batches, torch.tensor(sizes, device=device))
    seconds = time.perf_counter() - start
    np.save(options.json.with_suffix(".npy"), np.stack(rows))  # [batches, 2, rows, T]
    return {"bpb": value, "seconds": seconds}


if __name__ == "__main__":
    main()
