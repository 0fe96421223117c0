"""Measures steps of `scripts/chat_rl.py` of a nanochat checkout, on a model with random weights.

`rl_against_nanochat.py` starts this with the checkout on PYTHONPATH, in a Python that has torch, pyarrow and filelock.
The script runs as it is, with its own loop, engine, loss and optimizer. What is given to it: the model, in the place of
a checkpoint; the tokenizer, as a table of the questions' ids and of the tokens' texts; and the questions, where the
checkout keeps what it has downloaded. It evaluates nothing, saves nothing, and is left after some steps.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any

from nanochat_generation import fill
from nanochat_steps import attention_kind, build_model

ENDLESS = str(10**9)


class Left(Exception):
    """Enough steps were measured."""


class KnownTokenizer:
    """What the script and its engine ask of a tokenizer, for questions whose ids are known."""

    def __init__(self, file: Path):
        known = json.loads(file.read_text())
        self.prompts: dict[str, list[int]] = known["prompts"]
        self.texts: list[str] = known["texts"]
        self.special: dict[str, int] = known["special"]
        self.ids = {text: id for id, text in reversed(list(enumerate(self.texts)))}

    def render_for_completion(self, conversation: dict[str, Any]) -> list[int]:
        return list(self.prompts[conversation["messages"][0]["content"]])

    def encode_special(self, name: str) -> int:
        return self.special[name]

    def get_bos_token_id(self) -> int:
        return self.special["<|bos|>"]

    def encode(self, text: str) -> list[int]:
        """Of what the calculator gives, character by character."""
        return [self.ids[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join([self.texts[id] for id in ids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    for name in ("depth", "sequence-len", "questions", "samples", "max-new-tokens", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rows", type=int, nargs="+", required=True, help="the script's --device-batch-size")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    options.json.write_text(json.dumps(measure(options)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = KnownTokenizer(options.tokenizer)
    options.vocab_size, options.window_pattern = len(tokenizer.texts), "L"
    model = build_model(options, device).eval()
    fill(model)
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # it is asked not to use it
    sys.modules["nanochat.checkpoint_manager"] = checkpoints = types.ModuleType("nanochat.checkpoint_manager")
    checkpoints.save_checkpoint = None  # pyright: ignore[reportAttributeAccessIssue]
    checkpoints.load_model = lambda *arguments, **more: (model, tokenizer, {})  # pyright: ignore[reportAttributeAccessIssue]
    variants = [_steps(options, model, rows, device) for rows in options.rows]
    return {
        "variants": variants,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": attention_kind(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def _steps(options: argparse.Namespace, model: Any, rows: int, device: Any) -> dict[str, Any]:
    """The seconds of the script's steps and of their parts, after one step that is not counted."""
    from nanochat.engine import Engine

    watch = Watch(options.steps + 1, device)
    generate, setup = Engine.generate_batch, model.setup_optimizer
    Engine.generate_batch = watch.sampling(generate)
    model.setup_optimizer = watch.optimizer(setup)
    sys.argv = [
        "chat_rl", f"--device-batch-size={rows}", f"--examples-per-step={options.questions}",
        f"--num-samples={options.samples}", f"--max-new-tokens={options.max_new_tokens}",
        "--eval-examples=0", f"--eval-every={ENDLESS}", f"--save-every={ENDLESS}",
    ]  # fmt: skip
    try:
        runpy.run_path(str(options.checkout / "scripts" / "chat_rl.py"), run_name="__main__")
    except Left:
        pass
    finally:
        Engine.generate_batch, model.setup_optimizer = generate, setup
        model.zero_grad(set_to_none=True)
    return {"rows": rows, "steps": watch.steps[1:]}


class Watch:
    """Notes of each step the seconds of sampling, of the optimizer and of all, and the tokens that were sampled."""

    def __init__(self, steps: int, device: Any):
        self.most, self.device = steps, device
        self.steps: list[dict[str, float]] = []
        self.began: float | None = None
        self.seconds, self.tokens = 0.0, 0

    def now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def sampling(self, generate):
        def timed(engine, tokens, *arguments, **options):
            began = self.now()
            self.began = began if self.began is None else self.began
            rows, masks = generate(engine, tokens, *arguments, **options)
            self.seconds += self.now() - began
            self.tokens += sum(len(row) - len(tokens) for row in rows)
            return rows, masks

        return timed

    def optimizer(self, setup):
        def timed(*arguments, **options):
            optimizer = setup(*arguments, **options)
            step = optimizer.step

            def stepping(*arguments, **options):
                began = self.now()
                step(*arguments, **options)
                self.end(began, self.now())

            optimizer.step = stepping
            return optimizer

        return timed

    def end(self, optimizer_began: float, now: float) -> None:
        assert self.began is not None, "a step samples"
        self.steps.append({
            "seconds": now - self.began,
            "sampling_seconds": self.seconds,
            "optimizer_seconds": now - optimizer_began,
            "tokens": self.tokens,
        })  # fmt: skip
        self.began, self.seconds, self.tokens = now, 0.0, 0
        if len(self.steps) == self.most:
            raise Left


if __name__ == "__main__":
    main()
