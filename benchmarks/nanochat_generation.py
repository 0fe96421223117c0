"""Measures the engine of a nanochat checkout with random weights.

`generation.py` starts this in a Python that has torch. Nothing of the checkout is changed, apart from what its engine
imports for loading checkpoints. It is measured as it is, with weights in fp32 that each step casts, and with weights
cast to its compute dtype beforehand, which is faster. The engine samples one prompt in all rows, and takes one prompt
at a time: several prompts are read one after the other. No row ends early.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import types
from pathlib import Path

from nanochat_steps import attention_kind, build_model

WARM_UP = 8  # new tokens


class NoTokenizer:
    """What the engine asks of a tokenizer, with special ids that are never sampled."""

    def encode_special(self, name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    for name in ("depth", "context", "new", "vocab-size", "sequence-len", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    options.window_pattern = "L"
    figures = measure(options)
    Path(options.json).write_text(json.dumps(figures))


def measure(options: argparse.Namespace) -> dict:
    import torch

    # Loading a checkpoint needs its tokenizer's libraries; these weights are random.
    sys.modules["nanochat.checkpoint_manager"] = checkpoints = types.ModuleType("nanochat.checkpoint_manager")
    checkpoints.load_model = None  # pyright: ignore[reportAttributeAccessIssue]
    from nanochat import common
    from nanochat.engine import Engine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common.compute_init(device.type)
    model = build_model(options, device).eval()
    fill(model)
    precision = contextlib.nullcontext()
    dtype = getattr(common, "COMPUTE_DTYPE", None)
    if dtype is None and device.type == "cuda":
        dtype, precision = torch.bfloat16, torch.autocast(device.type, torch.bfloat16)
    draw = torch.Generator().manual_seed(0)

    def prompt() -> list[int]:
        return torch.randint(options.vocab_size, (options.context,), generator=draw).tolist()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def samples(rows: int, new: int) -> tuple[float, float]:
        """Seconds until the first token of all rows, and tokens a second after it."""
        wait()
        began = time.perf_counter()
        first = last = began
        count = 0
        for count, _ in enumerate(engine.generate(prompt(), num_samples=rows, max_tokens=new, temperature=0.0)):
            last = time.perf_counter()  # the ids are on the host, so the device is done
            first = first if count else last
        return first - began, rows * count / (last - first)

    def prompts(rows: int) -> float:
        """Seconds until as many prompts have their first token."""
        wait()
        began = time.perf_counter()
        for _ in range(rows):
            next(engine.generate(prompt(), num_samples=1, max_tokens=2, temperature=0.0))
        return time.perf_counter() - began

    engine, variants = Engine(model, NoTokenizer()), {}
    for variant in ("as it is", "weights cast beforehand"):
        if variant != "as it is":
            if dtype is None:
                break
            cast_linear(model, dtype)
        figures = []
        with precision:
            for rows in options.rows:
                samples(rows, WARM_UP)
                runs = []
                for repeat in range(options.repeats):
                    print(f"nanochat, {variant}, rows {rows}: run {repeat + 1} of {options.repeats}", file=sys.stderr)
                    runs.append(samples(rows, options.new))
                figures.append({
                    "rows": rows,
                    "first_token_seconds": statistics.median(prompts(rows) for _ in range(options.repeats)),
                    "samples_of_one_prompt": {
                        "first_token_seconds": statistics.median(first for first, _ in runs),
                        "tokens_per_second": statistics.median(speed for _, speed in runs),
                    },
                })  # fmt: skip
        variants[variant] = figures
    return {
        "variants": variants,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": attention_kind(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def fill(model) -> None:
    """Random numbers for the weights that begin as zeros: a GPU's power draw depends on the numbers."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2 and not weight.any():
                weight.normal_(std=weight.shape[1] ** -0.5)


def cast_linear(model, dtype) -> None:
    """Casts the matrices, which the model casts in each step otherwise; the embeddings have this dtype already."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)


if __name__ == "__main__":
    main()
