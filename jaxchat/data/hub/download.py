"""Data sets into a data folder: what is missing is fetched, checked, brought into form and recorded.

DIR/manifest.json        what was downloaded
DIR/pretrain/            shards of pretraining text, as the hub has them
DIR/chat/, DIR/eval/     what tasks read, made of the hub's files
DIR/.download/           what has arrived in part; a lock, for one download at a time
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import is_offline_mode

from jaxchat.data.hub.catalogue import Archive, Dataset, Request, Shards, Table
from jaxchat.data.hub.client import PATIENCE, Hub, Remote, Stopped, on_disk
from jaxchat.data.hub.convert import unpack, write_items
from jaxchat.data.manifest import Manifest, Record, Source, file_sha256
from jaxchat.data.text.shards import SUFFIXES
from jaxchat.errors import UserError, check

WORKERS = 4  # files at once: one connection rarely fills a line
FIRST_SHARDS = 8  # of the text, before anything else: what a tokenizer is trained on
WORKING = ".download"


@dataclass(frozen=True)
class Piece:
    """What one worker does at a time: a shard, a table or an archive. `name` is the file or folder that it becomes."""

    dataset: Dataset
    name: str
    content: Shards | Table | Archive
    size: int  # about, until the server has said
    sources: tuple[str, ...] = ()  # paths at the hub


class Download:
    """Brings data sets into `folder`. Several threads or processes may try: one works, the others wait for it.

    Args:
      check_bytes: reads all that is there and fetches again what is damaged; otherwise only sizes are compared.
      patience, backoff: as `Hub`.

    Attributes:
      bytes_total, bytes_done, pieces_total, pieces_done: of what was missing; the first is an estimate in the
        beginning.
    """

    def __init__(
        self,
        folder: Path | str,
        requests: Sequence[Request],
        *,
        say: Callable[[str], None] = print,
        check_bytes: bool = False,
        patience: int | None = PATIENCE,
        backoff: float = 1.0,
    ):
        self.folder, self._requests, self._say, self._check_bytes = local_folder(folder), requests, say, check_bytes
        self._stop = threading.Event()
        self._hub = Hub(say, self._stop, patience=patience, backoff=backoff)
        self._changed = threading.Condition()
        self._queue: deque[Piece] = deque()
        self._error: BaseException | None = None
        self._manifest = Manifest(self.folder)
        self._sources: dict[str, Source] = {}
        self.bytes_total = self.bytes_done = self.pieces_total = self.pieces_done = 0

    def run(self, watch: Callable[[Download], None] = lambda _: None, *, every: float = 0.2) -> None:
        """Returns when everything is there.

        Args:
          watch: called every so many seconds while there is something to do.

        Raises:
          UserError: see `Hub.fetch`; not enough space; something of the user's own is in the way; a part is missing and
            HF_HUB_OFFLINE is set. What has arrived stays.
          Stopped: `stop` was called.
        """
        self._manifest = Manifest.read(self.folder)
        if not self._check_bytes and self._is_complete():
            return  # also where nothing may be written
        lock = FileLock(self.folder / WORKING / "lock")
        with on_disk(self.folder):
            (self.folder / WORKING).mkdir(parents=True, exist_ok=True)
            self._acquire(lock, watch)
        try:
            self._manifest = Manifest.read(self.folder)
            pieces = self._missing()
            if pieces:
                self._work(self._plan(pieces), watch, every)
            self._tidy()
        finally:
            lock.release()

    def stop(self) -> None:
        """Makes `run` end soon, in whichever thread it is."""
        self._stop.set()

    def _acquire(self, lock: FileLock, watch: Callable[[Download], None]) -> None:
        wait = 0.0
        while True:
            try:
                lock.acquire(timeout=wait, poll_interval=0.1)
                return
            except Timeout:
                if not wait:
                    self._say(f"another download is at work in {self.folder}; waiting for it")
                wait = 0.5
                watch(self)
                if self._stop.is_set():
                    raise Stopped from None

    def _tidy(self) -> None:
        """Removes the empty folders that finished downloads leave."""
        for folder, _, _ in os.walk(self.folder / WORKING, topdown=False):
            if not os.listdir(folder):
                os.rmdir(folder)

    # --- what is to be done -------------------------------------------------------------------------------------

    def _pieces(self) -> list[Piece]:
        return [piece for request in self._requests for piece in pieces_of(request)]

    def _is_complete(self) -> bool:
        self._check_texts()
        return all(is_whole(piece, self._manifest) for piece in self._pieces())

    def _check_texts(self) -> None:
        for request in self._requests:
            if request.is_text:
                self._check_text(request.dataset)

    def _missing(self) -> list[Piece]:
        """The pieces that are not there or not whole, in the order in which they are wanted.

        Raises:
          UserError: other text is in the folder; offline.
        """
        self._check_texts()
        pieces = self._pieces()
        recorded = {piece: recorded_files(piece, self._manifest) for piece in pieces}
        names = [name for found in recorded.values() for name in found]
        wrong = {name: "is missing or cut short" for name in names if not self._manifest.has(name)}
        if self._check_bytes and names:
            self._say(f"checking {len(names):,} files in {self.folder}")
            wrong |= self._manifest.damage([name for name in names if name not in wrong])
        for name in sorted(wrong):
            if (self.folder / name).exists():
                self._say(f"{name} {wrong[name]}; downloading it again")
        missing = [piece for piece in pieces if not recorded[piece] or any(name in wrong for name in recorded[piece])]
        if missing and is_offline_mode():
            some = ", ".join(piece.name for piece in missing[:3]) + (", ..." if len(missing) > 3 else "")
            sets = " ".join(dict.fromkeys(piece.dataset.name for piece in missing))
            raise UserError(
                f"HF_HUB_OFFLINE is set, and {self.folder} lacks {len(missing):,} of {len(pieces):,} files of {sets}: "
                f"{some}; unset it, or run 'jaxchat data get {sets}' where there is a network"
            )
        return missing

    def _check_text(self, dataset: Dataset) -> None:
        """One text a folder: shards of several would bear the same names."""
        texts = [name for name, source in self._manifest.datasets.items() if source.validation]
        others = [name for name in texts if name != dataset.name]
        another = f"choose another folder for {dataset.name}"
        check(not others, f"{self.folder / 'pretrain'} holds {', '.join(others)}; {another}")
        shards = {dataset.content.name(index) for index in range(dataset.content.last + 1)}
        own = [name for name in own_text(self.folder) if name not in shards]
        check(not own, f"{self.folder} holds text of your own, such as {own[0] if own else ''}; {another}")

    def _plan(self, missing: list[Piece]) -> list[Piece]:
        """The same pieces with their sources, of the revision that the folder began with."""
        planned: list[Piece] = []
        for dataset in dict.fromkeys(piece.dataset for piece in missing):
            known = self._manifest.datasets.get(dataset.name)
            files: list[str] = []
            if dataset.repo is None:
                revision = dataset.content.sha256
            elif isinstance(dataset.content, Shards) and known:
                revision = known.revision
            else:
                revision, files = self._hub.listing(dataset.repo, known.revision if known else None)
            pin = dataset.content.validation if isinstance(dataset.content, Shards) else None
            self._sources[dataset.name] = Source(dataset.source, revision, pin)
            planned += [self._with_sources(piece, files) for piece in missing if piece.dataset is dataset]
        self._check_space(planned)
        # What a tokenizer needs, then the small sets, then the long rest of the text.
        text = [piece for piece in planned if isinstance(piece.content, Shards)]
        tasks = [piece for piece in planned if not isinstance(piece.content, Shards)]
        return [*text[: FIRST_SHARDS + 1], *tasks, *text[FIRST_SHARDS + 1 :]]

    def _with_sources(self, piece: Piece, files: list[str]) -> Piece:
        if isinstance(piece.content, Shards):
            return piece
        self._check_own(piece)
        if isinstance(piece.content, Archive):
            return piece
        found = tuple(sorted(fnmatch.filter(files, piece.content.pattern)))
        check(bool(found), f"{piece.dataset.source} has no {piece.content.pattern}; it is not what it was")
        return Piece(piece.dataset, piece.name, piece.content, piece.size, found)

    def _check_space(self, pieces: list[Piece]) -> None:
        """A table and what it is made of are there at the same time, and so are an archive and its files."""
        need = sum(piece.size * (1 if isinstance(piece.content, Shards) else 2) for piece in pieces)
        need -= sum(path.stat().st_size for path in (self.folder / WORKING).rglob("*.part"))
        free = shutil.disk_usage(self.folder).free
        fewer = ", or ask for fewer shards" if any(isinstance(piece.content, Shards) for piece in pieces) else ""
        check(
            need <= free,
            f"about {need / 1e9:,.1f} GB more are needed in {self.folder}, and {free / 1e9:,.1f} GB are free there; "
            f"free some space, choose another folder{fewer}",
        )

    # --- doing it -----------------------------------------------------------------------------------------------

    def _work(self, pieces: list[Piece], watch: Callable[[Download], None], every: float) -> None:
        self._queue.extend(pieces)
        self.pieces_total, self.bytes_total = len(pieces), sum(piece.size for piece in pieces)
        # Daemons: at the end of the program nobody waits for them, as it would for those of a pool.
        workers = [threading.Thread(target=self._worker, daemon=True) for _ in range(min(WORKERS, len(pieces)))]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                watch(self)
                with self._changed:
                    self._changed.wait(every)
        finally:
            watch(self)
            self._stop.set()
            for worker in workers:
                worker.join(3.0)  # one that hears nothing from its server ends with the program
        if self._error is not None:
            raise self._error
        if self.pieces_done < self.pieces_total:
            raise Stopped

    def _worker(self) -> None:
        while not self._stop.is_set():
            try:
                piece = self._queue.popleft()
            except IndexError:
                break
            try:
                self._get(piece)
            except Stopped:
                break
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                self._stop.set()
                break
            with self._changed:
                self.pieces_done += 1
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _get(self, piece: Piece) -> None:
        dataset = piece.dataset
        revision = self._sources[dataset.name].revision
        working = self.folder / WORKING / dataset.name / revision[:12]
        if isinstance(piece.content, Archive):
            url = piece.content.url
            remotes = [Remote(url.rpartition("/")[2], url, None, piece.content.sha256)]
        else:
            remotes = [self._hub.describe(self._hub.remote(dataset.repo, revision, path)) for path in piece.sources]
        parts = [working / f"{remote.path}.part" for remote in remotes]
        with self._changed:
            known = sum(remote.size or 0 for remote in remotes)
            self.bytes_total += known - piece.size if known else 0
            self.bytes_done += sum(part.stat().st_size for part in parts if part.exists())
        if isinstance(piece.content, Shards):
            with on_disk(self.folder / piece.name):
                if self._adopt(piece, remotes[0]):
                    return
            self._check_own(piece)
        for remote, part in zip(remotes, parts, strict=True):
            self._hub.fetch(remote, part, self._moved)
        with on_disk(self.folder / piece.name):
            self._settle(piece, remotes, parts, working / "made" / piece.name)

    def _moved(self, count: int) -> None:
        with self._changed:
            self.bytes_done += count

    def _adopt(self, piece: Piece, remote: Remote) -> bool:
        """Records a shard that is there already, as another program has left it, if it is the hub's."""
        path = self.folder / piece.name
        if piece.name in self._manifest.files or not path.is_file():
            return False
        if path.stat().st_size != remote.size or (digest := file_sha256(path)) != remote.digest:
            return False
        self._record(piece, [remote], {piece.name: (path, digest)})
        self._moved(path.stat().st_size)
        return True

    def _check_own(self, piece: Piece) -> None:
        path = self.folder / piece.name
        ours = recorded_files(piece, self._manifest) or not path.exists()
        check(bool(ours), f"{path} is not from here and stays as it is; move it away, or choose another folder")

    def _settle(self, piece: Piece, remotes: list[Remote], parts: list[Path], made: Path) -> None:
        """Brings what was fetched into form and to its place. The record comes first: what stands at its place without
        one counts as the user's own."""
        content, files = piece.content, {piece.name: made}
        if isinstance(content, Shards):
            files = {piece.name: parts[0]}
        else:
            made.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Table):
            left_out = write_items(parts, made, content.to_item)
            if left_out:
                self._say(f"{piece.name}: {left_out:,} rows that no task can use are left out")
        if isinstance(content, Archive):
            files = {f"{piece.name}/{name}": made / name for name in unpack(parts[0], made, content.folder)}
        self._record(piece, remotes, {name: (path, file_sha256(path)) for name, path in files.items()})
        for name, path in files.items():
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        for part in parts:
            part.unlink(missing_ok=True)

    def _record(self, piece: Piece, remotes: list[Remote], files: dict[str, tuple[Path, str]]) -> None:
        made_of = tuple(remote.path for remote in remotes)
        with self._changed:
            self._manifest.datasets[piece.dataset.name] = self._sources[piece.dataset.name]
            for name, (path, digest) in files.items():
                self._manifest.files[name] = Record(piece.dataset.name, path.stat().st_size, digest, made_of)
            self._manifest.write()


