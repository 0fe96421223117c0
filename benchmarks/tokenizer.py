"""Compares the tokenizer's speed and memory with rustbpe, tiktoken and Hugging Face's tokenizers.

    python benchmarks/tokenizer.py FOLDER
    python benchmarks/tokenizer.py FOLDER --only training memory --runs 9 --json results.json

The contenders take turns, several times. The tables show medians, and each time as a multiple of jaxchat's. Peers that
are not installed (`pip install tiktoken rustbpe tokenizers`) are left out.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from texts import MB, prefix, size_of, stream, text_files
from timing import Failed, alone, contest, have, machine, medians, say, table

import jaxchat_tokenizer as rust
from jaxchat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from jaxchat.tokenizer.patterns import CL100K_PATTERN, O200K_PATTERN, R50K_PATTERN

PEERS = ("tiktoken", "rustbpe", "tokenizers")
PATTERNS = {"GPT-2's": R50K_PATTERN, "cl100k's": CL100K_PATTERN, "o200k's": O200K_PATTERN}

Section = Literal["training", "memory", "linearity", "encoding", "patterns", "unbroken", "decoding"]


@dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[Path]
    """A folder of parquet files with a `text` column, or of text files."""
    only: tuple[Section, ...] = ("training", "memory", "linearity", "encoding", "patterns", "unbroken", "decoding")
    """The sections to run."""
    vocab_size: int = 32768
    train_mb: float = 100
    encode_mb: float = 20
    unbroken_mb: float = 1
    threads: tuple[int, ...] = (1, 2)
    """The numbers of threads with which encoding is measured."""
    runs: int = 5
    json: Path | None = None
    """Write all figures to this file."""


# --- training ---------------------------------------------------------------------------------------------------------


def train_jaxchat(texts: Iterable[str], size: int) -> Tokenizer:
    return Tokenizer.train_from_iterator(iter(texts), size)


def rustbpe_tokenizer(texts: Iterable[str], size: int, pattern: str = SPLIT_PATTERN):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), size, pattern=pattern)
    return tokenizer


def train_rustbpe(texts: Iterable[str], size: int):
    return rustbpe_tokenizer(texts, size - len(SPECIAL_TOKENS))


def train_huggingface(texts: Iterable[str], size: int):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)
    return tokenizer


def trainers() -> dict[str, Callable[[Iterable[str], int], object]]:
    peers = {"rustbpe": ("rustbpe", train_rustbpe), "HF tokenizers": ("tokenizers", train_huggingface)}
    return {"jaxchat": train_jaxchat} | {name: train for name, (package, train) in peers.items() if have(package)}


def train_from_files(files: list[Path], characters: int, size: int) -> Tokenizer:
    return Tokenizer.train_from_files(files, size, max_chars=characters)


def ranks(tokenizer: Any) -> dict[bytes, int]:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.mergeable_ranks
    return {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}


def training(args: Args) -> dict[str, Any]:
    """Training time, from a list in memory; for jaxchat also from the files."""
    files = text_files(args.folder)
    texts = list(stream(files, args.train_mb))
    characters = sum(map(len, texts))
    learnt: dict[str, Any] = {}

    def from_list(name: str, train: Callable[[Iterable[str], int], object]) -> None:
        learnt[name] = train(texts, args.vocab_size)

    def from_files() -> None:
        learnt["jaxchat, from the files"] = train_from_files(files, characters, args.vocab_size)

    work = {name: partial(from_list, name, train) for name, train in trainers().items()}
    work = {"jaxchat": work.pop("jaxchat"), "jaxchat, from the files": from_files} | work
    title = f"training {args.vocab_size:,} tokens"
    results = contest(title, medians(title, work, args.runs), size_of(texts))
    learnt.pop("HF tokenizers", None)  # breaks ties differently
    same = [name for name, tokenizer in learnt.items() if ranks(tokenizer) == ranks(learnt["jaxchat"])]
    print(f"\nThe same vocabulary: {', '.join(same)}.")
    return results | {"same_vocabulary": same}


def read_only(files: list[Path], megabytes: float) -> None:
    deque(stream(files, megabytes), maxlen=0)


def hold(files: list[Path], megabytes: float) -> int:
    return len(list(stream(files, megabytes)))


def train_from_stream(name: str, files: list[Path], megabytes: float, size: int) -> None:
    trainers()[name](stream(files, megabytes), size)


def memory(args: Args) -> dict[str, Any]:
    """Peak memory of a process that trains; all draw the documents from the same generator over the files."""
    files = text_files(args.folder)
    characters = sum(map(len, stream(files, args.train_mb)))
    contenders = {
        "nothing: reads the documents and drops them": (read_only, files, args.train_mb),
        "nothing: holds all documents": (hold, files, args.train_mb),
        "jaxchat, from the files": (train_from_files, files, characters, args.vocab_size),
    } | {name: (train_from_stream, name, files, args.train_mb, args.vocab_size) for name in trainers()}
    peaks = {}
    for name, (work, *arguments) in contenders.items():
        say(f"memory: {name}")
        _, peaks[name] = alone(work, *arguments)
    least = next(iter(peaks.values()))
    rows = [
        [name, f"{peak / MB:.0f}", f"{(peak - least) / MB:.0f}", f"{peak / peaks['jaxchat']:.2f}"]
        for name, peak in peaks.items()
    ]
    table([f"peak memory, training on {args.train_mb:g} MB", "MB", "above reading", "peak / jaxchat"], rows)
    return peaks


def linearity(args: Args) -> dict[str, Any]:
    """How time and memory grow with the size of the text."""
    files = text_files(args.folder)
    texts = list(stream(files, args.train_mb))
    parts = {share * args.train_mb: list(prefix(texts, share * args.train_mb)) for share in (0.1, 0.2, 0.5, 1)}
    work = {
        f"{size:g} MB": lambda part=part: Tokenizer.train_from_iterator(iter(part), args.vocab_size)
        for size, part in parts.items()
    }
    results = {"training": _growth("training", work, parts, args.runs)}
    peaks = {}
    for size in parts:
        say(f"memory: {size:g} MB")
        _, peaks[f"{size:g} MB"] = alone(train_from_stream, "jaxchat", files, size, args.vocab_size)
    table(["peak memory, training", "MB"], [[name, f"{peak / MB:.0f}"] for name, peak in peaks.items()])

    tokenizer = Tokenizer.train_from_iterator(iter(texts), args.vocab_size)
    parts = {share * args.train_mb: list(prefix(texts, share * args.train_mb)) for share in (0.01, 0.1, 1)}
    work = {
        f"{size:g} MB": lambda part=part: tokenizer.encode_to_numpy(part, num_threads=1) for size, part in parts.items()
    }
    encoding = _growth("encoding to numpy, 1 thread", work, parts, args.runs)
    return results | {"peak_memory": peaks, "encoding": encoding}


def _growth(title: str, work: dict[str, Callable], parts: dict[float, list[str]], runs: int) -> dict[str, Any]:
    seconds = medians(title, work, runs)
    sizes = dict(zip(work, map(size_of, parts.values()), strict=True))
    first = next(iter(work))
    rows = [
        [
            name,
            f"{seconds[name]:.3f}",
            f"{sizes[name] / seconds[name]:.1f}",
            f"{sizes[name] / sizes[first]:.1f}",
            f"{seconds[name] / seconds[first]:.1f}",
        ]
        for name in work
    ]
    table([title, "seconds", "MB/s", f"text / {first}", f"time / {first}"], rows)
    return {name: {"seconds": seconds[name], "megabytes": sizes[name]} for name in work}


# --- encoding and decoding --------------------------------------------------------------------------------------------


def huggingface_of(tokenizer: Tokenizer):
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return tokenizers.Tokenizer.from_file(str(next(Path(folder).iterdir())))


def encoding(args: Args) -> dict[str, Any]:
    """Encoding. rustbpe and Hugging Face fix their threads at process start, so each number has its own process."""
    environment = {"TOKENIZERS_PARALLELISM": "true"}
    return {
        str(threads): alone(encode_all, args, threads, environment=environment | {"RAYON_NUM_THREADS": str(threads)})[0]
        for threads in args.threads
    }


def encode_all(args: Args, threads: int) -> dict[str, Any]:
    all_texts = list(stream(text_files(args.folder), max(args.train_mb, args.encode_mb)))
    learning, texts = list(prefix(all_texts, args.train_mb)), list(prefix(all_texts, args.encode_mb))
    tokenizer = Tokenizer.train_from_iterator(iter(learning), args.vocab_size)
    # jaxchat caches pieces between calls and the others do not, so its first call is measured too.
    fresh = iter([pickle.loads(pickle.dumps(tokenizer)) for _ in range(args.runs)])
    contenders: dict[str, Callable[[], object]] = {
        "jaxchat, to numpy": lambda: tokenizer.encode_to_numpy(texts, num_threads=threads),
        "jaxchat, first call": lambda: next(fresh).encode_to_numpy(texts, num_threads=threads),
        "jaxchat, to lists": lambda: tokenizer.encode(texts, num_threads=threads),
    }
    if have("tiktoken"):
        tiktoken = tokenizer.to_tiktoken()
        contenders["tiktoken"] = lambda: tiktoken.encode_ordinary_batch(texts, num_threads=threads)
        if threads == 1:
            none = frozenset()
            contenders["tiktoken, to numpy"] = lambda: [
                tiktoken.encode_to_numpy(text, disallowed_special=none) for text in texts
            ]
    if have("rustbpe"):
        peer = rustbpe_tokenizer(learning, args.vocab_size - len(SPECIAL_TOKENS))
        contenders["rustbpe"] = lambda: peer.batch_encode(texts)
    if have("tokenizers"):
        huggingface = huggingface_of(tokenizer)
        contenders["HF tokenizers"] = lambda: [
            encoded.ids for encoded in huggingface.encode_batch_fast(texts, add_special_tokens=False)
        ]
    title = f"encoding, {threads} thread{'s' * (threads > 1)}"
    return contest(title, medians(title, contenders, args.runs), size_of(texts))


def patterns(args: Args) -> dict[str, Any]:
    """Custom patterns: splitting and counting (no merges), and encoding with the same ranks; one thread."""
    environment = {"RAYON_NUM_THREADS": "1"}
    return {name: alone(with_pattern, args, name, environment=environment)[0] for name in PATTERNS}


def with_pattern(args: Args, name: str) -> dict[str, Any]:
    texts, pattern = list(stream(text_files(args.folder), args.encode_mb)), PATTERNS[name]
    counting: dict[str, Callable[[], object]] = {"jaxchat": lambda: rust.train(iter(texts), 256, pattern, 1)}
    if have("rustbpe"):
        counting["rustbpe"] = lambda: rustbpe_tokenizer(texts, 256, pattern)
    size = size_of(texts)
    title = f"splitting and counting, {name} pattern, 1 thread"
    results = {"counting": contest(title, medians(title, counting, args.runs), size)}

    tokenizer = Tokenizer.train_from_iterator(iter(texts), args.vocab_size, pattern=pattern)
    coding: dict[str, Callable[[], object]] = {
        "jaxchat, to numpy": lambda: tokenizer.encode_to_numpy(texts, num_threads=1),
        "jaxchat, to lists": lambda: tokenizer.encode(texts, num_threads=1),
    }
    if have("tiktoken"):
        tiktoken = tokenizer.to_tiktoken()
        coding["tiktoken"] = lambda: tiktoken.encode_ordinary_batch(texts, num_threads=1)
    title = f"encoding, {name} pattern, 1 thread"
    return results | {"encoding": contest(title, medians(title, coding, args.runs), size)}


def unbroken_texts(megabytes: float) -> dict[str, str]:
    """Texts of `megabytes` each with few or no places to split them."""
    rng, size = random.Random(0), round(megabytes * MB)
    cjk = [*map(chr, range(0x4E00, 0xA000)), *map(chr, range(0x3041, 0x30FF)), *map(chr, range(0xAC00, 0xD7A4))]
    return {
        "one letter": "a" * size,
        "random letters": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=size)),
        "spaces": " " * size,
        "newlines": "\n" * size,
        "digits": "".join(rng.choices("0123456789", k=size)),
        "apostrophes": "'" * size,
        "CJK": "".join(rng.choices(cjk, k=size // 3)),
    }


def unbroken(args: Args) -> dict[str, Any]:
    """Text that is slow for a tokenizer whose time is quadratic in the length of a piece; one thread, one call each.

    tiktoken panics on some of it, so it runs in a separate process.
    """
    learning = list(stream(text_files(args.folder), args.encode_mb))
    tokenizer = Tokenizer.train_from_iterator(iter(learning), args.vocab_size)
    normal = "".join(prefix(learning, args.unbroken_mb)).encode()[: round(args.unbroken_mb * MB)]
    texts = {"normal text": normal.decode(errors="ignore")} | unbroken_texts(args.unbroken_mb)
    work = {name: lambda text=text: tokenizer.encode_to_numpy([text], num_threads=1) for name, text in texts.items()}
    seconds = medians("unbroken", work, args.runs)
    results, rows = {}, []
    for name, text in texts.items():
        peer: object = "-"
        if have("tiktoken"):
            say(f"tiktoken: {name}")
            try:
                peer, _ = alone(tiktoken_seconds, tokenizer, text, args.runs, timeout=20)
            except Failed as error:
                peer = str(error)
        results[name] = {"jaxchat": seconds[name], "tiktoken": peer}
        ratio = f"{seconds[name] / seconds['normal text']:.2f}"
        rows.append([name, f"{seconds[name]:.4f}", ratio, f"{peer:.4f}" if isinstance(peer, float) else peer])
    head = [f"encoding {args.unbroken_mb:g} MB without a break, seconds", "jaxchat", "/ normal text", "tiktoken"]
    table(head, rows)
    return results


def tiktoken_seconds(tokenizer: Tokenizer, text: str, runs: int) -> float:
    """Median seconds of at most `runs` runs, as many as start within ten seconds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the message of a panic
    peer = tokenizer.to_tiktoken()
    seconds: list[float] = []
    while len(seconds) < runs and sum(seconds) < 10:
        start = time.perf_counter()
        peer.encode_ordinary(text)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def decoding(args: Args) -> dict[str, Any]:
    texts = list(stream(text_files(args.folder), args.encode_mb))
    tokenizer = Tokenizer.train_from_iterator(iter(texts), args.vocab_size)
    ids, offsets = tokenizer.encode_to_numpy(texts)
    lists, flat, size = tokenizer.encode(texts), ids.tolist(), size_of(texts)
    one: dict[str, Callable[[], object]] = {
        "jaxchat, of numpy": lambda: tokenizer.decode(ids),
        "jaxchat, of a list": lambda: tokenizer.decode(flat),
    }
    many: dict[str, Callable[[], object]] = {"jaxchat, of numpy": lambda: tokenizer.decode_batch(ids, offsets)}
    if have("tiktoken"):
        tiktoken = tokenizer.to_tiktoken()
        one["tiktoken"] = lambda: tiktoken.decode(flat)
        many["tiktoken"] = lambda: tiktoken.decode_batch(lists, num_threads=os.cpu_count())
    if have("tokenizers"):
        huggingface = huggingface_of(tokenizer)
        one["HF tokenizers"] = lambda: huggingface.decode(flat, skip_special_tokens=False)
        many["HF tokenizers"] = lambda: huggingface.decode_batch(lists, skip_special_tokens=False)
    return {
        title: contest(title, medians(title, contenders, args.runs), size)
        for title, contenders in {"decoding, one text": one, "decoding, a batch": many}.items()
    }


SECTIONS: dict[str, Callable[[Args], dict[str, Any]]] = {
    work.__name__: work for work in (training, memory, linearity, encoding, patterns, unbroken, decoding)
}


def main(args: Args) -> None:
    results: dict[str, Any] = {"machine": machine(*PEERS)}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    missing = [peer for peer in PEERS if not have(peer)]
    if missing:
        print(f"Left out, not installed: {', '.join(missing)}.")
    for name in args.only:
        results[name] = SECTIONS[name](args)
        if args.json:  # after each section, so that an interrupted benchmark keeps its results
            args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
