"""The data that an experiment asks for: fetched by a thread, used as it arrives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import is_offline_mode

from jaxchat.data.hub.catalogue import Request, Shards
from jaxchat.data.hub.client import Stopped
from jaxchat.data.hub.download import Download, is_whole, local_folder, own_text, pieces_of
from jaxchat.data.manifest import Manifest
from jaxchat.data.text.reading import OnBad
from jaxchat.data.text.shards import TextSide, TextSplit, find_text
from jaxchat.errors import UserError, check
from jaxchat.runs.progress import format_duration

POLL_SECONDS = 0.2
SAY_AFTER = 2.0  # seconds of waiting before the user hears of it
SAY_EVERY = 60.0


class Arrivals:
    """What `requests` ask for, in `folder`. The download begins when something of it is first asked for.

    What the user has put into the folder stays and is used: text of the user's own, or of another data set, instead of
    the one requested; a task's files instead of those that would be fetched.

    Every process may have one for the same folder; one of them fetches, and another goes on if that one dies.

    Args:
      patience, backoff: as `Hub`; by default the thread never loses patience, since nobody watches it.
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
        self.folder, self._say = local_folder(folder), say
        self._text = next((request for request in requests if request.is_text), None)
        self._other = self._text is not None and self._has_other_text()
        self._wanted = [request for request in requests if not self._is_there_already(request)]
        self._manifest = Manifest.read(self.folder)
        self._options = {"patience": patience, "backoff": backoff}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._download: Download | None = None
        self._error: BaseException | None = None

    def _has_other_text(self) -> bool:
        name, own = self._text.dataset.name, own_text(self.folder)
        texts = [other for other, source in Manifest.read(self.folder).datasets.items() if source.validation]
        if own:
            self._say(f"data      {self.folder} holds text of your own, which is used instead of {name}")
        elif texts not in ([], [name]):
            self._say(f"data      {self.folder} holds {texts[0]}, which is used instead of {name}")
        return bool(own) or texts not in ([], [name])

    def _is_there_already(self, request: Request) -> bool:
        """Whether the folder has something of this that is not from here, and not to be written over."""
        if request.is_text:
            return self._other
        there = any((self.folder / piece.name).exists() for piece in pieces_of(request))
        return there and not Manifest.read(self.folder).of(request.dataset.name)

    def text(self, val_shard: str | None = None, *, on_bad: OnBad = "refuse") -> TextSplit:
        """The text to train on, exactly the shards that are asked for; those that are not there yet are waited for
        when they are read. What of them is bad is refused or skipped.

        Raises:
          UserError: as `find_text`, for text that is not fetched; a `val_shard` that is not among the shards.
        """
        self._start()
        if self._text is None or self._other:
            return find_text(self.folder, val_shard, on_bad=on_bad, tell=self._tell)
        content: Shards = self._text.dataset.content
        pinned = self.folder / content.validation
        train = [self.folder / content.name(index) for index in range(self._text.shards)]
        val = pinned
        if val_shard is not None:
            val = next((path for path in (pinned, *train) if val_shard in (path.name, path.stem)), None)
            check(val is not None, f"validation shard {val_shard!r} is not among those of {self._text.dataset.name}")
        sides = (tuple(path for path in train if path != val), (val,))
        check(bool(sides[0]), f"{self.folder}: there is only the shard for validation; ask for more of them")
        common = {"format": "parquet", "wait": self.wait, "on_bad": on_bad, "tell": self._tell}
        return TextSplit(*(TextSide(files, **common) for files in sides))

    def wait(self, path: Path, given_up: Callable[[], bool] = lambda: False) -> None:
        """Returns when a file is there.

        Raises:
          UserError: it will not come.
          Stopped: `given_up` became true.
        """
        self._start()
        record = self._manifest.files.get(str(path.relative_to(self.folder)))

        def there() -> bool:
            # One that was cut short since it was recorded is about to be replaced.
            return path.is_file() and (record is None or path.stat().st_size == record.size)

        self._wait(there, path.name, given_up)

    def wait_for_tasks(self) -> None:
        """Returns when everything but the text is there.

        Raises:
          UserError: it will not come.
        """
        tasks = [request for request in self._wanted if not request.is_text]
        if tasks:
            self._start()
            names = ", ".join(request.dataset.name for request in tasks)
            self._wait(lambda: self._have(tasks), names)

    def _have(self, requests: Sequence[Request]) -> bool:
        """Whether all their files are there, whichever process has fetched them."""
        manifest = Manifest.read(self.folder)
        return all(is_whole(piece, manifest) for request in requests for piece in pieces_of(request))

    def _wait(self, there: Callable[[], bool], name: str, given_up: Callable[[], bool] = lambda: False) -> None:
        began = said = time.monotonic()
        said += SAY_AFTER - SAY_EVERY
        while not there():
            if given_up():
                raise Stopped
            if not self._thread.is_alive() and not there():
                raise self._error or UserError(f"{name} was not downloaded to {self.folder}")
            now = time.monotonic()
            if now - said >= SAY_EVERY:
                self._say(f"data      waiting for {name}, {self._progress()}")
                said = now
            time.sleep(POLL_SECONDS)
        if time.monotonic() - began >= SAY_AFTER:
            self._say(f"data      {name} is there after {format_duration(time.monotonic() - began)}")

    def _progress(self) -> str:
        done, total = self._download.bytes_done, self._download.bytes_total
        return f"{done / 1e9:.2f} of about {total / 1e9:.2f} GB are there" if total else "which another process fetches"

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._download = Download(self.folder, self._wanted, say=self._tell, **self._options)
                if is_offline_mode():  # to hear now, not in hours, that something is missing
                    self._download.run()
                self._thread = threading.Thread(target=self._fetch, name="download", daemon=True)
                self._thread.start()

    def _tell(self, line: str) -> None:
        self._say(f"data      {line}")

    def _fetch(self) -> None:
        began, told = time.monotonic(), False

        def watch(download: Download) -> None:
            nonlocal told
            if download.pieces_total and not told:
                told = True
                self._tell(f"fetching about {download.bytes_total / 1e9:.1f} GB to {self.folder} in the background")

        try:
            self._download.run(watch)
            if told:
                took = format_duration(time.monotonic() - began)
                self._tell(f"all is there, {self._download.bytes_done / 1e9:.1f} GB in {took}")
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
            self._tell(f"the download stopped: {error}")

    def stop(self) -> None:
        """Ends the download; what has arrived stays, and the next one goes on from there."""
        if self._thread is not None:
            self._download.stop()
            self._thread.join()
