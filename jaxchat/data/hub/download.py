"""Downloads data sets into a data folder: fetches what is missing, checks it, converts it and records it.

DIR/manifest.json        what was downloaded
DIR/pretrain/            shards of pretraining text, as they are on the hub
DIR/chat/, DIR/eval/     what tasks read, converted from the hub's files
DIR/.download/           partial downloads, and a lock that allows one download at a time
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import is_offline_mode

from jaxchat.data.hub.catalogue import Archive, Dataset, Request, Shards, Table
from jaxchat.data.hub.client import PATIENCE, HubClient, RemoteFile, Stopped, on_disk
from jaxchat.data.hub.convert import unpack, write_items
from jaxchat.data.manifest import Manifest, Origin, Record, file_sha256
from jaxchat.data.text.listing import list_text, text_folder
from jaxchat.errors import UserError, check

WORKERS = 4  # files at a time: one connection rarely uses the whole bandwidth
FIRST_SHARDS = 8  # of the text, before anything else: what a tokenizer is trained on
WORKING = ".download"


@dataclass(frozen=True)
class Job:
    """What one worker does at a time: a shard, a table or an archive.

    Attributes:
      name: the file or folder that it becomes, as a path in the data folder.
      size: bytes to download; an estimate until the server has been asked.
      sources: the files' paths on the hub.
    """

    dataset: Dataset
    name: str
    content: Shards | Table | Archive
    size: int
    sources: tuple[str, ...] = ()


class Download:
    """Downloads data sets into `folder`. Of several threads or processes that do so, one works and the others wait.

    Args:
      check_bytes: reads every file and downloads damaged ones again; otherwise only sizes are compared.
      patience, backoff: as in `HubClient`.

    Attributes:
      bytes_total, bytes_done, jobs_total, jobs_done: of what was missing; `bytes_total` is an estimate at first.
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
        self._hub = HubClient(say, self._stop, patience=patience, backoff=backoff)
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._error: BaseException | None = None
        self._manifest = Manifest(self.folder)
        self._origins: dict[str, Origin] = {}
        self.bytes_total = self.bytes_done = self.jobs_total = self.jobs_done = 0

    def run(self, watch: Callable[[Download], None] = lambda _: None, *, every: float = 0.2) -> None:
        """Returns once everything is there.

        Args:
          watch: called every `every` seconds while there is work to do.

        Raises:
          UserError: see `HubClient.fetch`; there is not enough space; a file of the user's is in the way; a file is
            missing and HF_HUB_OFFLINE is set. What has arrived is kept.
          Stopped: `stop` was called.
        """
        self._manifest = Manifest.read(self.folder)
        if not self._check_bytes and self._is_complete():
            return  # before anything is written: the folder may be read-only
        lock = FileLock(self.folder / WORKING / "lock")
        with on_disk(self.folder):
            (self.folder / WORKING).mkdir(parents=True, exist_ok=True)
            self._acquire(lock, watch)
        try:
            self._manifest = Manifest.read(self.folder)
            missing = self._missing()
            if missing:
                self._work(self._plan(missing), watch, every)
            self._tidy()
        finally:
            lock.release()

    def stop(self) -> None:
        """Makes `run` end soon, in whichever thread it is running."""
        self._stop.set()

    def _acquire(self, lock: FileLock, watch: Callable[[Download], None]) -> None:
        wait = 0.0
        while True:
            try:
                lock.acquire(timeout=wait, poll_interval=0.1)
                return
            except Timeout:
                if not wait:
                    self._say(f"another process is downloading to {self.folder}; waiting for it")
                wait = 0.5
                watch(self)
                if self._stop.is_set():
                    raise Stopped from None

    def _tidy(self) -> None:
        """Removes the empty folders that finished downloads leave."""
        for folder, _, _ in os.walk(self.folder / WORKING, topdown=False):
            if not os.listdir(folder):
                os.rmdir(folder)

    # --- what there is to do --------------------------------------------------------------------------------------

    def _jobs(self) -> list[Job]:
        return [job for request in self._requests for job in jobs_of(request)]

    def _is_complete(self) -> bool:
        self._check_texts()
        return all(is_whole(job, self._manifest) for job in self._jobs())

    def _missing(self) -> list[Job]:
        """The jobs whose files are missing or damaged, in the order in which they are requested.

        Raises:
          UserError: the folder contains other text; something is missing while offline.
        """
        self._check_texts()
        jobs = self._jobs()
        recorded = {job: recorded_files(job, self._manifest) for job in jobs}
        names = [name for found in recorded.values() for name in found]
        wrong = {name: "is missing or cut short" for name in names if not self._manifest.has(name)}
        if self._check_bytes and names:
            self._say(f"checking {len(names):,} files in {self.folder}")
            wrong |= self._manifest.damage([name for name in names if name not in wrong])
        for name in sorted(wrong):
            if (self.folder / name).exists():
                self._say(f"{name} {wrong[name]}; downloading it again")
        missing = [job for job in jobs if not recorded[job] or any(name in wrong for name in recorded[job])]
        if missing and is_offline_mode():
            some = ", ".join(job.name for job in missing[:3]) + (", ..." if len(missing) > 3 else "")
            sets = " ".join(dict.fromkeys(job.dataset.name for job in missing))
            raise UserError(
                f"HF_HUB_OFFLINE is set, and {self.folder} lacks {len(missing):,} of {len(jobs):,} files of {sets}: "
                f"{some}; unset it, or run 'jaxchat data get {sets}' where there is a network"
            )
        return missing

    def _check_texts(self) -> None:
        for request in self._requests:
            if request.is_text:
                self._check_text(request.dataset)

    def _check_text(self, dataset: Dataset) -> None:
        """Allows one text a folder: the shards of two would have the same names."""
        texts = [name for name, origin in self._manifest.datasets.items() if origin.validation]
        others = [name for name in texts if name != dataset.name]
        another = f"choose another folder for {dataset.name}"
        check(not others, f"{self.folder / 'pretrain'} contains {', '.join(others)}; {another}")
        shards = {dataset.shards.name(index) for index in range(dataset.shards.last + 1)}
        own = [name for name in own_text(self.folder) if name not in shards]
        check(not own, f"{self.folder} contains text of your own, such as {own[0] if own else ''}; {another}")

    def _plan(self, missing: list[Job]) -> list[Job]:
        """The jobs with their sources, from the revision that the folder began with, in the order of work."""
        planned: list[Job] = []
        for dataset in dict.fromkeys(job.dataset for job in missing):
            known = self._manifest.datasets.get(dataset.name)
            files: list[str] = []
            if isinstance(dataset.content, Archive):
                revision = dataset.content.sha256
            elif dataset.is_text and known:
                revision = known.revision
            else:
                revision, files = self._hub.listing(dataset.repo, known.revision if known else None)
            pin = dataset.shards.validation if dataset.is_text else None
            self._origins[dataset.name] = Origin(dataset.source, revision, pin)
            planned += [self._with_sources(job, files) for job in missing if job.dataset is dataset]
        self._check_space(planned)
        # First the text that a tokenizer needs, then the small sets, then the rest of the text.
        text = [job for job in planned if isinstance(job.content, Shards)]
        tasks = [job for job in planned if not isinstance(job.content, Shards)]
        return [*text[: FIRST_SHARDS + 1], *tasks, *text[FIRST_SHARDS + 1 :]]

    def _with_sources(self, job: Job, files: list[str]) -> Job:
        if isinstance(job.content, Shards):
            return job
        self._check_own(job)
        if isinstance(job.content, Archive):
            return job
        found = tuple(sorted(fnmatch.filter(files, job.content.pattern)))
        check(bool(found), f"{job.dataset.source} has no {job.content.pattern}; the data set has changed")
        return replace(job, sources=found)

    def _check_space(self, jobs: list[Job]) -> None:
        # A table or an archive takes space twice, since what it is made from is deleted last.
        need = sum(job.size * (1 if isinstance(job.content, Shards) else 2) for job in jobs)
        need -= sum(path.stat().st_size for path in (self.folder / WORKING).rglob("*.part"))
        free = shutil.disk_usage(self.folder).free
        fewer = ", or ask for fewer shards" if any(isinstance(job.content, Shards) for job in jobs) else ""
        check(
            need <= free,
            f"{self.folder} needs about {need / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free there; "
            f"free some space, choose another folder{fewer}",
        )

    # --- doing it -------------------------------------------------------------------------------------------------

    def _work(self, jobs: list[Job], watch: Callable[[Download], None], every: float) -> None:
        self._queue.extend(jobs)
        self.jobs_total, self.bytes_total = len(jobs), sum(job.size for job in jobs)
        # Daemon threads, so that the program can exit without waiting for them.
        workers = [threading.Thread(target=self._worker, daemon=True) for _ in range(min(WORKERS, len(jobs)))]
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
                worker.join(3.0)  # one whose server is silent ends with the program
        if self._error is not None:
            raise self._error
        if self.jobs_done < self.jobs_total:
            raise Stopped

    def _worker(self) -> None:
        while not self._stop.is_set():
            try:
                job = self._queue.popleft()
            except IndexError:
                break
            try:
                self._get(job)
            except Stopped:
                break
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                self._stop.set()
                break
            with self._changed:
                self.jobs_done += 1
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _get(self, job: Job) -> None:
        revision = self._origins[job.dataset.name].revision
        working = self.folder / WORKING / job.dataset.name / revision[:12]
        if isinstance(job.content, Archive):
            url = job.content.url
            files = [RemoteFile(url.rpartition("/")[2], url, None, job.content.sha256)]
        else:
            files = [self._hub.describe(self._hub.locate(job.dataset.repo, revision, path)) for path in job.sources]
        parts = [working / f"{file.path}.part" for file in files]
        with self._changed:
            known = sum(file.size or 0 for file in files)
            self.bytes_total += known - job.size if known else 0
            self.bytes_done += sum(part.stat().st_size for part in parts if part.exists())
        if isinstance(job.content, Shards):
            with on_disk(self.folder / job.name):
                if self._adopt(job, files[0]):
                    return
            self._check_own(job)
        for file, part in zip(files, parts, strict=True):
            self._hub.fetch(file, part, self._count_bytes)
        with on_disk(self.folder / job.name):
            self._finish(job, files, parts, working / "made" / job.name)

    def _count_bytes(self, count: int) -> None:
        with self._changed:
            self.bytes_done += count

    def _adopt(self, job: Job, file: RemoteFile) -> bool:
        """Records a shard that another program has put there, if it is the same as the hub's."""
        path = self.folder / job.name
        if job.name in self._manifest.files or not path.is_file():
            return False
        if path.stat().st_size != file.size or (digest := file_sha256(path)) != file.digest:
            return False
        self._record(job, [file], {job.name: (path, digest)})
        self._count_bytes(path.stat().st_size)
        return True

    def _check_own(self, job: Job) -> None:
        path = self.folder / job.name
        ours = recorded_files(job, self._manifest) or not path.exists()
        check(bool(ours), f"{path} was not downloaded and is left alone; move it away, or choose another folder")

    def _finish(self, job: Job, files: list[RemoteFile], parts: list[Path], made: Path) -> None:
        """Converts what was downloaded and moves it to its place."""
        content, outputs = job.content, {job.name: made}
        if isinstance(content, Shards):
            outputs = {job.name: parts[0]}
        else:
            made.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Table):
            left_out = write_items(parts, made, content.to_item)
            if left_out:
                self._say(f"{job.name}: {left_out:,} rows that no task can use are left out")
        if isinstance(content, Archive):
            outputs = {f"{job.name}/{name}": made / name for name in unpack(parts[0], made, content.folder)}
        # Recorded before it is moved: a file that is there without a record counts as the user's own.
        self._record(job, files, {name: (path, file_sha256(path)) for name, path in outputs.items()})
        for name, path in outputs.items():
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        for part in parts:
            part.unlink(missing_ok=True)

    def _record(self, job: Job, files: list[RemoteFile], outputs: dict[str, tuple[Path, str]]) -> None:
        made_of = tuple(file.path for file in files)
        with self._changed:
            self._manifest.datasets[job.dataset.name] = self._origins[job.dataset.name]
            for name, (path, digest) in outputs.items():
                self._manifest.files[name] = Record(job.dataset.name, path.stat().st_size, digest, made_of)
            self._manifest.write()


