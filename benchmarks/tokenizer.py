"""How fast is the tokenizer, against rustbpe and tiktoken, on a folder of text?

    python benchmarks/tokenizer.py FOLDER

Trains on the first 100 MB and encodes 20 MB of it. All contenders run in turn, several times; the table has medians.
Peers that are not installed (`pip install tiktoken rustbpe`) are left out.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import tyro

from jaxchat.tokenizer import SPLIT_PATTERN, Tokenizer

MB = 1e6


@dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[Path]
    """Parquet files with a `text` column, or text files."""
    vocab_size: int = 32768
    train_mb: float = 100
    encode_mb: float = 20
    runs: int = 5


def read(folder: Path, size: float) -> list[str]:
    """The documents of a folder until they have `size` bytes."""

    def documents() -> Iterator[str]:
        for path in sorted(folder.iterdir()):
            if path.suffix == ".parquet":
                yield from pq.read_table(path, columns=["text"])["text"].to_pylist()
            elif path.suffix in (".txt", ".md"):
                yield path.read_text(encoding="utf-8")

    texts, total = [], 0
    for text in documents():
        texts.append(text)
        total += len(text.encode())
        if total >= size:
            break
    return texts


def medians(contenders: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each; one run of all, then the next, so that a busy moment hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(title: str, seconds: dict[str, float], megabytes: float) -> None:
    print(f"\n| {title}, {megabytes:.0f} MB | seconds | MB/s |\n| --- | ---: | ---: |")
    for name, median in seconds.items():
        print(f"| {name} | {median:.3f} | {megabytes / median:.1f} |", flush=True)


def have(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def train_with_rustbpe(texts: list[str], vocab_size: int) -> None:
    import rustbpe

    rustbpe.Tokenizer().train_from_iterator(iter(texts), vocab_size, pattern=SPLIT_PATTERN)


def main(args: Args) -> None:
    texts = read(args.folder, args.train_mb * MB)
    size = sum(len(text.encode()) for text in texts) / MB
    trainers: dict[str, Callable[[], object]] = {
        "jaxchat": lambda: Tokenizer.train_from_iterator(iter(texts), args.vocab_size)
    }
    if have("rustbpe"):
        trainers["rustbpe"] = lambda: train_with_rustbpe(texts, args.vocab_size)
    show(f"training {args.vocab_size} tokens", medians(trainers, args.runs), size)

    tokenizer = Tokenizer.train_from_iterator(iter(texts), args.vocab_size)
    texts = read(args.folder, args.encode_mb * MB)
    size = sum(len(text.encode()) for text in texts) / MB
    peer = tokenizer.to_tiktoken() if have("tiktoken") else None
    for threads in (1, 2):
        encoders: dict[str, Callable[[], object]] = {
            "jaxchat, to numpy": lambda threads=threads: tokenizer.encode_to_numpy(texts, num_threads=threads),
            "jaxchat, to lists": lambda threads=threads: tokenizer.encode(texts, num_threads=threads),
        }
        if peer:
            encoders["tiktoken"] = lambda threads=threads: peer.encode_ordinary_batch(texts, num_threads=threads)
        show(f"encoding, {threads} thread{'s' * (threads > 1)}", medians(encoders, args.runs), size)

    ids = tokenizer.encode_to_numpy(texts)[0]
    listed = ids.tolist()
    decoders: dict[str, Callable[[], object]] = {
        "jaxchat, of numpy": lambda: tokenizer.decode(ids),
        "jaxchat, of a list": lambda: tokenizer.decode(listed),
    }
    if peer:
        decoders["tiktoken"] = lambda: peer.decode(listed)
    show("decoding", medians(decoders, args.runs), size)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
