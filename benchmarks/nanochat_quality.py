"""Trains with `scripts/base_train.py` of a nanochat checkout and measures what it learns.

`quality_against_nanochat.py` starts this with the checkout on PYTHONPATH, in a Python that has torch, tiktoken,
pyarrow, filelock, jinja2 and PyYAML. The script runs as it is: its own model, loader, loop, optimizer and schedules,
with its own options, which follow those here. What is given to it: jaxchat's tokenizer, a folder of the same text, and
the rows for validation, on which its own `evaluate_bpb` computes bits per byte, after the steps asked for and not at
others. Its parameters are drawn from the seed. It saves nothing, and is left after the last evaluation. The seconds of
a step are those that it prints itself.

Its learning rates are those for batches of 524,288 tokens, times the root of the batch's part of that. `--rates`
replaces the rule by a factor. `--momentum` replaces Muon's momentum, which it raises for 400 steps, however short a
training is. `--batches` replaces its loader, which crops about a third of the tokens away and so comes to the end of a
small text sooner.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nanochat_evaluation import nanochat_tokenizer
from nanochat_steps import attention_kind

REFERENCE_BATCH = 2**19  # tokens, of base_train.py
STEP_MS = re.compile(r"\bdt: ([\d.]+)ms")


class Left(Exception):
    """All evaluations are done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkout", type=Path)
    for name in ("text", "tokenizer", "rows", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--at", type=int, nargs="+", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--total-batch-size", type=int, required=True)
    parser.add_argument("--device-batch-size", type=int, required=True)
    add_options(parser)
    options, script = parser.parse_known_args()
    options.json.write_text(json.dumps(measure(options, script)))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a recipe can say besides the options of the script."""
    add = parser.add_argument
    add("--rates", type=float, metavar="FACTOR", help="on its rates for 524,288 tokens, in place of its rule")
    add("--momentum", type=momentum_curve, metavar="START,TOP,END,RISE,FALL",
        help="Muon's: up from START to TOP in the part RISE of the steps, down to END in the last FALL")  # fmt: skip
    add("--batches", type=Path, metavar="FILE", help="rows to train on, in place of its loader's")


def momentum_curve(text: str) -> Callable[[int, int], float]:
    """A function of the step and the number of steps."""
    try:
        start, top, end, rise, fall = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not five numbers with commas") from None

    def at(step: int, steps: int) -> float:
        done = step / steps
        up = min(1.0, done / rise) if rise else 1.0
        down = max(0.0, (done - (1 - fall)) / fall) if fall else 0.0
        return start + (top - start) * up + (end - top) * down

    return at


def measure(options: argparse.Namespace, script: list[str]) -> dict[str, Any]:
    import torch

    words = nanochat_tokenizer(options.tokenizer)  # which helps the checkout to do without rustbpe
    from nanochat import checkpoint_manager, common, dataloader, dataset, gpt, loss_eval, tokenizer

    watch = Watch(options)
    sizes = torch.tensor(token_bytes(words), dtype=torch.int64)
    dataset.DATA_DIR = str(options.text)
    tokenizer.get_tokenizer = lambda: words
    tokenizer.get_token_bytes = lambda device="cpu": sizes.to(device)
    checkpoint_manager.save_checkpoint = lambda *arguments, **more: None
    common.print0 = watch.printing(common.print0)
    common.compute_init = seeded(common.compute_init, options.seed)
    loss_eval.evaluate_bpb = watch.evaluating(loss_eval.evaluate_bpb)
    if options.batches is not None:
        dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit = loading(options.batches)
    gpt.GPT.setup_optimizer = watch.optimizing(gpt.GPT.setup_optimizer)
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # it is asked not to use it
    every = math.gcd(*options.at)
    sys.argv = [
        "base_train", f"--total-batch-size={options.total_batch_size}", f"--num-iterations={options.at[-1]}",
        f"--device-batch-size={options.device_batch_size}", f"--eval-every={every}", "--core-metric-every=-1",
        "--sample-every=-1", "--save-every=-1", *script,
    ]  # fmt: skip
    try:
        runpy.run_path(str(options.checkout / "scripts" / "base_train.py"), run_name="__main__")
    except Left:
        pass
    on_gpu = torch.cuda.is_available()
    return {
        "times": watch.times,
        "scores": watch.scores,
        "parameters": watch.parameters,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "attention": attention_kind(),
        "torch": torch.__version__,
    }


def token_bytes(words: Any) -> list[int]:
    """Bytes of each token, 0 of the special ones, which do not count."""
    sizes = [len(words.decode_single_token_bytes(id)) for id in range(words.get_vocab_size())]
    for name in words.get_special_tokens():
        sizes[words.encode_special(name)] = 0
    return sizes


def seeded(compute_init: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """The checkout's start, which sets a seed of its own, and then ours."""

    def start(*arguments: Any) -> Any:
        import torch

        result = compute_init(*arguments)
        torch.manual_seed(seed)  # of all devices
        return result

    return start