def local_folder(folder: Path | str) -> Path:
    """Where downloads can go.

    Raises:
      UserError: storage that has no local paths.
    """
    check("://" not in str(folder), f"{folder} is not a local folder; download to one, and copy it from there")
    return Path(folder)


def pieces_of(request: Request) -> list[Piece]:
    """What a request comes to."""
    dataset, content = request.dataset, request.dataset.content
    if isinstance(content, Shards):
        # The validation shard first: nothing can begin without it.
        return [Piece(dataset, content.name(index), content, content.shard_bytes, (content.path(index),))
                for index in (content.last, *range(request.shards))]  # fmt: skip
    if isinstance(content, Archive):
        return [Piece(dataset, content.name, content, dataset.size)]
    return [Piece(dataset, table.name, table, dataset.size // len(content)) for table in content]


def recorded_files(piece: Piece, manifest: Manifest) -> list[str]:
    """The files that a piece became, by the manifest."""
    if isinstance(piece.content, Archive):
        return [name for name in manifest.files if name.startswith(f"{piece.name}/")]
    return [piece.name] if piece.name in manifest.files else []


def is_whole(piece: Piece, manifest: Manifest) -> bool:
    """Whether all files of a piece are there with their sizes."""
    files = recorded_files(piece, manifest)
    return bool(files) and all(manifest.has(name) for name in files)


def own_text(folder: Path) -> list[str]:
    """The files of pretraining text in a data folder that were not downloaded by this program."""
    place = folder / "pretrain" if (folder / "pretrain").is_dir() else folder
    ends = tuple(end for kind in SUFFIXES.values() for end in kind)
    try:
        names = sorted(entry.name for entry in os.scandir(place) if entry.is_file() and not entry.name.startswith("."))
    except OSError:
        return []
    names = [str((place / name).relative_to(folder)) for name in names if name.endswith(ends)]
    # Read after the folder: a file is recorded before it is put there, which another process may be doing.
    manifest = Manifest.read(folder) if names else None
    return [name for name in names if name not in manifest.files]
