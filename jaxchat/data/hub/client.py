"""Downloads single files, mostly from the Hugging Face hub: resumes, retries, waits when asked to, checks the bytes.

The hub's own client (`huggingface_hub`) knows addresses, mirrors (`HF_ENDPOINT`), tokens and timeouts
(`HF_HUB_DOWNLOAD_TIMEOUT`). Its `hf_hub_download` discards partial files, which is why the bytes are received here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

from jaxchat.data.manifest import file_sha256, git_sha1
from jaxchat.errors import UserError, check
from jaxchat.runs.progress import format_duration
from jaxchat.storage import first_line

PATIENCE = 6  # failures in a row, without a byte between them, before giving up
LONGEST_WAIT = 120.0  # seconds between attempts; a server may ask for more
WRONG_BYTES = 3  # downloads of a file with a wrong checksum before giving up
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
      path: its path on the hub, or its name, for messages.
      size: bytes; None if unknown.
      digest: its SHA-256, or the id that git gives it if the hub knows no other; None if unknown.
    """

    path: str
    url: str
    size: int | None = None
    digest: str | None = None


class Stopped(Exception):
    """The download was asked to stop."""


class _CutShort(Exception):
    """The response ended before the file did."""


class HubClient:
    """Asks the hub about files and downloads them, with retries.

    Args:
      say: prints a line for the user.
      stop: set it to end every request and every wait, which then raise `Stopped`.
      patience: failures in a row before giving up; None for never, if nobody is watching.
      backoff: seconds to wait after the first failure, twice as long after the next, and so on.

    Raises:
      UserError: HF_ENDPOINT is not the address of a server.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        stop: threading.Event,
        *,
        patience: int | None = PATIENCE,
        backoff: float = 1.0,
    ):
        self._say, self._stop, self._patience, self._backoff = say, stop, patience, backoff
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        check(
            self._endpoint.lower().startswith(("http://", "https://")),
            f"HF_ENDPOINT is '{self._endpoint}'; it must begin with http:// or https://",
        )

    def listing(self, repo: str, revision: str | None) -> tuple[str, list[str]]:
        """The commit of a data set's revision (None for the latest) and the paths of its files, of which the hub may
        leave some out if there are over a thousand."""
        api = HfApi(endpoint=self._endpoint)
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = self._persist(repo, lambda: api.dataset_info(repo, revision=revision, timeout=seconds))
        check(
            info.sha is not None,
            f"{self._endpoint} does not give the revision of {repo}; if it is a mirror, use another",
        )
        return str(info.sha), [sibling.rfilename for sibling in info.siblings or ()]

    def locate(self, repo: str, revision: str, path: str) -> RemoteFile:
        """A file of a data set, by its address alone, without a request."""
        url = hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=self._endpoint)
        return RemoteFile(path, url)

    def describe(self, remote: RemoteFile) -> RemoteFile:
        """The file with its size and digest, which the hub tells without sending the file."""
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        found = self._persist(remote.path, lambda: get_hf_file_metadata(remote.url, timeout=seconds))
        check(
            found.etag is not None and len(found.etag) in (40, 64) and found.size is not None,
            f"{self._endpoint} does not give the size and checksum of {remote.path}; if it is a mirror, use another",
        )
        return replace(remote, size=found.size, digest=found.etag)

    def fetch(self, remote: RemoteFile, part: Path, count: Callable[[int], None]) -> None:
        """Downloads the whole file to `part`, resuming from what is there already.

        Args:
          count: called with the number of bytes written, or, negative, discarded.

        Raises:
          UserError: the server does not have the file or refuses it, keeps failing, or keeps sending wrong bytes; the
            disk is full. What has arrived is kept, unless it is wrong.
          Stopped: `stop` was set.
        """
        wrong = None
        for _ in range(WRONG_BYTES):
            self._persist(remote.path, lambda: self._receive(remote, part, count), part)
            with on_disk(part):
                wrong = _wrong(remote, part)
                if not wrong:
                    return
                count(-part.stat().st_size)
                part.unlink()
            self._say(f"{remote.path} {wrong}; downloading it again")
        raise UserError(
            f"{remote.path} {wrong}, {WRONG_BYTES} times; nothing of it was kept; "
            "if HF_ENDPOINT is a mirror, use another; otherwise try again later"
        )

    def _receive(self, remote: RemoteFile, part: Path, count: Callable[[int], None]) -> None:
        with on_disk(part):
            part.parent.mkdir(parents=True, exist_ok=True)
            have = part.stat().st_size if part.exists() else 0
        if remote.size is not None and have >= remote.size:
            return
        token = None if remote.url.startswith(self._endpoint) else False  # no other server may see the hub's token
        headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}  # ranges count uncompressed bytes
        if have:
            headers["Range"] = f"bytes={have}-"
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT  # without a byte
        with get_session().stream("GET", remote.url, headers=headers, timeout=seconds) as response:
            if response.status_code == 416:  # there are no more bytes; the checksum decides whether the file is whole
                return
            hf_raise_for_status(response)
            resumes = response.status_code == 206
            if have and not resumes:
                count(-have)
                have = 0
            length = response.headers.get("Content-Length", "")
            expected = remote.size if remote.size is not None else have + int(length) if length.isdigit() else None
            with on_disk(part):
                file = part.open("ab" if resumes else "wb", buffering=0)
            with file:
                for data in response.iter_bytes():
                    with on_disk(part):
                        _write(file, data)
                    have += len(data)
                    count(len(data))
                    if self._stop.is_set():
                        raise Stopped
                with on_disk(part):
                    os.fsync(file.fileno())
        if expected is not None and have < expected:
            raise _CutShort(f"ended after {have:,} of {expected:,} bytes")

    # --- retries --------------------------------------------------------------------------------------------------

    def _persist(self, name: str, attempt: Callable[[], T], part: Path | None = None) -> T:
        """Retries `attempt` until it succeeds. The count of failures starts again whenever `part` has grown."""
        failures, before = 0, _size(part)
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                return attempt()
            except (UserError, Stopped):
                raise
            except Exception as error:
                reason, wait = self._judge(name, error)
            failures = failures + 1 if _size(part) <= before else 1
            before = _size(part)
            if self._patience is not None and failures > self._patience:
                raise UserError(
                    f"{name}: {reason}, {failures} times in a row; what has arrived is kept, and the same command "
                    "resumes from there"
                ) from None
            own = min(LONGEST_WAIT, self._backoff * 2 ** min(failures - 1, 20)) * random.uniform(0.75, 1.25)
            wait = max(wait or 0.0, own)  # a server may ask for 0 seconds, or name a date in the past
            self._say(f"{name}: {reason}; trying again in {format_duration(wait)}")
            if self._stop.wait(wait):
                raise Stopped

    def _judge(self, name: str, error: Exception) -> tuple[str, float | None]:
        """What happened, in words, and how many seconds the server asks to wait, if it does.

        Raises:
          UserError: trying again would not help.
        """
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(f"{name} must be downloaded, but HF_HUB_OFFLINE is set; unset it") from None
        if isinstance(error, HfHubHTTPError):
            response = error.response
            if response.status_code in TRANSIENT:
                reason = f"the server answers {response.status_code} {response.reason_phrase}"
                return reason.strip(), _asked_to_wait(response)
            raise UserError(_refused(name, response.status_code, str(response.url))) from None
        if isinstance(error, _CutShort):
            return f"the connection {error}", None
        if type(error).__module__.split(".")[0].startswith("httpx"):  # by name: the hub's client has changed it before
            return f"{self._host(error)}: {first_line(error)}", None
        if isinstance(error, ValueError):
            raise UserError(
                f"{name}: {self._endpoint} does not respond like the hub ({first_line(error)}); "
                "check HF_ENDPOINT and the network's login page"
            ) from None
        raise error

    def _host(self, error: Exception) -> str:
        request = getattr(error, "_request", None)
        return f"no answer from {request.url.host if request is not None else self._endpoint}"


def _wrong(remote: RemoteFile, part: Path) -> str | None:
    """What is wrong with the bytes that arrived."""
    size = part.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"arrived with {size:,} bytes instead of {remote.size:,}"
    found = git_sha1(part) if len(remote.digest or "") == 40 else file_sha256(part)
    return None if remote.digest in (None, found) else f"arrived with the wrong bytes (checksum {found[:12]}…)"


def _write(file: Any, data: bytes) -> None:
    """Writes all of `data` to an unbuffered file, whose `write` may take only a part."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _size(part: Path | None) -> int:
    return part.stat().st_size if part is not None and part.exists() else 0


def _asked_to_wait(response: Any) -> float | None:
    """Seconds to wait, from the hub's rate-limit header or `Retry-After`, a number or a date (RFC 9110, 10.2.3)."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = response.headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _refused(name: str, status: int, url: str) -> str:
    if status in (401, 403):
        return f"{name}: the server answers {status} for {url}; log in with 'hf auth login' if the data set requires it"
    if status == 404:
        return f"{name}: the server has no {url} (404); if HF_ENDPOINT is a mirror, it may lack this data set"
    return f"{name}: the server answers {status} for {url}"


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turns an error of the file system into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"no space left for {path}; free some, and the same command resumes from what has arrived"
            ) from None
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