def loading(file: Path) -> Callable[..., Iterator[Any]]:
    """A loader of rows [rows, 2, T] in a file, in place of that for training; after the last it begins again."""

    def load(tokenizer: Any, size: int, *arguments: Any, device: Any, **more: Any) -> Iterator[Any]:
        import torch

        kept = np.load(file, mmap_mode="r")
        while True:  # the script asks for one batch more than it trains on
            for start in range(0, len(kept), size):
                part = kept[start : start + size].astype(np.int64)
                inputs, targets = (torch.from_numpy(part[:, side].copy()).to(device) for side in (0, 1))
                yield inputs, targets, {"pq_idx": 0, "rg_idx": 0, "epoch": 1}

    return load


class Watch:
    """Notes what the script does as it passes by, and changes what a recipe asks for."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.step, self.parameters = options, 0, 0
        self.times: list[float] = []
        self.scores: list[tuple[int, float]] = []

    def printing(self, print0: Callable[..., None]) -> Callable[..., None]:
        def print_and_note(text: str = "", **more: Any) -> None:
            if found := STEP_MS.search(text):
                self.times.append(float(found[1]) / 1000)
            else:
                print0(text, **more)

        return print_and_note

    def evaluating(self, evaluate: Callable[..., float]) -> Callable[..., float]:
        def evaluate_rows(model: Any, batches: Any, steps: int, sizes: Any) -> float:
            if self.step not in self.options.at:
                return math.nan
            given = list(self.rows(model.get_device()))
            self.scores.append((self.step, evaluate(model, given, len(given), sizes)))
            print(f"{self.scores[-1][1]:.4f} bits per byte after {self.step:,} steps", flush=True)
            if self.step == self.options.at[-1]:
                raise Left
            return self.scores[-1][1]

        return evaluate_rows

    def rows(self, device: Any) -> Iterator[tuple[Any, Any]]:
        """The rows for validation in batches of one size, the last filled up with rows without targets."""
        import torch

        kept, size = np.load(self.options.rows), self.options.device_batch_size
        for start in range(0, len(kept), size):
            part = kept[start : start + size]
            missing = np.stack([np.zeros_like(kept[0, 0]), np.full_like(kept[0, 1], -1)])
            part = np.concatenate([part, np.repeat(missing[None], size - len(part), axis=0)])
            inputs, targets = (torch.from_numpy(part[:, side].astype(np.int64)).to(device) for side in (0, 1))
            yield inputs, targets

    def optimizing(self, setup: Callable[..., Any]) -> Callable[..., Any]:
        def set_up(model: Any, **settings: Any) -> Any:
            if self.options.rates is not None:
                rule = math.sqrt(self.options.total_batch_size / REFERENCE_BATCH)
                rates = {name: rate * self.options.rates / rule for name, rate in settings.items()
                         if name.endswith("_lr")}  # fmt: skip
                settings = settings | rates
            optimizer = setup(model, **settings)
            self.parameters = sum(p.numel() for p in model.parameters())
            update = optimizer.step

            def step() -> Any:
                if self.options.momentum is not None:
                    for group in optimizer.param_groups:
                        if "momentum" in group:
                            group["momentum"] = self.options.momentum(self.step, self.options.at[-1])
                self.step += 1
                return update()

            optimizer.step = step
            return optimizer

        return set_up


if __name__ == "__main__":
    main()
