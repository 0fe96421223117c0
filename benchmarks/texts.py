"""The text that the benchmarks use: the documents of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

MB = 1_000_000


def text_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(f"error: no .parquet or .txt files in {folder}")
    return files


def stream(files: Sequence[Path], megabytes: float) -> Iterator[str]:
    """The first documents, up to `megabytes` in all; a few hundred are in memory at a time."""
    return prefix(_documents(files), megabytes)


def _documents(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        if path.suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
                yield from batch["text"].to_pylist()
        else:
            yield path.read_text(encoding="utf-8")


def size_of(texts: Iterable[str]) -> float:
    return sum(len(text.encode()) for text in texts) / MB


def prefix(texts: Iterable[str], megabytes: float) -> Iterator[str]:
    """The first texts, up to and including the one that reaches `megabytes`."""
    left = megabytes * MB
    for text in texts:
        yield text
        left -= len(text.encode())
        if left <= 0:
            return