def local_folder(folder: Path | str) -> Path:
    """A folder that downloads can go to.

    Raises:
      UserError: it is remote storage, which has no local paths, or a file.
    """
    check("://" not in str(folder), f"{folder} is not a local folder; download to one, and copy it from there")
    check(not Path(folder).is_file(), f"{folder} is a file; give the folder that contains it, or another")
    return Path(folder)


def jobs_of(request: Request) -> list[Job]:
    """The jobs that a request consists of."""
    dataset, content = request.dataset, request.dataset.content
    if isinstance(content, Shards):
        # The validation shard first: nothing can begin without it.
        return [Job(dataset, content.name(index), content, content.shard_bytes, (content.path(index),))
                for index in (content.last, *range(request.shards))]  # fmt: skip
    if isinstance(content, Archive):
        return [Job(dataset, content.name, content, dataset.size)]
    return [Job(dataset, table.name, table, dataset.size // len(content)) for table in content]


def recorded_files(job: Job, manifest: Manifest) -> list[str]:
    """The files that a job became, according to the manifest."""
    if isinstance(job.content, Archive):
        return [name for name in manifest.files if name.startswith(f"{job.name}/")]
    return [job.name] if job.name in manifest.files else []


def is_whole(job: Job, manifest: Manifest) -> bool:
    """Whether all files of a job are there with the recorded sizes."""
    files = recorded_files(job, manifest)
    return bool(files) and all(manifest.has(name) for name in files)


def own_text(folder: Path) -> list[str]:
    """The files of pretraining text, empty or not, or of tables to be converted, in a data folder that were not
    downloaded."""
    try:
        listing = list_text(text_folder(folder))
    except OSError:
        return []
    names = [str(path.relative_to(folder)) for path in sorted({*listing.texts, *listing.empty, *listing.tables})]
    # The manifest is read after the folder, because another process may be downloading: it records a file before it
    # moves it there.
    recorded = Manifest.read(folder).files if names else {}
    return [name for name in names if name not in recorded]
