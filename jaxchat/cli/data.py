"""`jaxchat data get` and `jaxchat data list`: downloads data sets before a run, and lists those that there are."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxchat.cli.values import path, whole
from jaxchat.config import Range
from jaxchat.runs.progress import PLAIN_SECONDS, format_duration
from jaxchat.verbatim import segments, write


def add_command(commands: Any) -> None:
    """Adds `data` to the commands of `jaxchat`."""
    data = commands.add_parser("data", help="Download data sets, and list them.")
    data_commands = data.add_commands()
    get = data_commands.add_parser(
        "get",
        help="Download data sets to a data folder.",
        description="Downloads what is missing; started again after a stop, it resumes. Every file is checked against "
        "the hub's checksum and recorded in DIR/manifest.json, together with the validation shard of the text.",
        epilog="HF_ENDPOINT names a mirror, HF_TOKEN logs in, HF_HUB_OFFLINE=1 only checks what is there.",
    )
    get.add_argument("names", nargs="+", metavar="NAME", help="Name from 'jaxchat data list'; NAME:SHARDS for text.")
    get.add_argument(
        "--shards",
        type=whole(Range(at_least=1)),
        metavar="N",
        help="Shards of text, besides the validation shard. (default 8)",
    )
    get.add_argument("--folder", type=path, default="data", metavar="DIR", help="The data folder. (default data)")
    get.add_argument("--check", action="store_true", help="Read all files that are there, and replace damaged ones.")
    get.set_defaults(command=_get)
    data_commands.add_parser("list", help="List the data sets.").set_defaults(command=_list)


def _get(arguments: argparse.Namespace) -> int:
    from jaxchat.data.hub.catalogue import Archive, parse_requests  # slow to import: --help need not wait for it
    from jaxchat.data.hub.download import Download

    requests = parse_requests(arguments.names, arguments.shards)
    for request in requests:
        if isinstance(request.dataset.content, Archive):
            print(f"{request.dataset.name}: {request.dataset.about}", file=sys.stderr)
    folder, progress = arguments.folder, _Bar() if sys.stderr.isatty() else _Lines()
    download = Download(folder, requests, say=progress.say, check_bytes=arguments.check)
    began = time.monotonic()
    with progress:
        download.run(progress.watch)
    names = " ".join(request.dataset.name for request in requests)
    if not download.jobs_total:
        print(f"{folder} already has all of {names}")
    else:
        took = format_duration(time.monotonic() - began)
        print(f"{folder} now has all of {names}: {_gigabytes(download.bytes_done)} GB in {took}")
    return 0


class _Lines:
    """Progress as a line every ten seconds."""

    def __init__(self):
        self._first: tuple[float, int] | None = None
        self._printed = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def say(self, line: str) -> None:
        write(line, sys.stderr, end="\n")

    def watch(self, download: Any) -> None:
        now, done, total = time.monotonic(), download.bytes_done, download.bytes_total
        if self._first is None:
            self._first, self._printed = (now, done), now
        too_early = now - self._printed < PLAIN_SECONDS or now == self._first[0]
        if not total or too_early or download.jobs_done == download.jobs_total:
            return
        self._printed = now
        rate = (done - self._first[1]) / (now - self._first[0])
        left = f", {format_duration((total - done) / rate)} left" if rate > 0 else ""
        self.say(
            f"{_gigabytes(done)} of about {_gigabytes(total)} GB, file {download.jobs_done + 1} of "
            f"{download.jobs_total}, {rate / 1e6:.1f} MB/s{left}"
        )


class _Bar:
    """Progress as a bar on a terminal."""

    def __init__(self):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("connecting", total=None)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()

    def say(self, line: str) -> None:
        self._progress.console.print(segments((f"{line}\n", "")), soft_wrap=True)

    def watch(self, download: Any) -> None:
        if download.jobs_total:
            files = f"{download.jobs_done:,} of {download.jobs_total:,} files"
            total = max(download.bytes_total, download.bytes_done)
            self._progress.update(self._task, description=files, total=total, completed=download.bytes_done)


def _list(_: argparse.Namespace) -> int:
    from jaxchat.data.hub.catalogue import DATASETS, Shards

    for dataset in DATASETS:
        content = dataset.content
        size = f"{_gigabytes(dataset.size)} GB"
        if isinstance(content, Shards):
            size = f"{content.last:,} shards of {_gigabytes(content.shard_bytes)} GB"
        print(f"{dataset.name:<12} {dataset.about}\n{'':<12} {size}; {dataset.license}; {dataset.source}")
    return 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.{2 if size >= 1e7 else 4}f}"
