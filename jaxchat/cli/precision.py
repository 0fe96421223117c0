"""The options that say in how many bits a model that generates keeps its weights and its cache."""

from __future__ import annotations

import argparse
from typing import Any


def add_precision_options(add: Any) -> None:
    """Adds `--weights` and `--kv-cache` by `add`, a parser's `add_argument`; `precision` takes their values."""
    add(
        "--weights",
        choices=("auto", "int8"),
        default="auto",
        help="Weights as the model computes (bf16 on a GPU), or in 8 bits, which take half the memory. (default auto)",
    )
    add(
        "--kv-cache",
        choices=("auto", "fp8"),
        default="auto",
        help="Keys and values as the model computes, or in 8 bits, so that twice as many tokens fit. (default auto)",
    )


def precision(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as `Engine` takes them; what they mean says `jaxchat/infer/quantized.py`."""
    return {"weights": arguments.weights, "kv_cache": arguments.kv_cache}
