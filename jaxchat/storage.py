"""Paths on this machine or in cloud storage: gs://, s3://, az://, hf://."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

from jaxchat.errors import UserError, check, closest

AnyPath = Path | epath.Path
UNFINISHED = ".unfinished"  # the name, or its ending, of a folder that is not complete yet
# The fsspec protocol that epath uses for a scheme, and the package that implements it.
_SCHEMES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs"), "az": ("az", "adlfs"), "hf": ("hf", "huggingface_hub")}
_FOR_RUNS = ("gs", "s3")  # those of TensorStore, which writes the arrays of checkpoints
# What the libraries of cloud storage raise besides OSError.
_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "google.auth.exceptions": ("GoogleAuthError",),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "gcsfs.retry": ("HttpError",),
    "aiohttp": ("ClientError",),
}


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in cloud storage."""
    return "://" in os.fspath(path)


def to_path(path: str | os.PathLike) -> AnyPath:
    """The path as one of `pathlib` on this machine, of `etils.epath`, with methods of the same names, elsewhere.

    Raises:
      UserError: an unknown scheme, or one whose package is not installed.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text)
    scheme = text.partition("://")[0]
    known = ", ".join(f"{name}://" for name in _SCHEMES)
    check(scheme in _SCHEMES, f"{text}: unknown storage {scheme!r}{closest(scheme, _SCHEMES)} Known: {known}")
    protocol, package = _SCHEMES[scheme]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise UserError(f"{text} needs {package}, which is not installed; pip install {package}") from None
    if scheme in _FOR_RUNS:
        _list_folders_afresh(protocol)
    return epath.Path(text)


def _list_folders_afresh(protocol: str) -> None:
    """Stops fsspec from caching listings, which do not show what TensorStore or other processes have written since.

    This is a setting in fsspec's configuration, since it is `epath` that opens the storage, without options. What the
    user has configured stays.
    """
    fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)  # pyright: ignore[reportAttributeAccessIssue]


def to_run_directory(path: str | os.PathLike) -> epath.Path:
    """The path of a run directory, on this machine or in storage that checkpoints can be written to.

    Raises:
      UserError: other storage, a bucket that does not exist, or as `to_path` and `is_folder`.
    """
    if not is_remote(path):
        return epath.Path(path)
    scheme, _, name = os.fspath(path).partition("://")
    runs = " and ".join(f"{name}://" for name in _FOR_RUNS)
    check(scheme in _FOR_RUNS, f"{path}: a run must be on this machine or in {runs}; choose another --run-dir")
    found = epath.Path(to_path(path))
    bucket = f"{scheme}://{name.partition('/')[0]}"
    check(bucket != f"{scheme}://", f"{path} names no bucket; write {scheme}://BUCKET/RUN")
    check(is_folder(epath.Path(bucket)), f"the bucket {bucket} does not exist; create it, or correct its name")
    return found


def storage_errors() -> tuple[type[Exception], ...]:
    """The exceptions of reading and writing for which the storage is to blame, not the program."""
    loaded = [(sys.modules[module], names) for module, names in _ERRORS.items() if module in sys.modules]
    return OSError, *(getattr(module, name) for module, names in loaded for name in names)


def of_the_cloud(error: BaseException) -> bool:
    """Whether cloud storage is to blame: an error of its library, or an OSError that such a library raised."""
    if not isinstance(error, storage_errors()):
        return False
    kinds = tuple(kind for kind in storage_errors() if kind is not OSError)
    modules = ("s3fs", "gcsfs", "adlfs", "fsspec.asyn")
    return isinstance(error, kinds) or any(
        frame.f_globals.get("__name__", "").startswith(modules) for frame, _ in traceback.walk_tb(error.__traceback__)
    )


@contextlib.contextmanager
def readable(path: AnyPath) -> Iterator[None]:
    """Turns errors of the storage into a `UserError`: a file that cannot be read now need not be damaged."""
    # TensorStore raises ValueError for whatever went wrong in cloud storage.
    errors = (*storage_errors(), ValueError) if is_remote(path) else storage_errors()
    try:
        yield
    except FileNotFoundError:
        raise
    except errors as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); correct that, and try again") from error


def reason(error: Exception) -> str:
    """What went wrong, in the words of the operating system where the message contains them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r"No space left on device|Read-only file system|Permission denied|File too large", str(error))
    return found[0] if found else first_line(error)


def is_folder(path: AnyPath) -> bool:
    """Whether the path is an existing folder.

    Raises:
      UserError: the storage does not answer, or denies access.
    """
    if not is_remote(path):
        return path.is_dir()
    files, name = fsspec.core.url_to_fs(os.fspath(path))
    try:
        # Not `isdir`, which takes a storage that does not answer for one without the folder.
        if "/" in name.strip("/"):
            return files.info(name)["type"] == "directory"
        files.ls(name)  # a bucket, which may be empty
        return True
    except FileNotFoundError:
        return False
    except Exception as error:  # each kind of storage has its own exceptions
        problem = first_line(error)
        raise UserError(f"{path} cannot be reached ({problem}); check the name and your credentials") from None


def append_bytes(path: AnyPath, data: bytes) -> None:
    """Appends to a file, creating it if needed; in cloud storage the whole file is read and written again.

    On this machine it appends all or nothing.
    """
    if not is_remote(path):
        try:
            with open(path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    while data:  # a disk that is nearly full takes a part
                        data = data[file.write(data) :]
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(size)
                    raise
        except OSError as error:  # a write does not say to which file
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        return
    # Not with a file object: after a failed write its destructor would try again, and complain on stderr.
    files, name = fsspec.core.url_to_fs(os.fspath(path))
    files.pipe_file(name, (files.cat_file(name) if files.exists(name) else b"") + data)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def size_of(path: AnyPath) -> int:
    """The size of a file in bytes."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, which becomes `folder` at the end: it is there with everything in it, or not at all.

    `folder` must be free, see `is_free`.
    """
    # What is renamed must be on the same disk, which a folder that is there need not share with its parent.
    there = folder.exists()
    part = folder / UNFINISHED if there else folder.with_name(f".{folder.name}{UNFINISHED}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if there:
            for entry in part.iterdir():
                entry.rename(folder / entry.name)
            part.rmdir()
        else:
            part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def is_free(folder: Path) -> bool:
    """Whether nothing is there, or an empty folder, apart from what `written_whole` left there when it was killed."""
    return not folder.exists() or (folder.is_dir() and all(entry.name == UNFINISHED for entry in folder.iterdir()))
