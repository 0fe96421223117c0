"""Compares a run's model in jaxchat with the same model in transformers, which has loaded what jaxchat exported.

    python benchmarks/against_transformers.py --run runs/d6 --python venv/bin/python

`--python` needs torch and transformers 5 or later. Both compute in fp32: the logits of 2,048 tokens, or as many as the
model's context has, of the documents in `docs/`; greedy answers to a few questions; and the ids of texts and chats.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from timing import run, table

from jaxchat.errors import UserError
from jaxchat.infer.engine import Engine
from jaxchat.infer.trained import TrainedModel, load_model
from jaxchat.model.gpt import hidden_states, logits

HERE = Path(__file__).parent
LARGEST = 1e-4  # difference of logits
QUESTIONS = (
    "Hello!",
    "What is the capital of France?",
    "Tom has 3 boxes with 12 apples each and eats 5. How many are left?",
    "Write a sentence about the sea.",
    "Übersetze: naïve café — 日本語 🙂",
)


def main(argv: list[str] | None = None) -> int:
    """Prints the comparison; returns 1 if the two disagree, 2 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="DIR", help="the run whose model is compared")
    parser.add_argument("--stage", help="its stage; by default the last one that trains")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="a Python with torch and transformers")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (default 64)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as directory:
            found = compare(options, Path(directory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    head = [f"fp32, {found['positions']:,} positions", "largest difference of logits", "largest logit", "equal argmax",
            "equal answers", "equal ids"]  # fmt: skip
    table(
        head,
        [[f"jax {jax.__version__}, transformers {found['transformers']}", f"{found['difference']:.1e}",
          f"{found['largest']:.1f}", f"{found['argmax']:.2%}", found["answers"], found["ids"]]],
    )  # fmt: skip
    return 0 if found["agree"] else 1


def compare(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """How far the two are apart.

    Raises:
      UserError: there is no such model, or transformers does not load it.
    """
    jax.config.update("jax_default_matmul_precision", "highest")  # no TF32
    model = load_model(options.run, options.stage)
    folder = directory / "exported"
    export = [sys.executable, "-m", "jaxchat.cli.main", "export", "--run", options.run, "--stage", model.stage,
              "--to", "hf", str(folder)]  # fmt: skip
    run("jaxchat export", export, dict(os.environ), None)
    # transformers reads a special token where a text spells one; jaxchat reads text.
    texts = [path.read_text().replace("<|", "< |") for path in sorted((HERE.parent / "docs").glob("*.md"))]
    work = {"texts": [*texts, *QUESTIONS], "questions": QUESTIONS, "new": options.new}
    work["tokens"] = model.tokenizer.encode("\n\n".join(texts), prepend="<|bos|>")[: model.model.sequence_len]
    (directory / "work.json").write_text(json.dumps(work))
    peer = [options.python, str(HERE / "transformers_logits.py"), str(folder), str(directory)]
    theirs = run("transformers", peer, dict(os.environ), directory / "result.json")
    return _differences(model, work, theirs, np.load(directory / "logits.npy"))


def _differences(model: TrainedModel, work: dict[str, Any], theirs: dict[str, Any], scores: np.ndarray):
    config, tokenizer = model.model, model.tokenizer
    hidden = hidden_states(config, model.params, np.array([work["tokens"]], np.int32))
    own = np.asarray(logits(config, model.params, hidden))[0, :, : config.vocab_size]
    empty = {"role": "assistant", "content": ""}  # is left out
    chats = [
        tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}, empty]})
        for question in QUESTIONS
    ]
    engine = Engine(config, model.params, tokenizer, dtype=np.float32)
    answers = engine.generate(chats, max_new_tokens=work["new"], temperature=0.0, tools=False)
    equal = [answer.tokens == other for answer, other in zip(answers, theirs["answers"], strict=True)]
    ids = [tokenizer.encode(text) == other for text, other in zip(work["texts"], theirs["ids"], strict=True)]
    ids += [chat == other for chat, other in zip(chats, theirs["chats"], strict=True)]
    difference = float(np.abs(own - scores).max())
    return {
        "positions": len(own),
        "difference": difference,
        "largest": float(np.abs(own).max()),
        "argmax": float((own.argmax(-1) == scores.argmax(-1)).mean()),
        "answers": f"{sum(equal)} of {len(equal)}",
        "ids": f"{sum(ids)} of {len(ids)} texts",
        "agree": difference < LARGEST and all(equal) and all(ids),
        "transformers": theirs["transformers"],
        "torch": theirs["torch"],
    }


if __name__ == "__main__":
    sys.exit(main())
