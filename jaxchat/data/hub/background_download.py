"""Downloads the data that an experiment names in a thread, while the training already uses what has arrived."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from jaxchat.data.hub.catalogue import Request
from jaxchat.data.hub.client import Stopped
from jaxchat.data.hub.download import Download, is_whole, jobs_of, local_folder, own_text
from jaxchat.data.manifest import Manifest
from jaxchat.data.text.folder import TextSplits, find_text
from jaxchat.data.text.reading import OnBad
from jaxchat.data.text.shards import TextFiles
from jaxchat.errors import UserError, check
from jaxchat.runs.progress import format_duration

POLL_SECONDS = 0.2
SAY_AFTER = 2.0  # seconds of waiting before the user is told
SAY_EVERY = 60.0


class BackgroundDownload:
    """Provides what `requests` name in `folder`. The download begins when any of it is first used.

    What the user has put into the folder stays and is used: text of their own, or another data set's, instead of the
    requested text, and their files of a task instead of those that would be downloaded.

    Each of several processes may have one for the same folder. One of them downloads, and another takes over if it
    dies.

    Args:
      say: prints a line for the user.
      patience, backoff: as in `HubClient`; by default the download never gives up, since nobody is watching it.
    """

    def __init__(
        self,
        folder: Path | str,
        requests: Sequence[Request],
        say: Callable[[str], None] = print,
        *,
        patience: int | None = None,
        backoff: float = 1.0,
    ):
        self.folder, self._print = local_folder(folder), say
        self._text = next((request for request in requests if request.is_text), None)
        self._uses_other_text = self._text is not None and self._has_other_text(self._text.dataset.name)
        self._wanted = [request for request in requests if not self._is_users_own(request)]
        self._manifest = Manifest.read(self.folder)
        self._lock = threading.Lock()
        self._download = Download(self.folder, self._wanted, say=self._say, patience=patience, backoff=backoff)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def _has_other_text(self, name: str) -> bool:
        own = own_text(self.folder)
        texts = [other for other, origin in Manifest.read(self.folder).datasets.items() if origin.validation]
        if own:
            self._say(f"{self.folder} contains text of your own, which is used instead of {name}")
        elif texts not in ([], [name]):
            self._say(f"{self.folder} contains {texts[0]}, which is used instead of {name}")
        return bool(own) or texts not in ([], [name])

    def _is_users_own(self, request: Request) -> bool:
        """Whether the folder contains files of this request that were not downloaded and must not be overwritten."""
        if request.is_text:
            return self._uses_other_text
        there = any((self.folder / job.name).exists() for job in jobs_of(request))
        return there and not Manifest.read(self.folder).of(request.dataset.name)

    def text(self, val_shard: str | None = None, *, on_bad: OnBad = "refuse") -> TextSplits:
        """The text to train on: exactly the requested shards, those still missing being waited for when they are read.

        Args:
          val_shard, on_bad: as in `find_text`.

        Raises:
          UserError: as `find_text`, for text that is not downloaded; `val_shard` is not one of the shards.
        """
        self._start()
        if self._text is None or self._uses_other_text:
            return find_text(self.folder, val_shard, on_bad=on_bad, say=self._say)
        shards = self._text.dataset.shards
        pinned = self.folder / shards.validation
        train = [self.folder / shards.name(index) for index in range(self._text.shards)]
        val = pinned
        if val_shard is not None:
            named = next((path for path in (pinned, *train) if val_shard in (path.name, path.stem)), None)
            if named is None:
                raise UserError(f"validation shard {val_shard!r} is not among those of {self._text.dataset.name}")
            val = named
        sides = (tuple(path for path in train if path != val), (val,))
        check(bool(sides[0]), f"{self.folder}: the only shard requested is for validation; request more shards")
        common: dict[str, Any] = {"wait": self.wait, "on_bad": on_bad, "say": self._say}
        how = f"as {'manifest.json' if val == pinned else '--data.val-shard'} says"
        train_side, val_side = (TextFiles(files, **common) for files in sides)
        return TextSplits(train_side, val_side, self.folder / "pretrain", how)

    def wait(self, path: Path, given_up: Callable[[], bool] = lambda: False) -> None:
        """Returns once a file is there.

        Raises:
          UserError: the download has failed.
          Stopped: `given_up` became true.
        """
        self._start()
        record = self._manifest.files.get(str(path.relative_to(self.folder)))

        def there() -> bool:
            # A file that was truncated after it was recorded is about to be replaced.
            return path.is_file() and (record is None or path.stat().st_size == record.size)

        self._wait(there, path.name, given_up)

    def wait_for_tasks(self) -> None:
        """Returns once everything but the text is there.

        Raises:
          UserError: the download has failed.
        """
        tasks = [request for request in self._wanted if not request.is_text]
        if tasks:
            self._start()
            names = ", ".join(request.dataset.name for request in tasks)
            self._wait(lambda: self._have(tasks), names)

    def missing_tasks(self) -> list[str]:
        """The names of the data sets besides text that are still to be downloaded."""
        return [r.dataset.name for r in self._wanted if not r.is_text and not self._have([r])]

    def _have(self, requests: Sequence[Request]) -> bool:
        """Whether all their files are there, whichever process has downloaded them."""
        manifest = Manifest.read(self.folder)
        return all(is_whole(job, manifest) for request in requests for job in jobs_of(request))

    def _wait(self, there: Callable[[], bool], name: str, given_up: Callable[[], bool] = lambda: False) -> None:
        began = time.monotonic()
        said = began + SAY_AFTER - SAY_EVERY
        while not there():
            if given_up():
                raise Stopped
            if not self._is_running() and not there():
                raise self._error or UserError(f"{name} was not downloaded to {self.folder}")
            now = time.monotonic()
            if now - said >= SAY_EVERY:
                self._say(f"waiting for {name}; {self._progress()}")
                said = now
            time.sleep(POLL_SECONDS)
        if time.monotonic() - began >= SAY_AFTER:
            self._say(f"{name} arrived after {format_duration(time.monotonic() - began)}")

    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _progress(self) -> str:
        done, total = self._download.bytes_done, self._download.bytes_total
        if not total:
            return "another process is downloading it"
        return f"{done / 1e9:.2f} of about {total / 1e9:.2f} GB have arrived"

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                if is_offline_mode():  # to fail now rather than in hours if something is missing
                    self._download.run()
                self._thread = threading.Thread(target=self._run, name="download", daemon=True)
                self._thread.start()

    def _say(self, line: str) -> None:
        self._print(f"data      {line}")

    def _run(self) -> None:
        began, announced = time.monotonic(), False

        def watch(download: Download) -> None:
            nonlocal announced
            if download.jobs_total and not announced:
                announced = True
                self._say(f"downloading about {download.bytes_total / 1e9:.1f} GB to {self.folder} in the background")

        try:
            self._download.run(watch)
            if announced:
                took = format_duration(time.monotonic() - began)
                self._say(f"download complete: {self._download.bytes_done / 1e9:.1f} GB in {took}")
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
            self._say(f"the download stopped: {error}")

    def stop(self) -> None:
        """Ends the download. What has arrived stays, and the next download resumes from there."""
        if self._thread is not None:
            self._download.stop()
            self._thread.join()
