"""Writes a run directory with a model of random weights, which a stage can start from: `--init-from`."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxchat.analysis.generation import random_model
from jaxchat.config import Experiment, ModelConfig, TokenizerConfig
from jaxchat.export.incoming import NAME, place_model
from jaxchat.model.config import GPTConfig
from jaxchat.runs.directory import RunDirectory
from jaxchat.tokenizer import load_tokenizer

STAGE = "pretrain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--sequence-len", type=int, required=True)
    parser.add_argument("--tokenizer", required=True, help="a run directory or a tokenizer.json")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    sizes = {"depth": options.depth, "sequence_len": options.sequence_len}
    params, _ = random_model(GPTConfig(**sizes, vocab_size=tokenizer.vocab_size))
    settings = Experiment(
        name=NAME,
        stages=(STAGE,),
        model=ModelConfig(**sizes),
        tokenizer=TokenizerConfig(vocab_size=tokenizer.vocab_size),
    )
    run = RunDirectory(options.directory)
    run.open(settings)
    place_model(run, settings, STAGE, tokenizer, params, step=0, source={"from": "random numbers"})


if __name__ == "__main__":
    main()
