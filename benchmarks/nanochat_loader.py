"""Measures a nanochat checkout's data loader.

`data.py` starts this with the checkout on PYTHONPATH, in a Python that has torch, tiktoken and rustbpe. The loader and
its tokenizer are the checkout's own, with the ranks that jaxchat learned, so that the same text gives the same tokens.
Cropped tokens are those the tokenizer produced, less those in batches and those still in the buffer.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("text", "ranks", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("rows", "sequence-len", "batches", "cores"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    options.json.write_text(json.dumps(measure(options)))


def measure(options: argparse.Namespace) -> dict:
    import tiktoken
    import torch
    from nanochat import dataset, tokenizer

    dataset.DATA_DIR = str(options.text)
    from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as loader

    torch.set_num_threads(options.cores)
    saved = json.loads(options.ranks.read_text())
    encoding = tiktoken.Encoding(
        "jaxchat",
        pat_str=saved["pattern"],
        mergeable_ranks={base64.b64decode(token): rank for rank, token in enumerate(saved["tokens"])},
        special_tokens=saved["special_tokens"],
    )
    words = Counting(tokenizer.RustBPETokenizer(encoding, "<|bos|>"))
    wall, cpu = time.perf_counter(), time.process_time()
    batches = loader(words, options.rows, options.sequence_len, "train", tokenizer_threads=options.cores, device="cpu")
    for _ in range(options.batches):
        next(batches)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    taken = words.tokens - sum(map(len, batches.gi_frame.f_locals["doc_buffer"]))
    given = options.batches * options.rows * (options.sequence_len + 1)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": options.batches * options.rows * options.sequence_len,
        "utilisation": 1.0,
        "cropped": (taken - given) / taken,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class Counting:
    """A tokenizer that counts the tokens it produces."""

    def __init__(self, tokenizer):
        self._tokenizer, self.tokens = tokenizer, 0
        self.get_bos_token_id = tokenizer.get_bos_token_id

    def encode(self, *arguments, **options):
        lists = self._tokenizer.encode(*arguments, **options)
        self.tokens += sum(map(len, lists))
        return lists


if __name__ == "__main__":
    main()
