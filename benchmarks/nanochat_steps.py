"""Measures training steps of a nanochat checkout on random tokens.

`against_nanochat.py` starts this in a Python that has torch. It builds the model and optimizer with the checkout's own
modules, and a step follows the checkout's `scripts/base_train.py`: its precision, `torch.compile`, gradient clipping if
it has any, learning rate and momentum set for each step, and a wait for the device before and after. What differs
between versions (names, fields, autocast) is looked up in the checkout. The tokens are on the device beforehand, which
favours nanochat.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import time
from pathlib import Path

WARM_UP = 5
LEAST_FP8 = 128  # base_train.py leaves smaller matrices in bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    for name in ("depth", "rows", "sequence-len", "vocab-size", "accumulation", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--window-pattern", required=True)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    figures = measure(options)
    Path(options.json).write_text(json.dumps(figures))


def measure(options: argparse.Namespace) -> dict:
    import torch
    from nanochat import common

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common.compute_init(device.type)
    began = time.perf_counter()
    model = build_model(options, device)
    flops = model.estimate_flops()  # before fp8, which it cannot count
    if options.fp8:
        to_fp8(model, options.checkout)
    plain, model = model, torch.compile(model, dynamic=False)
    optimizers, groups = build_optimizers(plain)
    recipe = (options.checkout / "scripts" / "base_train.py").read_text()
    clips = "clip_grad_norm_" in recipe
    precision = contextlib.nullcontext()
    if not hasattr(common, "COMPUTE_DTYPE") and device.type == "cuda":
        precision = torch.autocast(device.type, torch.bfloat16)
    batches = random_batches(options, device)

    def step(number: int) -> float:
        for micro in range(options.accumulation):
            inputs, targets = batches[number * options.accumulation + micro]
            with precision:
                loss = model(inputs, targets)
            last = loss.detach()
            (loss / options.accumulation).backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        momentum = min(0.95, 0.85 + number / 3000)
        for group in groups:
            group["lr"] = group["initial_lr"]
            if "momentum" in group:
                group["momentum"] = momentum
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return last.item()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    first_loss = step(0)
    wait()
    first_step = time.perf_counter() - began
    # base_train.py does so since 2026; it harms no version.
    gc.collect()
    gc.freeze()
    gc.disable()
    for number in range(1, WARM_UP):
        step(number)
    times = []
    for number in range(WARM_UP, WARM_UP + options.steps):
        wait()
        start = time.perf_counter()
        last_loss = step(number)
        wait()
        times.append(time.perf_counter() - start)
    tokens = options.accumulation * options.rows * options.sequence_len
    return {
        "tokens_per_second": tokens / statistics.median(times),
        "tokens_per_second_mean": tokens * len(times) / sum(times),
        "step_ms": 1000 * statistics.median(times),
        "flops_per_token": flops,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "seconds_to_first_step": first_step,
        "first_loss": first_loss,
        "last_loss": last_loss,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "width": plain.config.n_embd,
        "attention": attention_kind(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def build_model(options: argparse.Namespace, device):
    """The checkout's GPT of this depth: width 64 per layer, head dimension 128."""
    import torch
    from nanochat.gpt import GPT, GPTConfig

    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    width = 64 * options.depth
    heads = -(-width // 128)
    settings = {"sequence_len": options.sequence_len, "vocab_size": options.vocab_size, "n_layer": options.depth}
    if "window_pattern" in fields:
        # Versions with windows fix the head dimension at 128, and the width follows.
        width, settings["window_pattern"] = 128 * heads, options.window_pattern
    elif set(options.window_pattern) != {"L"}:
        sys.exit(f"{options.checkout} has no sliding windows; leave --window-pattern at L")
    with torch.device("meta"):
        model = GPT(GPTConfig(**settings, n_embd=width, n_head=heads, n_kv_head=heads))
    short = {left for left, _ in getattr(model, "window_sizes", ())} - {-1, options.sequence_len}
    if short - {options.sequence_len // 4}:
        sys.exit(f"S is {short} tokens in {options.checkout} but a quarter of the context in jaxchat; "
                 "leave --window-pattern at L")  # fmt: skip
    model.to_empty(device=device)
    model.init_weights()
    return model


def to_fp8(model, checkout: Path) -> None:
    """Converts to fp8 the matrices that base_train.py would convert."""
    try:
        from nanochat.fp8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        sys.exit(f"{checkout} has no nanochat/fp8.py; omit --fp8")

    def fits(module, name: str) -> bool:
        sizes = (module.in_features, module.out_features)
        return min(sizes) >= LEAST_FP8 and all(size % 16 == 0 for size in sizes)

    recipe = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model, config=recipe, module_filter_fn=fits)


def build_optimizers(model):
    """The checkout's optimizers and all their groups: one optimizer since January 2026, AdamW and Muon before."""
    optimizers = [model.setup_optimizer()] if hasattr(model, "setup_optimizer") else model.setup_optimizers()
    return optimizers, [group for optimizer in optimizers for group in optimizer.param_groups]


def random_batches(options: argparse.Namespace, device) -> list:
    """Pairs of inputs and targets, int64 `[rows, T]`, for all the steps.

    As in jaxchat, no batch is repeated: a model that memorizes a few batches computes with different numbers, and a
    GPU's power draw, which limits its speed, depends on the numbers.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    shape = (options.rows, options.sequence_len + 1)
    count = (WARM_UP + options.steps) * options.accumulation
    drawn = [torch.randint(options.vocab_size, shape, generator=draw) for _ in range(count)]
    return [(rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)) for rows in drawn]


def attention_kind() -> str:
    try:
        from nanochat.flash_attention import USE_FA3
    except ImportError:
        return "SDPA"
    return "FlashAttention-3" if USE_FA3 else "SDPA"


if __name__ == "__main__":
    main()
